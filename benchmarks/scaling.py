"""Scaling of training over machines: measured on one to three, then projected to many GPUs.

    PYTHONPATH=tests python benchmarks/scaling.py [--megabits 200] [--steps 6] [--folder F]

Needs root: the machines are network namespaces, each behind a link limited to `--megabits` per
second each way (`tests/support/machines.py`, `tc tbf`). They run the training loop of
`jobs/train_adallava.py` with its loader, DeepSpeed and gloo, but without Ray, which only starts the
workers and assigns ranks; this avoids its heartbeats on the links and a minute of starts
(`support/ranks.py`). Each ZeRO stage runs on one machine, then on two and three with the same rows
per rank (weak) and with the same global batch (strong), with two accumulation passes each.

Three things are compared. Bytes: what a rank sends around a ring according to
`benchmarks/communication.py`, against what its eth0 has sent. Time: a step is split into
computation, communication (the shortest time that any rank was blocked in collectives, since the
others also wait for that rank) and waiting for data. Both together: a step predicted from
computation on one machine, the bytes and the link, against the measured step.

This cannot show a speed-up of computation, since the machines share the cores of one. Therefore the
model is small and the links are slow, so that communication dominates, and the prediction
multiplies computation by processes / cores if there are more processes than cores. Nothing overlaps
with computation: DeepSpeed waits for gloo's calls, and stage 3 is kept from prefetching and from
keeping gathered parameters (`scaling_rank.py`), as a model with billions of them would be.

At the end `projection.py` prints the projection for the 7B and 13B recipes.
`--folder` receives `scaling.json` (each step of each rank) and `scaling.txt` (the tables).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from communication import Volume, least, volume
from projection import projection
from support.machines import Machine, Machines, linked
from support.training import ADAPTIVE, load_recipe, make_store

from fmray.runtime.files import write_json

STAGES = (0, 1, 2, 3)
PASSES = 2
ROWS = 12  # of a rank's step on one machine
WARM_UP = 3  # steps; in the first two ZeRO-3 learns the order of the modules
WIDTHS = {"float32": 4, "bfloat16": 2}
MODEL = {
    "layers": 4,
    "hidden": 256,
    "heads": 4,
    "intermediate": 688,
    "vision_layers": 2,
    "vision_hidden": 128,
    "vision_heads": 2,
}
PAYLOAD = 1448 / 1514  # TCP's part of an Ethernet frame, all of which links and eth0 count
GLOO_REDUCE_SCATTER = 2  # times what a ring sends: measured, it sends what its all-reduce sends
CORES = len(os.sched_getaffinity(0))
IDLE_SECONDS = 3.0


@dataclass(frozen=True)
class Case:
    """One training run."""

    kind: str  #: one (machine), weak or strong
    stage: int  #: of ZeRO
    world_size: int
    rows: int  #: per rank and step


@dataclass(frozen=True)
class Row:
    """Measurements of a case: seconds per step, bytes per step and rank."""

    case: Case
    step: float
    computation: float
    communication: float
    data: float
    sent: float
    called: Volume
    model: Volume
    least: Volume

    @property
    def gloo_sent(self) -> float:
        """Bytes that a rank sends with gloo, whose reduce-scatter sends more than a ring."""
        model = self.model
        scattered = GLOO_REDUCE_SCATTER * model.reduce_scatter
        of_gloo = Volume(model.all_reduce, scattered, model.all_gather)
        return of_gloo.sent(self.case.world_size)


class Ranks:
    """A process on each machine that trains the cases it receives."""

    def __init__(self, machines: Machines) -> None:
        self._folder = machines.folder
        self._processes = [self._start(machines, machine) for machine in machines.machines]
        for process in self._processes:
            assert self._answer(process) == "ready"

    def _start(self, machines: Machines, machine: Machine) -> subprocess.Popen[str]:
        program = str(Path(__file__).with_name("scaling_rank.py"))
        environment = machines.environment()
        environment["PYTHONPATH"] += f":{Path(__file__).parents[1] / 'tests'}"
        with (machines.folder / f"rank-{machine.number}.log").open("w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", machine.name, sys.executable, program],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _answer(self, process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline()
        if not line:
            logs = sorted(self._folder.glob("rank-*.log"))
            raise SystemExit("\n".join(f"{log}: {log.read_text()[-3000:]}" for log in logs))
        return line.strip()

    def run(self, case: Case, config: dict[str, Any], steps: int) -> list[dict[str, Any]]:
        """Train a case; return the measurements of each rank."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            told = {**asdict(case), "config": config, "folder": folder}
            told |= {"steps": steps, "warm_up": WARM_UP}
            used = self._processes[: case.world_size]
            for rank, process in enumerate(used):
                process.stdin.write(json.dumps({**told, "rank": rank}) + "\n")
                process.stdin.flush()
            return [json.loads(self._answer(process)) for process in used]


