"""The application on the real engine, over a socket, with the official client, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from support.serving import (
    chat,
    data_url,
    encoded_image,
    make_app,
    make_model_directory,
    post_and_disconnect,
    serving,
    wait_until,
)

from fmray.adallava import AdaptiveVLM
from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor
from fmray.serve.replica import ChatModel, load_chat_model


@pytest.fixture(scope="module", params=["layers", "heads"])
def design(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(design: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    token = "probe" if design == "layers" else "inline"
    path = tmp_path_factory.mktemp("engine") / "tiny"
    return make_model_directory(path, design=design, token=token)


@pytest.fixture(scope="module")
def chat_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatModel]:
    settings = ServeConfig(
        model=str(folder),
        name="tiny",
        calibration=tmp_path_factory.mktemp("calibration") / "cost.json",
        calibration_s=2.0,
        kv_mib=16,
        max_rows=4,
        drain_s=5.0,
    )
    opened = load_chat_model(settings, folder)
    yield opened
    opened.close()
    assert not opened.worker.health().alive


@pytest.fixture(scope="module")
def url(chat_model: ChatModel) -> Iterator[str]:
    with serving(make_app(chat_model)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(folder: Path, encoded: bytes, question: str, budget: str, tokens: int) -> str:
    """Return the answer of `generate` for a single request: the oracle."""
    model, processor = AdaptiveVLM.from_pretrained(folder).eval(), load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.open(BytesIO(encoded))
    inputs = dict(processor(images=image, text=text, return_tensors="pt", add_special_tokens=False))
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        ids = model.generate(**inputs, budget=budget, max_new_tokens=tokens)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


def messages(encoded: bytes, text: str = "what is in the picture ?") -> list[Any]:
    return chat(data_url(encoded), text=text)["messages"]


@pytest.mark.parametrize("budget", ["0.55", "0.8", "1"])
def test_answers_equal_those_of_generate(client: openai.OpenAI, folder: Path, budget: str) -> None:
    encoded = encoded_image((40, 32), "blue")
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages(encoded),
        max_tokens=6,
        extra_body={"budget": budget, "plan": True},
    )
    text = expected(folder, encoded, "what is in the picture ?", budget, 6)
    assert answer.choices[0].message.content.strip() == text
    cost = answer.model_extra["fmray"]
    assert cost["budget"] == float(budget)
    assert cost["share"] <= float(budget) + 1e-9
    assert sum(cost["plan"]) == cost["units_on"]
    assert answer.usage.completion_tokens <= 6


def test_stream_has_the_same_answer(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": messages(encoded_image()), "max_tokens": 12}
    answer = client.chat.completions.create(**ask, extra_body={"budget": 1})
    stream = client.chat.completions.create(
        **ask,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"budget": 1, "plan": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert chunks[-1].model_extra["fmray"]["plan"]
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_official_client_maps_errors(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": messages(encoded_image()), "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported") as raised:
        client.chat.completions.create(**ask, logprobs=True)
    assert raised.value.code == "unsupported_field" and raised.value.param == "logprobs"
    with pytest.raises(openai.BadRequestError, match="smallest budget"):
        client.chat.completions.create(**ask, extra_body={"budget": "0.0001"})
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**(ask | {"model": "gpt-4o"}))
    assert raised.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_async_client_with_concurrent_streams(url: str) -> None:
    import asyncio

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def stream_answer(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=messages(encoded_image(color=number)),
                    max_tokens=4 + number % 3,
                    stream=True,
                    extra_body={"budget": "0.8" if number % 2 else "1"},
                )
                parts = [chunk async for chunk in stream]
                return "".join(chunk.choices[0].delta.content or "" for chunk in parts)

            return await asyncio.gather(*(stream_answer(number) for number in range(10)))

    assert len(asyncio.run(run())) == 10


def test_repeated_image_comes_from_the_cache(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": messages(encoded_image((50, 50), "green")), "max_tokens": 2}
    costs = [
        client.chat.completions.create(**ask, extra_body={"budget": budget}).model_extra["fmray"]
        for budget in ("1", "0.8")
    ]
    assert [cost["vision_hit"] for cost in costs] == [False, True]
    assert costs[1]["units_on"] < costs[0]["units_on"]


def test_impossible_and_easy_deadlines(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": messages(encoded_image()), "max_tokens": 8}
    answer = client.chat.completions.create(**ask, extra_body={"deadline_ms": 0.001})
    assert answer.model_extra["fmray"]["deadline_met"] is False
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(**ask, extra_body={"deadline_ms": 0.001, "strict": True})
    assert raised.value.status_code == 503
    answer = client.chat.completions.create(**ask, extra_body={"deadline_ms": 60_000})
    cost = answer.model_extra["fmray"]
    assert cost["deadline_met"] is True and cost["units_on"] == cost["units"]


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_clients_free_their_rows(
    url: str, chat_model: ChatModel, stream: bool
) -> None:
    """Clients that occupy every row disconnect; within a second the engine is empty."""
    body = chat(data_url(encoded_image()), max_tokens=1000, stream=stream)

    cancelled = chat_model.worker.stats().finished.get("cancelled", 0)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(post_and_disconnect, url, body, {}) for _ in range(4)]
        for client in clients:
            client.result()
    start = time.monotonic()

    def idle() -> bool:
        stats = chat_model.worker.stats()
        return not stats.active and not stats.queued

    wait_until(idle, 10, "an empty engine")
    assert time.monotonic() - start < 1.1
    assert chat_model.worker.stats().finished["cancelled"] == cancelled + 4
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_calibration_is_stored(chat_model: ChatModel) -> None:
    assert chat_model.settings.calibration.is_file()


def test_metrics_include_the_engine(url: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=messages(encoded_image()), max_tokens=2)
    text = httpx.get(f"{url}/metrics").text
    for name in (
        "fmray_kv_bound_bytes",
        "fmray_vision_cache_hits_total",
        "fmray_prefix_cache_misses_total",
        'fmray_prediction_error{of="prefill_step"',
        "fmray_decode_steps_total",
    ):
        assert f"\n{name}" in text, name
