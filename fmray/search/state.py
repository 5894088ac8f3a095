"""`trials.jsonl`: the finished trials of a search, and the source of truth when it resumes.

The file is append-only, with one line per trial in the order in which trials finished. A line is on
disk when `append_trial` returns. Tune's own state files are never read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fmray.runtime.files import dumps

#: stopped: early, by the scheduler; duplicate: not trained, because it equals an earlier trial
TrialStatus = Literal["done", "stopped", "failed", "duplicate"]


@dataclass(frozen=True)
class FinishedTrial:
    """One trial that has ended; the fields are the keys of a line of `trials.jsonl`."""

    number: int  #: of the suggestion, from 0
    key: str  #: canonical form of the values, see `Space.key`
    values: Mapping[str, Any]  #: by parameter of the space
    overrides: tuple[str, ...]  #: KEY=VALUE, on top of the base recipe
    metrics: Mapping[str, float]  #: of the last evaluation; a duplicate has those of its original
    curve: tuple[Mapping[str, float], ...]  #: metrics of each evaluation, and its `step`
    status: TrialStatus
    reason: str | None  #: why it failed, was stopped or is a duplicate
    seconds: float
    started: float  #: seconds since 1970
    steps: int  #: optimizer steps trained
    origin: str  #: `warm: NAME` or `suggested`


def append_trial(path: Path, trial: FinishedTrial) -> None:
    """Append one trial; it is on disk when this returns."""
    append_line(path, asdict(trial))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line of JSON; it is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that `append_line` wrote; [] if there is no file.

    Truncates the file after the last complete line: a crash may have cut off the one after it.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return complete.splitlines()


def read_finished(path: Path) -> list[FinishedTrial]:
    """Return the trials of a `trials.jsonl` in the order they finished; [] if there is no file.

    Raises:
        ValueError: a line is not a trial.
    """
    trials = []
    for number, line in enumerate(complete_lines(path), 1):
        try:
            values = json.loads(line)
            values |= {
                "overrides": tuple(values["overrides"]),
                "metrics": _numbers(values["metrics"]),
                "curve": tuple(map(_numbers, values["curve"])),
            }
            trials.append(FinishedTrial(**values))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: not a trial of a search ({error}); give another --run-id"
            ) from error
    return trials


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return metrics of a line, with NaN for `null`."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}
