"""The endpoint under open-loop load: fixed budgets against `auto`, on Ray Serve on loopback.

    fmray quickstart                                         # makes the model and the questions
    python benchmarks/serve_load.py [--quickstart fmray-quickstart] [--seconds 20]

Poisson arrivals at multiples of the measured full-budget capacity, and a burst trace, for budget 1,
budget 0.6 and `auto`: share of requests whose first token came within the target (SLO attainment;
refused ones count as missed), p50 and p95 of the time to first token, goodput (answers within the
target per second), mean budget, accuracy, refusals. Also prints what Serve adds to a request over
the bare engine.

The quickstart's model is too small to be slowed down by load. Its MLPs are padded with channels of
zeros (`--width`): the answers stay the same at the cost of a larger model. The client runs on the
same machine and uses part of its CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.config.serve import ServeConfig
from fmray.data.processor import load_processor
from fmray.serve.replica import ChatModel, load_chat_model

LOADS = (0.5, 0.9, 1.2, 1.5, 2.0, 3.0)
MODES = {"b=1": {"budget": "1"}, "b=0.6": {"budget": "0.6"}, "auto": {}}


@dataclass(frozen=True)
class Question:
    """A body to send, without its budget, and the right answer."""

    body: dict[str, Any]
    answer: str


@dataclass
class Outcome:
    """The outcome of one request; seconds since it was due."""

    status: int
    first: float | None = None
    whole: float | None = None
    budget: float | None = None
    right: bool | None = None
    server_ms: float | None = None


def widened(source: Path, target: Path, width: int) -> Path:
    """The model of `source` with MLPs of `width` channels, the new ones zero: the same function."""
    model, processor = AdaptiveVLM.from_pretrained(source), load_processor(source)
    config = model.backbone.config
    with torch.no_grad():
        for layer in model.backbone.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                old = getattr(layer.mlp, name)
                inside = name == "down_proj"
                shape = (config.hidden_size, width) if inside else (width, config.hidden_size)
                new = nn.Linear(shape[1], shape[0], bias=False)
                new.weight.zero_()
                new.weight[: old.weight.shape[0], : old.weight.shape[1]] = old.weight
                setattr(layer.mlp, name, new)
    config.intermediate_size = width
    layout = SwitchLayout.layers(config, first=model.layout.first)
    wide = AdaptiveVLM(model.base, layout, model.latency_token, model.scheduler_kind)
    wide.latency_encoder.load_state_dict(model.latency_encoder.state_dict())
    if model.scheduler is not None:
        wide.scheduler.load_state_dict(model.scheduler.state_dict())
    wide.save_pretrained(target)
    processor.save_pretrained(target)
    return target


def read_questions(folder: Path, count: int) -> list[Question]:
    """Validation questions of the quickstart: first turns, with their images."""
    questions = []
    for record in json.loads((folder / "validation.json").read_text())[:count]:
        human, gpt = record["conversations"][:2]
        encoded = base64.b64encode((folder / record["image"]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
            {"type": "text", "text": human["value"].replace("<image>", "").strip()},
        ]
        body = {"model": "bench", "messages": [{"role": "user", "content": content}]}
        questions.append(Question(body | {"max_tokens": 8}, gpt["value"]))
    return questions


async def ask(
    client: httpx.AsyncClient, question: Question, fields: dict[str, Any], due: float
) -> Outcome:
    """Stream one answer. due: `perf_counter` of when it should have been sent."""
    outcome, text = Outcome(0), ""
    body = question.body | {"stream": True} | fields
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            outcome.status = response.status_code
            if response.status_code != 200:
                await response.aread()
                return outcome
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    outcome.status = 599
                    return outcome
                now = time.perf_counter() - due
                for choice in event["choices"]:
                    piece = choice["delta"].get("content")
                    text += piece or ""
                    if outcome.first is None and (piece or choice["finish_reason"]):
                        outcome.first = now
                if "fmray" in event:
                    outcome.whole = now
                    outcome.budget = event["fmray"]["budget"]
                    outcome.server_ms = event["fmray"]["answer_ms"]
    except httpx.TransportError:
        outcome.status = 598
        return outcome
    outcome.right = text.strip() == question.answer
    return outcome


async def open_loop(
    url: str, questions: Sequence[Question], fields: dict[str, Any], arrivals: Sequence[float]
) -> list[Outcome]:
    """Send a request at each of `arrivals` (seconds), whatever became of those before."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        start = time.perf_counter() + 0.2

        async def one(number: int, at: float) -> Outcome:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            return await ask(client, questions[number % len(questions)], fields, start + at)

        return await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals)))


