"""`fmray top RUN`: shows what a training run is doing.

In a terminal: a live view until the run ends; elsewhere a line every ten seconds. `--once` and
`--json` print one snapshot. The facts come from the files in the run's folder, and from Ray, if it
can be reached, whether the workers are alive.
"""

from __future__ import annotations

import argparse
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

from fmray.runtime.files import dumps
from fmray.runtime.run_log import EVENTS, STATUS_FILE, RunReader, View, read_status

REFRESH_SECONDS = 1.0
LINE_SECONDS = 10.0
ASK_SECONDS = 3.0  # between Ray's answer and the next query
ANSWER_SECONDS = 20.0  # timeout of the first answer; includes the start of a process
GONE_SECONDS = 600.0  # how long a failed or dead run may take to restart
OVER = {"finished", "stopped"}
HEAD = ("rank", "node", "process", "CPUs", "GPU", "alive")  # of the table of workers
COLORS = {"running": "green", "finished": "green", "stopped": "yellow", "unknown": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmray top`."""
    parser.add_argument("name", type=Path, metavar="RUN", help="a run's folder, or its id")
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path("runs"),
        help="folder that holds the runs (default runs)",
    )
    parser.add_argument("--once", action="store_true", help="print one snapshot")
    parser.add_argument("--json", action="store_true", help="print one snapshot as a JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Show the run.

    Raises:
        ValueError: there is no such run.
    """
    run_dir = find_run(arguments.name, arguments.storage)
    reader = RunReader(run_dir)
    with ray_workers(run_dir) as ray_answers:
        if arguments.json or arguments.once:
            view = reader.read(ray_answers.first())
            print(dumps(asdict(view)) if arguments.json else "\n".join(lines(view)))
        elif sys.stdout.isatty():
            with Live(render(reader.read()), auto_refresh=False) as live:
                while not over(view := reader.read(ray_answers.latest())):
                    live.update(render(view), refresh=True)
                    time.sleep(REFRESH_SECONDS)
                live.update(render(view), refresh=True)
        else:
            while not over(view := reader.read(ray_answers.latest())):
                print("  ".join(f"{name} {text}" for name, text in facts(view)), flush=True)
                time.sleep(LINE_SECONDS)
            print("\n".join(lines(view)))


def find_run(name: Path, storage: Path) -> Path:
    """Return the folder of a run.

    Raises:
        ValueError: there is none.
    """
    for folder in (name, storage / name):
        if any((folder / file).is_file() for file in (STATUS_FILE, "log.jsonl", EVENTS)):
            return folder.absolute()
    raise ValueError(
        f"no run at {name} or {storage / name}; give its folder, or its id and --storage"
    )


def over(view: View) -> bool:
    """Return whether there is nothing to wait for.

    The job's supervisor may restart a failed or dead run for a while.
    """
    return view.state in OVER or (view.state != "running" and (view.quiet or 0.0) > GONE_SECONDS)


def facts(view: View) -> list[tuple[str, str]]:
    """Return what is known as (name, text)."""
    pairs = [("run", view.run), ("state", view.state + (f": {view.why}" if view.why else ""))]
    total = f" of {view.total} ({view.step / view.total:.0%})" if view.total else ""
    pairs.append(("step", f"{view.step}{total}"))
    if view.left is not None:
        pairs.append(("left", duration(view.left)))
    pairs += [(name, _number(value, ".4g")) for name, value in view.metrics.items()]
    if view.speed is not None:
        unit, value = view.speed
        pairs.append((f"{unit}/s", f"{value:.4g}"))
    if view.waiting_share is not None:
        pairs.append(("waiting for data", f"{view.waiting_share:.2%}"))
    if view.checkpoint is not None:
        step, age = view.checkpoint
        pairs.append(("checkpoint", f"step {step}, {duration(age)} ago"))
    if view.evaluation is not None:
        step, values = view.evaluation
        text = ", ".join(f"{name} {_number(value, '.4f')}" for name, value in values.items())
        pairs.append(("evaluation", f"step {step}: {text}"))
    pairs.append(("restarts", str(view.restarts)))
    if view.event is not None:
        moment, text = view.event
        pairs.append(("event", f"{time.strftime('%H:%M:%S', time.localtime(moment))} {text}"))
    if view.quiet is not None and view.state not in OVER:
        pairs.append(("last write", f"{duration(view.quiet)} ago"))
    return pairs


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else f"{value:{form}}"


def worker_rows(view: View) -> list[tuple[str, ...]]:
    """Return a row per rank with the columns `HEAD`."""
    words = {True: "yes", False: "no", None: "unknown"}
    rows = []
    for entry in view.workers:
        worker, alive = entry.worker, entry.alive if view.state not in OVER else False
        node = f" ({worker.node[:8]})" if worker.node else ""
        rows.append(
            (
                str(worker.rank),
                worker.host + node,
                str(worker.pid),
                f"{worker.cpus:g}",
                worker.gpu or "-",
                words[alive],
            )
        )
    return rows


def lines(view: View) -> list[str]:
    """Return everything as plain lines."""
    text = [f"{name:<16} {value}" for name, value in facts(view)]
    rows = [HEAD, *worker_rows(view)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    table = ["  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)) for row in rows]
    return [*text, *(table if view.workers else [])]


def render(view: View) -> Group:
    """Return everything as a rich renderable."""
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
    """Format a duration, such as `1 h 05 min`, `1 min 05 s` or `5 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class RayAnswers:
    """Ray's answers to which workers are alive: (node, pid) of each; None if Ray is unreachable."""

    def __init__(self, answers: Connection | None) -> None:
        self._answers = answers
        self._last: list[tuple[str, int]] | None = None

    def first(self) -> list[tuple[str, int]] | None:
        """Wait for the first answer and return it."""
        if self._answers is not None:
            self._answers.poll(ANSWER_SECONDS)
        return self.latest()

    def latest(self) -> list[tuple[str, int]] | None:
        """Return the newest answer without waiting."""
        try:
            while self._answers is not None and self._answers.poll():
                self._last = self._answers.recv()
        except EOFError:  # the querying process has ended: Ray is gone
            self._answers, self._last = None, None
        return self._last


@contextmanager
def ray_workers(run_dir: Path) -> Iterator[RayAnswers]:
    """Query Ray from a child process.

    A client of Ray waits for minutes for a head node that is gone, and then ends its process.
    """
    status = read_status(run_dir)
    if status is None or status.state == "ended" or not _listens(status.ray):
        yield RayAnswers(None)
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_query, args=(status.ray, sender), daemon=True)
    child.start()
    sender.close()  # only the child's end stays open, so that its death ends the pipe
    try:
        yield RayAnswers(receiver)
    finally:
        child.kill()
        child.join()


def _listens(address: str | None) -> bool:
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _query(address: str, answers: Connection) -> None:
    # Ray's messages about a lost head node would garble the view
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    from ray.util.state import list_actors

    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    while True:
        actors = list_actors(address, filters=filters, limit=10_000, detail=True)
        answers.send([(actor.node_id, actor.pid) for actor in actors])
        time.sleep(ASK_SECONDS)
