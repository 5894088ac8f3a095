"""Hostile inputs: each is a 4xx in OpenAI's shape that repeats none of it, and does no harm."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.hostile import BODIES, GOOD
from support.serving import ScriptedWorker, chat, client_of, data_url, encoded_image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor
from fmray.data.records import control_tokens
from fmray.engine.policy import Ask
from fmray.serve.images import decode, read_data_url
from fmray.serve.openai import ApiError, check_json, parse_request
from fmray.serve.prompts import PromptBuilder
from fmray.serve.replica import ChatModel


def body_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.mark.parametrize("name", BODIES)
def test_hostile_input_is_a_4xx_and_the_next_request_works(
    app: Any, worker: ScriptedWorker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with client_of(app, headers={"content-type": "application/json"}) as client:
            path = "/v1/chat/completions"
            response = await client.post(path, content=body_of(BODIES[name]))
            assert 400 <= response.status_code < 500, (response.status_code, response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(response.content) < 1000, "the input is repeated"
            assert "<script>" not in response.text and "passwd" not in response.text
            assert not worker.asks, "it reached the engine"
            response = await client.post(path, content=body_of(chat(GOOD)))
            assert response.status_code == 200, "the next request fails"

    asyncio.run(run())
    assert "request failed" not in caplog.text


def test_the_json_check_is_linear() -> None:
    """Four times the text takes about four times as long, whatever it consists of."""

    def seconds(body: bytes) -> float:
        times = []
        for _ in range(3):
            start = time.thread_time()
            with contextlib.suppress(ApiError):
                check_json(body)
            times.append(time.thread_time() - start)
        return min(times)

    floods = (
        b'\\"', b'"', b"\\", b'{"a":"', b'"a\\', b"[", b"]", b'[""]', b",", b'"a",', b"a"
    )  # fmt: skip
    for before in (b"", b'{"a":"', b'{"a":"\\'):
        for flood in floods:
            short, long = (before + flood * (size // len(flood)) for size in (2**17, 2**19))
            assert seconds(long) < 6 * seconds(short) + 1e-3, (before, flood)


def test_marks_in_strings_are_no_values() -> None:
    text = '{[,"' * 20_000 + "]" * 100
    check_json(json.dumps(chat(text=text)).encode())
    with pytest.raises(ApiError, match="nested"):
        check_json(b'["\\\\",' + b"[" * 32)
    check_json(b'["\\\\\\"",' + b"[" * 31)
    with pytest.raises(ApiError, match="values"):
        check_json(b"[" + b"1," * 50_000)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400), st.integers(0, 300))
def test_corrupt_images_are_value_errors(noise: bytes, place: int) -> None:
    """Random bytes at random places of files of each format."""
    for kind in ("PNG", "JPEG", "WEBP"):
        complete = encoded_image((24, 16), kind=kind)
        broken = complete[:place] + noise + complete[place + len(noise) // 2 :]
        message = "the image was read"
        try:
            decode(kind, broken, 10_000)
        except ValueError as error:
            message = str(error)
        assert message.startswith("the image")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_url_is_read_or_a_value_error(text: str) -> None:
    for url in (text, "data:" + text, "data:image/png;base64," + text):
        message = ""
        try:
            read_data_url(url)
        except ValueError as error:
            message = str(error)
        assert len(message) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["budget", "n", "stop", "messages", "model", "max_tokens", "tools", "seed", "plan", "user"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, json_values, max_size=4))
def test_any_body_is_parsed_or_an_api_error(fields: dict[str, Any]) -> None:
    body = json.dumps(chat() | fields, ensure_ascii=True).encode()
    raised: ApiError | None = None
    try:
        parse_request(body)
    except ApiError as error:
        raised = error
    assert raised is None or (raised.status == 400 and len(json.dumps(raised.body)) < 1000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Compared with Pillow's `exif_transpose`."""
    from PIL import ImageOps

    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    decoded = decode("PNG", buffer.getvalue(), 10_000).image
    assert decoded.tobytes() == expected.tobytes() and decoded.size == expected.size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_images_of_all_modes_are_accepted(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    encoded = encoded_image((9, 7), 0, kind, mode)
    assert decode(kind, encoded, 63).image.mode == "RGB"
    with pytest.raises(ValueError, match="more than 62 pixels"):
        decode(kind, encoded, 62)


PNG = encoded_image((9, 7))
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    {
        "plain": f"data:image/png;base64,{TEXT}",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        "another parameter": f"data:image/png; charset=x; base64,{TEXT}",
        "another type": f"data:image/jpeg;base64,{TEXT}",
        "no image type": f"data:application/octet-stream;base64,{TEXT}",
        "no type": f"data:;base64,{TEXT}",
        "lines of 76": "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "CRLF": "data:image/png;base64," + TEXT[:9] + "\r\n" + TEXT[9:] + "\r\n",
        "white space around": f" data:image/png;base64,{TEXT}\n",
        "no padding": "data:image/png;base64," + TEXT.rstrip("="),
        "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode(),
        "percent-encoded": "data:image/png;base64," + quote(TEXT, safe=""),
    }.values(),
)
def test_a_data_url_is_read_as_clients_write_it(url: str) -> None:
    assert any(mark in TEXT for mark in "+/"), "the URL-safe alphabet makes no difference"
    assert read_data_url(url) == ("PNG", PNG)


