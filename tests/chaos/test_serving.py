"""The endpoint on three machines, a replica on each, and one machine that fails under load."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from support.machines import Machine, Machines, until
from support.serving import chat, data_url, make_model_directory, picture

from fmray.serve.replica import open_answerer
from fmray.serve.settings import ServeConfig

KEY = "sk-0123456789abcdef"
PORT = 8000
REPLICA = "ray::ServeReplica:fmray:replica"
COLORS = ("red", "green", "blue", "white")
TOKENS = 24
CLIENT_SECONDS = 10.0  # how long a client waits for an answer


def ask(machine: Machine, color: str) -> httpx.Response:
    """A question through the proxy of a machine; the answer depends on the picture alone."""
    body = chat(data_url(picture(color=color)), max_tokens=TOKENS, budget="1")
    return httpx.post(
        f"http://{machine.address}:{PORT}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=CLIENT_SECONDS,
    )


def text_of(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


@dataclass(frozen=True)
class Asked:
    """One question. status: 0 where no answer came, and then text is the error's name."""

    machine: Machine
    color: str
    start: float
    end: float
    status: int
    text: str


class Load:
    """A client for each machine's proxy, which asks one question after the other."""

    def __init__(self, machines: Machines) -> None:
        self.asked: list[Asked] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(2 * len(machines.machines))
        self._runs = [self._pool.submit(self._run, m) for m in 2 * machines.machines]

    def _run(self, machine: Machine) -> None:
        number = 0
        while not self._over.is_set():
            color, start = COLORS[number % len(COLORS)], time.monotonic()
            try:
                response = ask(machine, color)
                status = response.status_code
                text = text_of(response) if status == 200 else response.text
            except httpx.TransportError as error:
                status, text = 0, type(error).__name__
                time.sleep(0.2)
            self.asked.append(Asked(machine, color, start, time.monotonic(), status, text))
            number += 1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()


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
    open_answerer(ServeConfig.model_validate(arguments), model).close()
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
    wanted = {color: text_of(ask(machines.head, color)) for color in COLORS}
    lost = machines.machines[-1]
    with Load(machines) as load:
        time.sleep(4)
        killed = time.monotonic()
        lost.lose_power()
        others = machines.machines[:-1]
        until(lambda: sum(replicas(machines)) == 3, 240, "the third replica elsewhere")
        until(lambda: ready(others), 60, "the endpoint")
        time.sleep(4)
    before = [asked for asked in load.asked if asked.end < killed]
    assert len(before) > 10 and all(asked.status == 200 for asked in before)
    for asked in load.asked:
        if asked.status == 200:
            assert asked.text == wanted[asked.color]
        else:
            assert asked.status in (0, 500, 503), asked
            assert "Traceback" not in asked.text
    failed = [asked for asked in load.asked if asked.status != 200 and asked.machine is not lost]
    after = [asked for asked in load.asked if asked.machine is not lost and asked.end > killed]
    lasted = max((asked.end - killed for asked in failed), default=0.0)
    figure(
        f"through the other machines {len(failed)} of {len(after)} questions failed"
        f" ({sorted({(a.status, a.text[:60]) for a in failed})}), the last {lasted:.1f} s after it"
    )
    assert lasted < 60
