"""An endpoint under attack: what another caller notices, and whether memory comes back.

    PYTHONPATH=tests python benchmarks/hostile.py [--turns 4] [--model DIRECTORY]

Starts `fmray serve --local` with a tiny model (or the one given) and two keys. One caller asks with
and without images, in turns: in quiet, while the other sends the hostile inputs of
`tests/support/hostile.py` at five a second, and while he sends them one after the other without a
pause, which takes all that the machine has left.
Prints the wrong outcomes, the first caller's latencies in each phase and their ratios to those in
quiet, the inputs that held him up longest, his failures, and the memory of the server and of its
processes before and after.

Then compares the latency of a JPEG of 1000 x 800 pixels decoded in a process of the pool with that
in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image
from support.hostile import Sent, attack
from support.serving import (
    Answer,
    Load,
    chat,
    data_url,
    encoded_image,
    make_model_directory,
    wait_until,
)

from fmray.serve.image_pool import ImageProcess
from fmray.serve.images import read_images

TURN_SECONDS = 8.0
PAUSE = 0.2  # seconds between the inputs of the slow attack
ALICE, MALLORY = "sk-alice-0123456789", "sk-mallory-0123456789"


@contextlib.contextmanager
def server(model: Path, name: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run `fmray serve --local` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c", "import sys; from fmray.cli import main; sys.exit(main())",
        "serve", str(model), "--local", "--port", str(port),
        "--set", f"name={name}", "--set", "allowed_hosts=fmray.test", "--set", "calibration_s=3",
    ]  # fmt: skip
    keys = {"FMRAY_API_KEYS": f"{ALICE},{MALLORY}"}
    process = subprocess.Popen(command, env=os.environ | keys, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/readyz", timeout=30).status_code == 200
        return False

    try:
        wait_until(ready, 120, "the server")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def memory(process: psutil.Process) -> tuple[float, float]:
    """Return the MiB of the server and of all its children."""
    children = [child.memory_info().rss for child in process.children(recursive=True)]
    return process.memory_info().rss / 2**20, sum(children) / 2**20


def quantiles(answers: list[Answer], kind: int) -> tuple[float, float]:
    """Return p50 and p95 in milliseconds; kind: 0 for texts, 1 for images."""
    seconds = [answer.end - answer.start for answer in answers if answer.number % 2 == kind]
    parts = statistics.quantiles(seconds, n=20)
    return 1e3 * parts[9], 1e3 * parts[18]


def attacks(url: str, seconds: float) -> list[Sent]:
    """Send all hostile inputs one after the other, again until the time is up."""
    end, sent = time.monotonic() + seconds, []
    while time.monotonic() < end:
        sent += attack(url, MALLORY)
    return sent


def held_up(sent: Sent, answers: list[Answer]) -> float:
    """Return the longest wait, in ms, of the questions that an input may have held up."""
    near = [a for a in answers if a.end > sent.start and a.start < sent.end + 0.02]
    return 1e3 * max((a.end - a.start for a in near), default=0.0)


def measure(url: str, name: str, process: psutil.Process, turns: int) -> None:
    """Print the table of both phases."""
    image = data_url(encoded_image((640, 480), "green", "JPEG"), "image/jpeg")
    headers = {"authorization": f"Bearer {ALICE}"}
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:

        def ask(_: int, number: int) -> httpx.Response:
            body = chat(*([image] if number % 2 else []), max_tokens=8, budget="1")
            return client.post("/v1/chat/completions", json=body | {"model": name})

        def phase(work: Callable[[], object]) -> list[Answer]:
            with Load(1, ask, pause=0.02) as load:
                work()
            return load.answers

        phase(lambda: time.sleep(5))  # warms the caches
        attack(url, MALLORY)
        before = memory(process)
        # Phases in turns: the machine's speed changes. The attacker is a process of its own with
        # the lowest priority, for it would be on another machine.
        phases: dict[str, list[Answer]] = {"quiet": [], "5 a second": [], "no pause": []}
        sent: list[Sent] = []
        slow: list[Sent] = []
        with multiprocessing.get_context("spawn").Pool(1, os.nice, (19,)) as pool:
            pool.apply(attacks, (url, 0.0))
            for _ in range(turns):
                phases["quiet"] += phase(lambda: time.sleep(TURN_SECONDS))
                phases["5 a second"] += phase(
                    lambda: slow.extend(pool.apply(attack, (url, MALLORY, PAUSE)))
                )
                phases["no pause"] += phase(
                    lambda: sent.extend(pool.apply(attacks, (url, TURN_SECONDS)))
                )
        after = memory(process)
        ready = client.get("/readyz").status_code
    wrong = [(one.name, one.wrong) for one in slow + sent if one.wrong]
    names = {one.name for one in slow}
    print(f"{len(names)} hostile inputs, sent {len(slow) + len(sent)} times; wrong: {wrong}")
    for number, kind in enumerate(("text", "image")):
        calm = quantiles(phases["quiet"], number)
        for name, answers in phases.items():
            p50, p95 = quantiles(answers, number)
            print(
                f"{kind:6s} {name:11s} p50 {p50:5.0f} ms ({p50 / calm[0]:.2f} x)"
                f"  p95 {p95:5.0f} ms ({p95 / calm[1]:.2f} x)"
            )
    waits = {
        name: statistics.median(
            held_up(one, phases["5 a second"]) for one in slow if one.name == name
        )
        for name in names
    }
    for name in sorted(names, key=waits.__getitem__, reverse=True)[:5]:
        print(f"held up longest, ms: {waits[name]:5.0f}  {name}")
    failures = [sum(answer.status != 200 for answer in part) for part in phases.values()]
    print(f"failures of the other caller: {failures}; readyz {ready}")
    print("MiB before: server {:.0f}, children {:.0f}".format(*before))
    print("MiB after:  server {:.0f}, children {:.0f}".format(*after))


def decode_cost(repeats: int = 100) -> None:
    """Print the latency of an ordinary image in a process and in this one, in turns."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((1000, 800), Image.Resampling.BICUBIC)
    with tempfile.TemporaryFile() as file:
        photograph.save(file, "JPEG", quality=88)
        file.seek(0)
        url = data_url(file.read(), "image/jpeg")
    process = ImageProcess(seconds=20, memory_mib=1536)
    process.wait()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for taken, decode in zip(times, (read_images, process.decode), strict=True):
            start = time.perf_counter()
            decode([url], 16_000_000)
            taken.append(time.perf_counter() - start)
    process.close()
    for name, taken in zip(("in this process", "in a process of the pool"), times, strict=True):
        least, median = 1e3 * min(taken), 1e3 * statistics.median(taken[5:])
        print(f"JPEG of 1000 x 800 {name}: median {median:.1f} ms, least {least:.1f} ms")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=4, help="of a quiet phase and an attack")
    parser.add_argument("--model", type=Path, default=None, help="model directory; default: tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model_directory(Path(folder) / "tiny")
        with server(model, "tiny") as (url, process):
            measure(url, "tiny", process, options.turns)
    decode_cost()


if __name__ == "__main__":
    main()
