"""The endpoint on three machines, a replica on each, and one machine that fails under load."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from support.machines import Machine, Machines, until
from support.serving import Load, chat, data_url, encoded_image, make_model_directory

from fmray.config.serve import ServeConfig
from fmray.serve.replica import load_chat_model

KEY = "sk-0123456789abcdef"
PORT = 8000
REPLICA = "ray::ServeReplica:fmray:replica"
COLORS = ("red", "green", "blue", "white")
TOKENS = 24
CLIENT_SECONDS = 10.0  # how long a client waits for an answer


def ask(machine: Machine, color: str) -> httpx.Response:
    """A question through the proxy of a machine; the answer depends on the picture alone."""
    body = chat(data_url(encoded_image(color=color)), max_tokens=TOKENS, budget="1")
    return httpx.post(
        f"http://{machine.address}:{PORT}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=CLIENT_SECONDS,
    )


def text_of(body: str) -> str:
    return json.loads(body)["choices"][0]["message"]["content"]


def ready(machines: list[Machine]) -> bool:
    """Whether all their proxies answer questions."""
    try:
        return all(ask(machine, "red").status_code == 200 for machine in machines)
    except httpx.TransportError:
        return False


def replicas(machines: Machines) -> list[int]:
    """How many are on each machine."""
    return [len(machine.find(REPLICA)) for machine in machines.machines]


@pytest.fixture
def endpoint(folder: Path, machines: Machines) -> Iterator[Machines]:
    """Three replicas; the model is in a folder that all machines see."""
    keys = folder / "keys.yaml"
    keys.write_text(f"- {{name: alice, key: {KEY}}}\n", encoding="utf-8")
    model = make_model_directory(folder / "tiny")
    arguments = {
        "model": str(model),
        "name": "tiny",
        "keys_file": str(keys),
        "calibration": str(folder / "cost.json"),
        "calibration_s": 2,
        "min_replicas": 3,
        "max_replicas": 3,
        "cpus": 0.5,
        "threads": 1,
        "max_rows": 4,
        "kv_mib": 16,
        "health_period_s": 1,
        "health_timeout_s": 20,
    }
    # measured once, here, so that replicas start at once
    load_chat_model(ServeConfig.model_validate(arguments), model).close()
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [
            {
                "name": "fmray",
                "route_prefix": "/",
                "import_path": "fmray.serve.app:build",
                "args": arguments,
            }
        ],
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", str(path)]
    job = machines.run(command, "serve")
    assert job.wait(600) == 0, job.text()
    until(lambda: ready(machines.machines), 600, "the endpoint")
    yield machines
    # `serve shutdown` asks the dashboard, which there is none of
    stop = "import ray, ray.serve; ray.init(); ray.serve.shutdown()"
    machines.run([sys.executable, "-c", stop], "serve-shutdown").wait(120)
    until(lambda: sum(replicas(machines)) == 0, 60, "the replicas to end")


def test_a_machine_fails_under_load(endpoint: Machines, figure: Callable[[str], None]) -> None:
    """Questions through the others fail only until Serve has noticed; what is answered is right."""
    machines = endpoint
    until(lambda: replicas(machines) == [1, 1, 1], 60, "a replica on each machine")
    wanted = {color: text_of(ask(machines.head, color).text) for color in COLORS}
    lost = machines.machines[-1]
    asked_of = 2 * machines.machines  # two clients each

    def question(client: int, number: int) -> httpx.Response:
        return ask(asked_of[client], COLORS[number % len(COLORS)])

    with Load(len(asked_of), question) as load:
        time.sleep(4)
        killed = time.monotonic()
        lost.lose_power()
        others = machines.machines[:-1]
        until(lambda: sum(replicas(machines)) == 3, 240, "the third replica elsewhere")
        until(lambda: ready(others), 60, "the endpoint")
        time.sleep(4)
    before = [answer for answer in load.answers if answer.end < killed]
    assert len(before) > 10 and all(answer.status == 200 for answer in before)
    for answer in load.answers:
        if answer.status == 200:
            assert text_of(answer.text) == wanted[COLORS[answer.number % len(COLORS)]]
        else:
            assert answer.status in (0, 500, 503), answer
            assert "Traceback" not in answer.text
    failed = [answer for answer in load.failures if asked_of[answer.client] is not lost]
    after = [a for a in load.answers if asked_of[a.client] is not lost and a.end > killed]
    lasted = max((answer.end - killed for answer in failed), default=0.0)
    figure(
        f"through the other machines {len(failed)} of {len(after)} questions failed"
        f" ({sorted({(a.status, a.text[:60]) for a in failed})}), the last {lasted:.1f} s after it"
    )
    assert lasted < 60