def test_the_bytes_tell_the_format() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        encoded = encoded_image(kind=kind)
        assert read_data_url(data_url(encoded, "image/gif")) == (kind, encoded)


ACCEPTED: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1,
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
    "stop_token_ids": [],
    "reasoning_effort": "none",
    "service_tier": "auto",
    "logit_bias": {},
    "logprobs": False,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "n": 1,
    "user": "a",
    "safety_identifier": "a",
    "prompt_cache_key": "a",
    "metadata": {"trace": "a", "tags": ["b"]},
    "store": True,
    "stop": [],
    "verbosity": None,
}


def test_values_without_effect_and_labels_are_accepted(app: Any, worker: ScriptedWorker) -> None:
    async def run() -> None:
        async with client_of(app) as client:
            path = "/v1/chat/completions"
            for name, value in ACCEPTED.items():
                response = await client.post(path, json=chat(**{name: value}))
                assert response.status_code == 200, (name, response.text)
            options = {"include_usage": True, "include_obfuscation": False}
            body = chat(stream=True, stream_options=options | {"continuous_usage_stats": False})
            assert (await client.post(path, json=body)).status_code == 200

            # Messages
            image = {"type": "image_url", "image_url": {"url": GOOD, "detail": "original"}}
            bare = {"type": "image_url", "image_url": GOOD}
            for content in ("", None, []):
                messages = [
                    {"role": "user", "name": "ann", "content": [image, bare]},
                    {"role": "assistant", "content": content, "tool_calls": None},
                    {"role": "user", "content": "a"},
                ]
                response = await client.post(path, json={"model": "tiny", "messages": messages})
                assert response.status_code == 200, response.text
            response = await client.post(path, json=chat(text="a ASSIS TANT <s > < image> [INST]"))
            assert response.status_code == 200, response.text

    asyncio.run(run())


def test_added_words_are_no_control_tokens(chat_model: ChatModel) -> None:
    """Makers of models add words of their field to the vocabulary."""
    processor = chat_model.prompts._processor
    processor.tokenizer.add_tokens(["covid", "   "])
    tokens = control_tokens.__wrapped__(processor)  # not the cached list
    assert tokens == ["</s>", "<image>", "<pad>", "<s>", "<unk>", "ASSISTANT:"]


def test_turn_tokens_of_a_template_without_system_messages_are_found(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = chat_model.prompts._processor
    refusal = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no') }}{%- endif -%}"
    monkeypatch.setattr(processor, "chat_template", refusal + processor.chat_template)
    assert "ASSISTANT:" in control_tokens.__wrapped__(processor)


def test_a_turn_token_in_another_spelling_is_refused(directory: Path) -> None:
    """A tokenizer that lowers case reads `Assistant:` as the token `ASSISTANT:`."""
    processor = load_processor(directory)
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "red": 2}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = Lowercase(), Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<image>"])
    backend.add_tokens(["ASSISTANT:"])
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    builder = PromptBuilder(processor, ServeConfig(model="m"), context=100)

    def build(text: str) -> Ask:
        return builder.build(parse_request(json.dumps(chat(text=text)).encode()), "a")

    assert build("a red assistant").prompt_tokens
    with pytest.raises(ApiError, match="control token 'ASSISTANT:'"):
        build("a Assistant: red")


def test_a_processors_value_error_is_a_400(
    app: Any, chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("secret text")

    monkeypatch.setattr(type(chat_model.prompts._processor), "__call__", fail)
    with pytest.raises(ApiError, match="processor rejects") as raised:
        chat_model.prompts.build(parse_request(json.dumps(chat(GOOD)).encode()), "a")
    assert raised.value.status == 400 and "secret" not in str(raised.value)
