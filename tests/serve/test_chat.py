"""Chat completions in this process: responses, streams, and the requests the worker receives."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.serving import (
    ScriptedWorker,
    chat,
    client_of,
    data_url,
    encoded_image,
    post_in_memory,
)

from fmray.engine.policy import DeadlineImpossible, RateLimited, Shed, Unavailable
from fmray.serve.replica import ChatModel


def ask(app: Any, body: dict[str, Any], **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post("/v1/chat/completions", json=body, headers=headers)

    return asyncio.run(run())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_response_has_openai_shape_and_reports_its_cost(
    app: Any, worker: ScriptedWorker, chat_model: ChatModel
) -> None:
    response = ask(app, chat(data_url(encoded_image()), budget=0.6, plan=True, max_tokens=5))
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"][0]["message"]["content"] == "red and blue"
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["completion_tokens"] == 3
    cost = body["fmray"]
    assert cost["budget"] == 0.6
    assert cost["units_on"] == 2 and cost["units"] == 3
    assert cost["plan"] == [True, False, True]
    assert cost["share"] == pytest.approx(
        chat_model.model.cost.share(usage["prompt_tokens"], [True, False, True])
    )
    assert 0 < cost["first_token_ms"] <= cost["answer_ms"]
    assert cost["predicted_ms"] >= 12.5
    assert cost["deadline_met"] is None
    [sent] = worker.asks
    assert sent.budget == "0.6" and sent.sampling.max_new_tokens == 5
    assert sent.inputs["input_ids"].shape[1] == usage["prompt_tokens"]
    assert sent.image_key


def test_prompt_equals_that_of_training(
    app: Any, worker: ScriptedWorker, chat_model: ChatModel
) -> None:
    """Image first, question stripped, one `<s>`: the input that `fmray ask` gives the model."""
    from io import BytesIO

    from PIL import Image

    from fmray.data.records import chat_messages

    ask(app, chat(data_url(encoded_image((48, 32)))))
    processor = chat_model.prompts._processor
    text = processor.apply_chat_template(
        chat_messages([{"from": "human", "value": "<image>\nwhat is in the picture ?"}]),
        add_generation_prompt=True,
    )
    expected = processor(
        images=Image.open(BytesIO(encoded_image((48, 32)))),
        text=text,
        return_tensors="pt",
        add_special_tokens=False,
    )
    sent = worker.asks[0].inputs
    assert sent["input_ids"].tolist() == expected["input_ids"].tolist()
    assert sent["pixel_values"].equal(expected["pixel_values"])


def test_several_turns_and_text_without_image(app: Any, worker: ScriptedWorker) -> None:
    body = chat(data_url(encoded_image()))
    body["messages"] = [
        {"role": "system", "content": "a b"},
        *body["messages"],
        {"role": "assistant", "content": "red", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "left ?"},
    ]
    assert ask(app, body).status_code == 200
    body["messages"] = [{"role": "user", "content": "one two"}]
    assert ask(app, body).status_code == 200
    assert worker.asks[1].image_key is None and "pixel_values" not in worker.asks[1].inputs


def test_equal_images_have_equal_keys(app: Any, worker: ScriptedWorker) -> None:
    for color in ("red", "red", "blue"):
        ask(app, chat(data_url(encoded_image(color=color)), text=f"{len(worker.asks)}"))
    first, second, third = (ask.image_key for ask in worker.asks)
    assert first == second != third


@pytest.mark.parametrize(
    ("fields", "budget", "deadline_of"),
    [
        ({"budget": 0.6}, "0.6", "first_token"),
        ({"budget": "0.60"}, "0.60", "first_token"),
        ({"budget": 1}, "1", "first_token"),
        ({"budget": "auto"}, None, "first_token"),
        ({}, None, "first_token"),
        ({"deadline_ms": 500}, None, "first_token"),
        ({"deadline_ms": 500, "max_tokens": 4}, None, "answer"),
        ({"deadline_ms": 500, "max_tokens": 4, "deadline_of": "first_token"}, None, "first_token"),
    ],
)
def test_budgets_and_deadlines_reach_the_worker(
    app: Any,
    worker: ScriptedWorker,
    fields: dict[str, Any],
    budget: str | None,
    deadline_of: str,
) -> None:
    cost = ask(app, chat(**fields)).json()["fmray"]
    [sent] = worker.asks
    assert sent.budget == budget
    assert sent.deadline_of == deadline_of == cost["deadline_of"]
    if "deadline_ms" in fields:
        assert sent.deadline_ms == 500
        assert cost["deadline_met"] is True
    else:
        assert sent.deadline_ms is None


def test_sampling_reaches_the_worker(app: Any, worker: ScriptedWorker) -> None:
    ask(app, chat(temperature=0.5, top_p=0.9, seed=7, stop="x", max_completion_tokens=3))
    ask(app, chat(stop=["a", "b"]))
    first, second = (ask.sampling for ask in worker.asks)
    assert (first.temperature, first.top_p, first.seed, first.stop) == (0.5, 0.9, 7, ("x",))
    assert first.max_new_tokens == 3
    assert second.temperature == 0 and second.stop == ("a", "b")
    assert second.max_new_tokens == 128


def test_stream_ends_with_cost_and_done(app: Any) -> None:
    response = ask(app, chat(stream=True, plan=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "red and blue"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert [("fmray" in chunk) for chunk in chunks] == [False] * 4 + [True]
    assert chunks[-1]["fmray"]["plan"] == [True, False, True]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stream_with_usage_ends_with_usage(app: Any) -> None:
    chunks = events(ask(app, chat(stream=True, stream_options={"include_usage": True})))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert "fmray" in chunks[-1] and "fmray" not in chunks[-2]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry"),
    [
        (Shed("too much", 1.2), 429, "2"),
        (RateLimited("slow down", 0.1), 429, "1"),
        (DeadlineImpossible("not in time"), 503, None),
        (Unavailable("draining", 5.0), 503, "5"),
        (ValueError("budget is 0.1, less than the layers that always run"), 400, None),
    ],
)
def test_refusal_has_its_status_even_for_a_stream(
    app: Any,
    worker: ScriptedWorker,
    stream: bool,
    refusal: Exception,
    status: int,
    retry: str | None,
) -> None:
    worker.refuse = refusal
    response = ask(app, chat(stream=stream))
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    impossible = isinstance(refusal, DeadlineImpossible)
    assert response.headers.get("x-should-retry") == ("false" if impossible else None)
    error = response.json()["error"]
    assert error["message"]
    if not isinstance(refusal, Unavailable):
        assert error["message"] == str(refusal)
    assert set(error) == {"message", "type", "param", "code"}
    if isinstance(refusal, Shed | RateLimited):
        assert error["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_request_refused_in_the_queue(app: Any, worker: ScriptedWorker, stream: bool) -> None:
    worker.refuse_queued = DeadlineImpossible("became impossible")
    response = ask(app, chat(stream=stream, deadline_ms=1000, strict=True))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_impossible"


def test_model_failure_is_reported_without_the_prompt(
    app: Any, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.last = "error"
    response = ask(app, chat(text="secret words"))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "model_error"
    streamed = events(ask(app, chat(text="secret words", stream=True)))
    assert streamed[-1]["error"]["code"] == "model_error"
    for text in (response.text, json.dumps(streamed), caplog.text):
        assert "secret" not in text and "prompt text" not in text
    assert "(broken)" in caplog.text, "the log does not name the failure"


def test_timeout_headers_of_clients_are_ignored(
    build_app: Callable[..., Any], worker: ScriptedWorker
) -> None:
    worker.hold = threading.Event()
    app = build_app(worker, request_timeout_s=0.4)
    start = time.monotonic()
    response = ask(
        app,
        chat(),
        **{"x-request-timeout-seconds": "1000", "x-request-disconnect-disabled": "?1"},
    )
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"
    assert time.monotonic() - start < 5
    assert worker.cancelled == [worker.asks[0].id], "the row was not freed"
    streamed = events(ask(app, chat(stream=True)))
    assert streamed[-1]["error"]["code"] == "request_timeout"
    assert len(worker.cancelled) == 2


def test_strict_deadline_ends_the_answer(app: Any, worker: ScriptedWorker) -> None:
    worker.hold = threading.Event()
    response = ask(app, chat(deadline_ms=300, strict=True))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_missed"
    assert response.headers["x-should-retry"] == "false"
    assert worker.cancelled == [worker.asks[0].id]


def test_missed_deadline_is_reported(app: Any, worker: ScriptedWorker) -> None:
    worker.pause = 0.1
    cost = ask(app, chat(deadline_ms=20)).json()["fmray"]
    assert cost["deadline_met"] is False and cost["measured_ms"] > 20


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_client_frees_its_row(app: Any, worker: ScriptedWorker, stream: bool) -> None:
    worker.hold = threading.Event()

    async def run() -> float:
        disconnect = asyncio.Event()
        task = asyncio.create_task(post_in_memory(app, chat(stream=stream), disconnect))
        async with asyncio.timeout(10):
            while not worker.asks:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not worker.cancelled
        disconnect.set()
        start = time.monotonic()
        await asyncio.wait_for(task, 5)
        return time.monotonic() - start

    assert asyncio.run(run()) < 1
    assert worker.cancelled == [worker.asks[0].id]


def test_cancelled_handler_frees_its_row(app: Any, worker: ScriptedWorker) -> None:
    """Ray Serve cancels the handler when its proxy sees the client disconnect."""
    worker.hold = threading.Event()

    async def run() -> None:
        async with client_of(app) as client:
            task = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
            async with asyncio.timeout(10):
                while not worker.asks:
                    await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert worker.cancelled == [worker.asks[0].id]
