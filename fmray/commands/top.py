"""`fmray top RUN`: what a training run is doing, in the terminal.

In: a run's folder, or its id and the storage. Out: a live picture until the run ends; a line now
and then where stdout is no terminal; or one JSON object. It reads what the run writes, and asks Ray
whether the workers live, where Ray answers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fmray.runtime.run_log import EVENTS, STATUS_FILE, RunReader, View, read_status

REFRESH_SECONDS = 1.0
LINE_SECONDS = 10.0
ASK_SECONDS = 3.0  # Ray, between one answer and the next question
ANSWER_SECONDS = 20.0  # to `--once`, the start of a process included
GONE_SECONDS = 600.0  # after which nobody waits for a run that has failed or died
OVER = {"finished", "stopped"}
COLORS = {"running": "green", "finished": "green", "stopped": "yellow", "unknown": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fmray top`."""
    parser.add_argument("name", type=Path, metavar="RUN", help="folder of a run, or its id")
    parser.add_argument(
        "--storage", type=Path, default=Path("runs"), help="where an id is looked up (runs)"
    )
    parser.add_argument("--once", action="store_true", help="print once, as it is now")
    parser.add_argument("--json", action="store_true", help="once, as a JSON object")


def run(arguments: argparse.Namespace) -> None:
    """`fmray top`. Raises ValueError where there is no such run."""
    run_dir = find_run(arguments.name, arguments.storage)
    reader = RunReader(run_dir)
    with ray_workers(run_dir) as asked:
        if arguments.json or arguments.once:
            view = reader.read(asked.first())
            print(json.dumps(asdict(view)) if arguments.json else "\n".join(lines(view)))
        elif sys.stdout.isatty():
            with Live(picture(reader.read()), auto_refresh=False) as live:
                while not over(view := reader.read(asked.latest())):
                    live.update(picture(view), refresh=True)
                    time.sleep(REFRESH_SECONDS)
                live.update(picture(view), refresh=True)
        else:
            while not over(view := reader.read(asked.latest())):
                print("  ".join(f"{name} {text}" for name, text in facts(view)), flush=True)
                time.sleep(LINE_SECONDS)
            print("\n".join(lines(view)))


def find_run(name: Path, storage: Path) -> Path:
    """The folder of a run. Raises ValueError where there is none."""
    for folder in (name, storage / name):
        if any((folder / file).is_file() for file in (STATUS_FILE, "log.jsonl", EVENTS)):
            return folder.absolute()
    raise ValueError(
        f"there is no run at {name} or {storage / name}; name its folder, or its id and --storage"
    )


def over(view: View) -> bool:
    """Whether there is nothing to wait for. What has failed or died may be started again, by the
    job's supervisor."""
    return view.state in OVER or (view.state != "running" and (view.quiet or 0.0) > GONE_SECONDS)


def facts(view: View) -> list[tuple[str, str]]:
    """What is known, as (name, text)."""
    found = [("run", view.run), ("state", view.state + (f": {view.why}" if view.why else ""))]
    of = f" of {view.total} ({view.step / view.total:.0%})" if view.total else ""
    found.append(("step", f"{view.step}{of}"))
    if view.left is not None:
        found.append(("left", duration(view.left)))
    found += [(name, f"{value:.4g}") for name, value in view.metrics.items()]
    if view.speed is not None:
        unit, value = view.speed
        found.append((f"{unit}/s", f"{value:.4g}"))
    if view.waiting_share is not None:
        found.append(("waiting for data", f"{view.waiting_share:.2%}"))
    if view.checkpoint is not None:
        step, age = view.checkpoint
        found.append(("checkpoint", f"step {step}, {duration(age)} ago"))
    if view.evaluation is not None:
        step, values = view.evaluation
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        found.append(("evaluation", f"step {step}: {text}"))
    found.append(("restarts", str(view.restarts)))
    if view.event is not None:
        moment, text = view.event
        found.append(("event", f"{time.strftime('%H:%M:%S', time.localtime(moment))} {text}"))
    if view.quiet is not None and view.state not in OVER:
        found.append(("last sign", f"{duration(view.quiet)} ago"))
    return found


def worker_rows(view: View) -> list[tuple[str, ...]]:
    """A row a rank, under the head (rank, node, process, CPUs, GPU, alive)."""
    words = {True: "yes", False: "no", None: "unknown"}
    return [
        (
            str(seen.worker.rank),
            seen.worker.host + (f" ({seen.worker.node[:8]})" if seen.worker.node else ""),
            str(seen.worker.pid),
            f"{seen.worker.cpus:g}",
            seen.worker.gpu or "-",
            words[seen.alive if view.state not in OVER else False],
        )
        for seen in view.workers
    ]


HEAD = ("rank", "node", "process", "CPUs", "GPU", "alive")


def lines(view: View) -> list[str]:
    """All of it in plain lines."""
    found = [f"{name:<16} {text}" for name, text in facts(view)]
    rows = [HEAD, *worker_rows(view)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEAD))]
    table = ["  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)) for row in rows]
    return [*found, *(table if view.workers else [])]


def picture(view: View) -> Group:
    """All of it for a terminal."""
    table = Table.grid(padding=(0, 2))
    for name, text in facts(view):
        style = COLORS.get(view.state, "red") if name == "state" else ""
        table.add_row(Text(name, "dim"), Text(text, style))
    workers = Table(*HEAD, box=None, padding=(0, 2), header_style="dim")
    for row in worker_rows(view):
        workers.add_row(*row, style="red" if row[-1] == "no" and view.state not in OVER else "")
    bar = ProgressBar(view.total, view.step, width=60) if view.total else Text("")
    return Group(table, bar, workers if view.workers else Text(""))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as many of them as it takes."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Asked:
    """What Ray says of a cluster's workers: (node, pid) of those that live, None: it was not
    reached."""

    def __init__(self, answers: Connection | None) -> None:
        self._answers = answers
        self._last: list[tuple[str, int]] | None = None

    def first(self) -> list[tuple[str, int]] | None:
        """Waits for an answer."""
        if self._answers is not None:
            self._answers.poll(ANSWER_SECONDS)
        return self.latest()

    def latest(self) -> list[tuple[str, int]] | None:
        """The last answer so far."""
        try:
            while self._answers is not None and self._answers.poll():
                self._last = self._answers.recv()
        except EOFError:  # the process that asks has ended: Ray is gone
            self._answers, self._last = None, None
        return self._last


@contextmanager
def ray_workers(run_dir: Path) -> Iterator[Asked]:
    """Ask from a process that can be ended: a client of Ray waits for minutes for a head that is
    gone, and then ends its process."""
    status = read_status(run_dir)
    if status is None or status.state == "ended" or not _answers(status.ray):
        yield Asked(None)
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_ask, args=(status.ray, sender), daemon=True)
    child.start()
    sender.close()  # the child's end alone stays open, so that its death is seen
    try:
        yield Asked(receiver)
    finally:
        child.kill()
        child.join()


def _answers(address: str | None) -> bool:
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _ask(address: str, answers: Connection) -> None:
    # what Ray says of a head that goes would run through the picture
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    from ray.util.state import list_actors

    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    while True:
        found = list_actors(address, filters=filters, limit=10_000, detail=True)
        answers.send([(actor.node_id, actor.pid) for actor in found])
        time.sleep(ASK_SECONDS)