async def closed_loop(
    url: str, questions: Sequence[Question], rows: int, seconds: float, budget: str = "1"
) -> float:
    """Answers a second with `rows` requests always under way."""
    answered = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        end = time.perf_counter() + seconds
        numbers = iter(range(10**9))

        async def run() -> None:
            nonlocal answered
            while (now := time.perf_counter()) < end:
                question = questions[next(numbers) % len(questions)]
                outcome = await ask(client, question, {"budget": budget}, now)
                if outcome.status == 200:
                    answered += 1
                else:
                    await asyncio.sleep(0.05)

        start = time.perf_counter()
        await asyncio.gather(*(run() for _ in range(rows)))
        return answered / (time.perf_counter() - start)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process that has just as many as expected: given their number
    they are uniform. A short trace would else be a tenth or more off the load that it is named
    after."""
    source = random.Random(seed)
    return sorted(source.uniform(0.0, seconds) for _ in range(round(rate * seconds)))


def burst(capacity: float, seconds: float, seed: int) -> list[float]:
    """0.6 of capacity, with 2.5 times capacity in the middle fifth."""
    middle = (0.4 * seconds, 0.6 * seconds)
    calm = [at for at in poisson(0.6 * capacity, seconds, seed) if not middle[0] <= at < middle[1]]
    busy = [middle[0] + at for at in poisson(2.5 * capacity, 0.2 * seconds, seed + 1)]
    return sorted(calm + busy)


def report(name: str, mode: str, outcomes: list[Outcome], target: float, seconds: float) -> None:
    """One line of the table."""
    first = sorted(one.first for one in outcomes if one.first is not None)
    within = sum(value <= target for value in first)
    budgets = [one.budget for one in outcomes if one.budget is not None]
    right = [one.right for one in outcomes if one.right is not None]
    refused = sum(one.status in (429, 503) for one in outcomes)
    failed = sum(one.status not in (200, 429, 503) for one in outcomes)

    def quantile(share: float) -> float:
        return 1e3 * first[min(len(first) - 1, int(share * len(first)))] if first else float("nan")

    print(
        f"{name:7s} {mode:6s} {len(outcomes):6d} {100 * within / len(outcomes):7.1f} "
        f"{quantile(0.5):8.0f} {quantile(0.95):8.0f} {within / seconds:8.2f} "
        f"{statistics.fmean(budgets) if budgets else float('nan'):7.3f} "
        f"{100 * statistics.fmean(right) if right else float('nan'):6.1f} {refused:7d} {failed:6d}",
        flush=True,
    )


async def bare_engine(chat_model: ChatModel, question: Question) -> float:
    """Seconds of the worker alone: the prompt made before, from submit to the last event."""
    from fmray.serve.openai import ChatRequest
    from fmray.serve.replica import Generation

    request = ChatRequest.model_validate(question.body | MODES["b=1"] | {"max_tokens": 8})
    prepared = chat_model.prompts.build(request, "bare")
    start = time.perf_counter()
    generation = Generation(chat_model, prepared, time.monotonic())
    while generation.ended is None:
        await generation.next()
    return time.perf_counter() - start


class Empty:
    """The peer: a Serve application that reads the body and answers nothing."""

    async def __call__(self, request: Any) -> bytes:
        await request.body()
        return b"{}"


@dataclass(frozen=True)
class Turn:
    """The same kind of request: engine alone, endpoint in one piece, and streamed; and the same
    body to a Serve application that does nothing."""

    bare: float
    whole: float
    streamed: Outcome
    empty: float


async def in_turns(
    chat_model: ChatModel, url: str, questions: Sequence[Question], count: int
) -> list[Turn]:
    """One request after the other: a machine that slows down slows all three."""
    turns = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for number in range(-10, count):
            bare = await bare_engine(chat_model, questions[3 * number])
            start = time.perf_counter()
            body = questions[3 * number + 1].body | MODES["b=1"]
            response = await client.post("/v1/chat/completions", json=body)
            whole = time.perf_counter() - start
            start = time.perf_counter()
            await client.post("/empty", json=body)
            empty = time.perf_counter() - start
            question = questions[3 * number + 2]
            streamed = await ask(client, question, MODES["b=1"], time.perf_counter())
            assert response.status_code == streamed.status == 200, "the endpoint does not answer"
            if number >= 0:
                turns.append(Turn(bare, whole, streamed, empty))
    return turns


def added(name: str, turns: Sequence[Turn], seconds: Sequence[float]) -> str:
    """What the endpoint adds to a request, over the engine's time in the same turn."""
    low, middle, high = statistics.quantiles(
        [1e3 * (one - turn.bare) for one, turn in zip(seconds, turns, strict=True)], n=4
    )
    return f"{name}: {middle:.1f} ms added (bar 15; middle half {low:.1f} to {high:.1f})"