def cases() -> Iterator[Case]:
    """Yield the cases, for each stage first one machine, from which the others are predicted."""
    for stage in STAGES:
        yield Case("one", stage, 1, ROWS)
        for world_size in (2, 3):
            yield Case("weak", stage, world_size, ROWS)
            yield Case("strong", stage, world_size, ROWS // world_size)


def idle(machines: Machines) -> float:
    """Return the bytes per second that a machine sends without training, to be subtracted."""

    def sent() -> int:
        links = [Path("/sys/class/net") / machine.name for machine in machines.machines]
        # what a machine has sent is what the other end of its link has received
        return sum(int((link / "statistics/rx_bytes").read_text()) for link in links)

    before = sent()
    time.sleep(IDLE_SECONDS)
    return (sent() - before) / IDLE_SECONDS / len(machines.machines)


def measured(case: Case, ranks: list[dict[str, Any]], width: int, noise: float) -> Row:
    """Return medians over the steps, but means of bytes, which are not sent evenly.

    Args:
        noise: bytes per second of an idle machine.
    """

    def median(rank: dict[str, Any], name: str) -> float:
        return statistics.median(step[name] for step in rank["steps"])

    held_up = [median(rank, "communication") for rank in ranks]
    slowest = ranks[held_up.index(min(held_up))]
    seconds, data = median(slowest, "seconds"), median(slowest, "data")
    called = slowest["steps"][-1]["called"]
    sizes = (slowest["trainable"], slowest["frozen"], width, PASSES)
    return Row(
        case,
        seconds,
        seconds - min(held_up) - data,
        min(held_up),
        data,
        statistics.mean(
            step["sent"] - noise * step["seconds"] for rank in ranks for step in rank["steps"]
        ),
        Volume(*(called.get(name, 0) for name in ("all_reduce", "reduce_scatter", "all_gather"))),
        volume(case.stage, *sizes),
        least(case.stage, *sizes),
    )


def predicted(row: Row, one: Row, link: float) -> float:
    """Return the seconds of a step, predicted from one machine, the bytes, and bytes per second."""
    busy = max(1.0, row.case.world_size / CORES)
    computation = one.computation * row.case.rows / one.case.rows * busy
    return computation + one.data + row.gloo_sent / PAYLOAD / link


def table(rows: Sequence[Row], megabits: float) -> list[str]:
    """Return the tables of bytes and of time, as lines of text."""
    lines = [
        "",
        "MB that a rank sends in a step. paper: what ZeRO needs; model: DeepSpeed's collectives,"
        " around a ring (and over those",
        "that it was seen to call); gloo: whose reduce-scatter is an all-reduce; frames: with their"
        " headers; eth0: measured",
        f"{'':16s}{'paper':>8s}{'model':>8s}{'model/called':>14s}{'gloo':>8s}{'frames':>8s}"
        f"{'eth0':>8s}{'eth0/frames':>13s}",
    ]
    several = [row for row in rows if row.case.world_size > 1]
    for row in several:
        world_size = row.case.world_size
        model, frames = row.model.sent(world_size), row.gloo_sent / PAYLOAD
        lines.append(
            f"{_name(row.case):16s}{row.least.sent(world_size) / 1e6:8.2f}{model / 1e6:8.2f}"
            f"{model / row.called.sent(world_size):14.4f}{row.gloo_sent / 1e6:8.2f}"
            f"{frames / 1e6:8.2f}{row.sent / 1e6:8.2f}{row.sent / frames:13.4f}"
        )
    link = megabits * 1e6 / 8
    lines += [
        "",
        f"seconds a step; links of {megabits:g} Mbit/s each way, {CORES} cores for all machines;"
        " link used: by eth0, in the time of communication",
        f"{'':16s}{'step':>8s}{'computation':>13s}{'communication':>15s}{'data':>8s}"
        f"{'link used':>11s}{'predicted':>11s}{'predicted/step':>16s}",
    ]
    ones = {row.case.stage: row for row in rows if row.case.kind == "one"}
    for row in rows:
        line = (
            f"{_name(row.case):16s}{row.step:8.3f}{row.computation:13.3f}{row.communication:15.3f}"
            f"{row.data:8.3f}"
        )
        if row in several:
            wanted = predicted(row, ones[row.case.stage], link)
            used = row.sent / row.communication / link
            line += f"{used:11.2f}{wanted:11.3f}{wanted / row.step:16.3f}"
        lines.append(line)
    return lines


def _name(case: Case) -> str:
    return f"ZeRO-{case.stage} {case.world_size} {case.kind}"


def measure(machines: Machines, folder: Path, megabits: float, steps: int, dtype: str) -> list[str]:
    """Run all cases; return the lines of the tables."""
    recipe = load_recipe(folder / "store", folder / "runs", model={"scratch": MODEL})
    store = make_store(folder, recipe.recipe)
    machines.cap(megabits)
    ranks = Ranks(machines)
    noise = idle(machines)
    print(f"links: {megabits:g} Mbit/s each way; idle, a machine sends {noise:.0f} B/s", flush=True)
    rows, kept = [], []
    for case in cases():
        loaded = load_recipe(
            store,
            folder / "runs",
            model={"scratch": MODEL, "freeze": ["vision"], "dtype": dtype},
            adaptive=ADAPTIVE,
            zero={"stage": case.stage, "parameter_persistence": 0},
            train={
                "steps": 10 * (WARM_UP + steps),
                "global_batch": case.rows * case.world_size,
                "micro_batch": case.rows // PASSES,
            },
            cluster={"workers": case.world_size, "cpus_per_worker": 1},
        )
        name = f"{dtype}-{case.kind}-{case.stage}-{case.world_size}"
        (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
        config = {"recipe": loaded.recipe.model_dump_json(), "run_id": name}
        began = time.monotonic()
        found = ranks.run(case, config, steps)
        rows.append(measured(case, found, WIDTHS[dtype], noise))
        kept.append({"case": asdict(case), "ranks": found})
        row = rows[-1]
        print(
            f"{_name(case):18s} {row.step:.3f} s a step, {row.sent / 1e6:.2f} MB sent a rank"
            f" ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    settings = {"megabits": megabits, "dtype": dtype, "idle_bytes_per_second": noise}
    write_json(folder / "scaling.json", {**settings, "cases": kept})
    return table(rows, megabits)


def main() -> int:
    """Parse the command line, measure, and print tables and projection."""
    parser = argparse.ArgumentParser(description="Weak and strong scaling, measured and predicted.")
    parser.add_argument("--megabits", type=float, default=200.0, help="of a link, each way (200)")
    parser.add_argument("--steps", type=int, default=6, help="measured in each case (default 6)")
    parser.add_argument("--dtype", choices=WIDTHS, default="float32")
    parser.add_argument("--folder", type=Path, help="for results (default: a temporary one)")
    options = parser.parse_args()
    if options.megabits <= 0 or options.steps < 1:
        parser.error("--megabits and --steps must be positive")
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="scaling-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"results in {folder}", flush=True)
    with linked(folder / "m") as machines:
        lines = measure(machines, folder, options.megabits, options.steps, options.dtype)
    lines += ["", *projection()]
    print("\n".join(lines), flush=True)
    (folder / "scaling.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
