"""What a run says while it trains: a bar or lines on rank 0, and `log.jsonl`.

In: metrics by step. Out: a bar (a moving one on a terminal, a line every few seconds in the log of
a job), and a JSON-lines file in the run's folder that stays right when a run resumes from an
earlier step; beside it `events.jsonl`, for what happens to the run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

EVENTS = "events.jsonl"
LINE_SECONDS = 10.0
BAR_WIDTH = 24


class Progress:
    """Loss, budget or accuracy, and tokens or episodes a second as training goes on.

    Silent where not `enabled` (ranks other than 0).
    """

    def __init__(self, total: int, start: int, enabled: bool) -> None:
        self._total = total
        self._start, self._began = start, time.monotonic()
        self._enabled = enabled
        self._said = 0.0
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """One step is done."""
        if not self._enabled:
            return
        shown = {"loss": f"{metrics['loss']:.4f}"}
        for name in ("budget", "accuracy"):
            if name in metrics:
                shown[name] = f"{metrics[name]:.2f}"
        for name in ("tokens", "episodes", "images"):
            if f"{name}_per_s" in metrics:
                shown[f"{name}/s"] = f"{metrics[f'{name}_per_s']:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif step in (1, self._total) or time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(self._line(step) + "  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def _line(self, step: int) -> str:
        done = BAR_WIDTH * step // self._total
        left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
        bar = "#" * done + "." * (BAR_WIDTH - done)
        minutes, seconds = divmod(int(left), 60)
        return f"[{bar}] {step}/{self._total}, {minutes}:{seconds:02d} left"

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self._enabled:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)


class StepLog:
    """`log.jsonl`: {"step": ..., metric: value, ...} per line.

    Lines after `keep_until` are from a lost future.
    """

    def __init__(self, path: Path, keep_until: int, enabled: bool) -> None:
        self._file = None
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line["step"] <= keep_until]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; it is on disk when this returns."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")


def event(run_dir: Path, text: str) -> None:
    """One line for what happens to a run beside its steps; printed, and kept in `events.jsonl`."""
    print(f"{datetime.now():%H:%M:%S} {run_dir.name}: {text}", flush=True)
    try:
        with (run_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "text": text}) + "\n")
    except OSError as error:  # a full disk, which may be what the line is about
        print(f"{run_dir.name}: {EVENTS} cannot be written: {error}", flush=True)


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; [] where there is none.

    A last line cut off by a crash is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