def deploy(settings: ServeConfig) -> None:
    """Deploy, or update."""
    from ray import serve

    from fmray.serve.app import build

    serve.run(build(settings), name="fmray", route_prefix="/")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("fmray-quickstart"))
    parser.add_argument("--width", type=int, default=32768, help="channels of the padded MLPs")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--turns", type=int, default=80, help="requests for what Serve adds")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--p95-ms", type=float, default=None, help="default: 8 x unloaded p50")
    parser.add_argument("--loads", type=float, nargs="*", default=list(LOADS))
    options = parser.parse_args()
    model = options.quickstart / "adaptive" / "model"
    if not model.is_dir():
        parser.error(f"{model} is missing; run `fmray quickstart` first")
    questions = read_questions(options.quickstart / "store" / "source", 2000)
    with tempfile.TemporaryDirectory(prefix="fmray-load-") as folder:
        wide = widened(model, Path(folder) / "model", options.width)
        for line in measure(wide, questions, Path(folder), options):
            print(line, flush=True)


def measure(
    model: Path, questions: list[Question], folder: Path, options: argparse.Namespace
) -> Iterator[str]:
    """Everything, one line after the other."""
    import ray
    from ray import serve

    settings = ServeConfig(
        model=str(model),
        name="bench",
        calibration=folder / "cost.json",
        max_rows=options.rows,
        max_queued_requests=2000,
        max_queue=2000,
        threads=1,
        cpus=1,
        p95_ms=options.p95_ms or 2000.0,
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chat_model = load_chat_model(settings, model)  # measures the machine, too
    parameters = sum(p.numel() for p in chat_model.model.backbone.layers.parameters())
    yield f"decoder of {parameters / 1e6:.0f} M parameters, {options.rows} rows, 1 torch thread"

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(settings)
        serve.run(serve.deployment(Empty).bind(), name="empty", route_prefix="/empty")
        turns = asyncio.run(in_turns(chat_model, url, questions, options.turns))
        chat_model.close()
        serve.delete("empty")
        empty = statistics.median(turn.empty for turn in turns)
        alone = statistics.median(turn.bare for turn in turns)
        yield (
            f"one request after the other, p50: engine alone {1e3 * alone:.1f} ms; an empty Serve "
            f"application {1e3 * empty:.1f} ms"
        )
        yield added("in one piece", turns, [turn.whole for turn in turns])
        yield added("streamed", turns, [turn.streamed.whole for turn in turns])
        yield added("in the replica", turns, [turn.streamed.server_ms / 1e3 for turn in turns])
        asyncio.run(closed_loop(url, questions, options.rows, 3.0))
        capacity = asyncio.run(closed_loop(url, questions, options.rows, 12.0))
        floor = asyncio.run(closed_loop(url, questions, options.rows, 12.0, settings.floor))
        first = statistics.median(turn.streamed.first for turn in turns)
        target = options.p95_ms or 8e3 * first
        settings = settings.model_copy(update={"p95_ms": target})
        deploy(settings)
        yield (
            f"capacity at budget 1: {capacity:.2f} answers/s, at the floor of {settings.floor} "
            f"{floor:.2f}: {floor / capacity:.2f}x; target: first token {target:.0f} ms"
        )
        yield (
            "load    mode     sent   SLO %   p50 ms   p95 ms  goodput  budget  right refused failed"
        )
        traces = {
            f"{load:g}": poisson(load * capacity, options.seconds, 7) for load in options.loads
        }
        traces["burst"] = burst(capacity, 2 * options.seconds, 7)
        for name, arrivals in traces.items():
            seconds = options.seconds * (2 if name == "burst" else 1)
            for mode, fields in MODES.items():
                outcomes = asyncio.run(open_loop(url, questions, fields, arrivals))
                report(name, mode, outcomes, target / 1e3, seconds)
                time.sleep(3.0)  # the level of `auto` comes back up
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
