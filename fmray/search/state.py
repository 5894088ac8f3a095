"""What a search knows of its trials that have ended: `trials.jsonl`, the truth when it goes on.

In: a `Finished` as each trial ends. Out: an append-only file, a line a trial, on disk when `append`
returns, and read back by a search of the same run id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "stopped", "failed", "duplicate"]


@dataclass(frozen=True)
class Finished:
    """A trial that has ended.

    number: of the suggestion, from 0. key: canonical, of the values. overrides: KEY=VALUE, on the
    base recipe. metrics: of the last evaluation; {} of one that failed before it. curve: the
    metrics of each evaluation, with its `step`. status: `stopped` is early, by the scheduler;
    `duplicate` was not trained and has the metrics of the trial it equals. reason: of a failure, a
    stop or a duplicate. started: seconds since 1970. steps: trained. origin: `warm: NAME` or
    `suggested`.
    """

    number: int
    key: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    metrics: Mapping[str, float]
    curve: tuple[Mapping[str, float], ...]
    status: Status
    reason: str | None
    seconds: float
    started: float
    steps: int
    origin: str


def append(path: Path, trial: Finished) -> None:
    """Add one line; it is on disk when this returns."""
    append_line(path, asdict(trial))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line of JSON; it is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that `append_line` wrote; [] where there is none.

    A last line that a crash cut off is taken off the file.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()


def read_finished(path: Path) -> list[Finished]:
    """The trials of a `trials.jsonl`, in the order they ended; [] where there is none.

    A last line that a crash cut off counts as not finished. Raises ValueError for a line that is
    not a trial.
    """
    found = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            read = json.loads(line)
            read |= {"overrides": tuple(read["overrides"]), "curve": tuple(read["curve"])}
            found.append(Finished(**read))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: not a trial of a search ({error}); give another --run-id"
            ) from error
    return found
