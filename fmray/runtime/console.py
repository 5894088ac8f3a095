"""What a command or job shows: fmray's own lines in the terminal, everything else in a log file.

fmray reports with `say`, `track` and `run_log.Progress`. Between `open_log` and its end, whatever
else this process and its Ray workers write (Ray, DeepSpeed, transformers, warnings, C++ code) goes
to the log file only. Worker processes and submitted jobs mark their lines, so that the process with
the terminal recognizes them in what Ray forwards.

Without `open_log`, lines are printed as they are.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from pydantic import BaseModel
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from fmray.config import LoadedRecipe
from fmray.config.yaml_file import dump_value

T = TypeVar("T")

RELAY = "FMRAY_CONSOLE"  # set where another process shows what this one reports
LINE_MARK, PROGRESS_MARK = "fmray| ", "fmray~ "
LINE_SECONDS = 10.0  # at least, between two progress lines of a task
LONGEST_SECONDS = 60.0  # ... at most, unless it advances by LINE_SHARE earlier
LINE_SHARE = 0.25
RELAY_SECONDS = 1.0  # between two updates that are sent to the process with the terminal
WIDTH = 120
FEW_SETTINGS = 8  # of an extended recipe
VALUE_LENGTH = 60  # longer values of settings are cut
NOTE = "full log: "


@dataclass(frozen=True)
class Step:
    """How far a task is: the content of a progress line."""

    task: str
    unit: str
    done: int
    total: int
    details: str  # time left, metrics; may be empty

    def __str__(self) -> str:
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        details = f", {self.details}" if self.details else ""
        return f"{self.task}: {self.unit} {self.done} of {self.total} ({share}){details}"

    @classmethod
    def parse(cls, line: str) -> Step | None:
        """The step that a progress line reports; None for any other text."""
        match = re.fullmatch(r"(.+?): (\S+) (\d+) of (\d+) \(\d+%\)(?:, (.*))?", line)
        if match is None:
            return None
        task, unit, done, total, details = match.groups()
        return cls(task, unit, int(done), int(total), details or "")


def say(text: str) -> None:
    """Show a line, or several."""
    if _console is not None:
        _console.say(text)
    elif RELAY in os.environ:
        print("\n".join(LINE_MARK + line for line in text.split("\n")), flush=True)
    else:
        print(text, flush=True)


def rich_console() -> RichConsole | None:
    """Return the console of the terminal, for live displays; None where lines are shown."""
    if _console is not None:
        return _console.rich
    return RichConsole() if sys.stdout.isatty() else None


class Reporter:
    """Shows the progress of one task: a bar in a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._reported = -LINE_SECONDS

    def due(self) -> bool:
        """Whether `report` would do anything before the task's last step."""
        seconds = LINE_SECONDS if _console is None and RELAY not in os.environ else RELAY_SECONDS
        return time.monotonic() - self._reported >= seconds

    def report(self, step: Step) -> None:
        """Report a step; those in quick succession are dropped, but not the last one."""
        if step.done < step.total and not self.due():
            return
        self._reported = time.monotonic()
        if _console is not None:
            _console.progress(step)
        elif RELAY in os.environ:
            print(f"{PROGRESS_MARK}{step}", flush=True)
        else:
            print(step, flush=True)


def track(items: Iterable[T], task: str, unit: str, total: int, done: int = 0) -> Iterator[T]:
    """Yield the items and report each; `done` of the `total` were finished before."""
    reporter, began, first = Reporter(), time.monotonic(), done
    for item in items:
        done += 1
        left = (time.monotonic() - began) / (done - first) * (total - done)
        reporter.report(Step(task, unit, done, total, time_left(left) if done < total else ""))
        yield item


def time_left(seconds: float) -> str:
    """For a progress line, such as `1:05 left`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"


def environment() -> dict[str, str]:
    """Environment variables for workers and jobs whose lines this process shows."""
    return {RELAY: "1"} if _console is not None or RELAY in os.environ else {}


@contextmanager
def open_log(path: Path, verbose: bool = False) -> Iterator[None]:
    """Show fmray's lines only, and append everything that is written to the log file `path`.

    An exception that leaves the context is logged too and names the log file in a note (PEP 678).

    Args:
        verbose: show everything.
    """
    global _console
    assert _console is None, "the log is open"
    path.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr
    for stream in (stdout, stderr):
        stream.flush()
    terminal = _terminal(stdout)
    _console = _Console(path, _display(terminal, verbose))
    sys.stdout = sys.stderr = _console.stream
    handler = _Warnings()
    if RELAY not in os.environ:  # else this module has added one
        logging.getLogger("fmray").addHandler(handler)
    # C++ code and whoever holds the old sys.stdout; Python code writes to `_console.stream`
    saved = {} if verbose else {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for descriptor in saved:
        os.dup2(_console.log.fileno(), descriptor)
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            error.add_note(f"{NOTE}{path}")
        if not isinstance(error, SystemExit):
            traceback.print_exc(file=_console.stream)
        raise
    finally:
        logging.getLogger("fmray").removeHandler(handler)
        for stream in (stdout, stderr):
            stream.flush()
        for descriptor, copy in saved.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        sys.stdout, sys.stderr = stdout, stderr
        _console.close()
        _console = None
        if terminal is not stdout:
            terminal.close()


def _terminal(stdout: TextIO) -> TextIO:
    """What `stdout` writes to, also once its file descriptor is replaced."""
    try:
        descriptor = stdout.fileno()
    except (OSError, ValueError):  # not a file: a test or a notebook
        return stdout
    return os.fdopen(os.dup(descriptor), "w", encoding=stdout.encoding, errors="replace")


class _Console:
    """A log file, and a display for fmray's part of it."""

    def __init__(self, path: Path, display: _Display) -> None:
        # unbuffered, and never closed: loggers that were made meanwhile keep writing to it
        self.log = path.open("ab", buffering=0)
        self.stream = _Stream(self)
        self._display = display
        self._lock = threading.RLock()

    def say(self, text: str) -> None:
        """Show and log lines of this process."""
        with self._lock:
            for line in text.split("\n"):
                self._display.line(line)
            self.write(text + "\n")

    def progress(self, step: Step) -> None:
        """Show and log progress of this process."""
        with self._lock:
            self._display.progress(step)
            self.write(f"{step}\n")

    def foreign(self, line: str) -> None:
        """Log a line of other code, and show what a worker or job reports in it."""
        with self._lock:
            self.write(line + "\n")
            _, mark, text = line.rpartition(LINE_MARK)
            if mark:
                self._display.line(text)
                return
            _, mark, text = line.rpartition(PROGRESS_MARK)
            step = Step.parse(text) if mark else None
            if step is not None:
                self._display.progress(step)
            else:
                self._display.foreign(line)

    def write(self, text: str) -> None:
        """Append to the file. A full disk must not end what is being logged."""
        with suppress(OSError):
            self.log.write(text.encode("utf-8", "backslashreplace"))

    @property
    def rich(self) -> RichConsole | None:
        """The rich console of a display in a terminal."""
        return self._display.console if isinstance(self._display, _Bars) else None

    def close(self) -> None:
        """End the display."""
        with self._lock:
            self._display.close()


class _Stream(io.TextIOBase):
    """Takes the place of sys.stdout and sys.stderr, and passes complete lines on."""

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, console: _Console) -> None:
        self._console = console
        self._parts = threading.local()  # a line per thread: `print` writes its end separately

    @property
    def buffer(self) -> Any:
        """For code that writes bytes."""
        return self._console.log

    def fileno(self) -> int:
        """The log file's: for processes that are started with this stream as output."""
        return self._console.log.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Collect text until its line is complete."""
        *lines, rest = (getattr(self._parts, "text", "") + text).split("\n")
        self._parts.text = rest
        for line in lines:
            self._console.foreign(line)
        return len(text)

    def flush(self) -> None:
        """Log the parts of an incomplete line that a progress bar has overwritten."""
        if "\r" in (text := getattr(self._parts, "text", "")):
            self._parts.text = ""
            self._console.write(text)


class _Warnings(logging.Handler):
    """Shows what fmray's modules log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        say(f"{record.levelname.lower()}: {record.getMessage()}")


class _Display(Protocol):
    """Where lines are shown."""

    def line(self, text: str) -> None:
        """Show a line of fmray's."""

    def progress(self, step: Step) -> None:
        """Show how far a task is."""

    def foreign(self, text: str) -> None:
        """Show a line of other code, or ignore it."""

    def close(self) -> None:
        """Show nothing more."""


class _Lines:
    """Plain lines; of progress at most four for a short task, and one a minute for a long one.

    After such lines the end has none: a summary follows.
    """

    def __init__(self, file: TextIO, verbose: bool) -> None:
        self._file, self._verbose = file, verbose
        self._shown: dict[str, tuple[float, int]] = {}  # task -> time and step of its last line,
        # or of its start, which the task itself has reported
        self._lines: set[str] = set()  # tasks with lines

    def line(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def progress(self, step: Step) -> None:
        now = time.monotonic()
        before, done = self._shown.setdefault(step.task, (now, step.done))
        if step.done < done:  # the task was restarted
            self._shown[step.task] = before, done = now, step.done
        advanced = step.done - done >= LINE_SHARE * step.total
        seconds = now - before
        due = seconds >= LONGEST_SECONDS or (seconds >= LINE_SECONDS and advanced)
        ended = step.done >= step.total
        if (ended and step.task not in self._lines) or (due and not ended):
            self._shown[step.task] = (now, step.done)
            self._lines.add(step.task)
            self.line(str(step))

    def foreign(self, text: str) -> None:
        if self._verbose:
            self.line(text)

    def close(self) -> None:
        pass


class _Relay:
    """Marked lines for another process with a console."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def line(self, text: str) -> None:
        print(LINE_MARK + text, file=self._file, flush=True)

    def progress(self, step: Step) -> None:
        print(f"{PROGRESS_MARK}{step}", file=self._file, flush=True)

    def foreign(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Bars:
    """Lines above a progress bar, in a terminal."""

    def __init__(self, file: TextIO) -> None:
        self.console = RichConsole(file=file, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def progress(self, step: Step) -> None:
        if step.done >= step.total:
            if step.task in self._tasks:
                self._bars.remove_task(self._tasks.pop(step.task))
            if not self._tasks:
                self._bars.stop()
            self.line(str(step))
            return
        text = f"{step.unit} {step.done}/{step.total}  {step.details}"
        if step.task not in self._tasks:
            self._bars.start()
            self._tasks[step.task] = self._bars.add_task(step.task, total=step.total, text=text)
        self._bars.update(self._tasks[step.task], completed=step.done, text=text)

    def foreign(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._bars.stop()


def _display(terminal: TextIO, verbose: bool) -> _Display:
    if RELAY in os.environ:
        return _Relay(terminal)
    if terminal.isatty() and not verbose:
        return _Bars(terminal)
    return _Lines(terminal, verbose)


_console: _Console | None = None
if RELAY in os.environ:  # a worker or a submitted job; `open_log` may not be called here
    logging.getLogger("fmray").addHandler(_Warnings())


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun in singular or plural."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def changed_settings(loaded: LoadedRecipe[Any], path: Path | None = None) -> str:
    """The settings that differ from the defaults, by the file or option that sets them.

    If a recipe that is extended has many, they are counted: the full recipe lists them.

    Args:
        path: where the full recipe lies.
    """
    groups: dict[str, dict[str, list[str]]] = {}  # source -> section -> settings
    for key, value in _changes(loaded.recipe, ""):
        origin = loaded.origins.get(key, "default")
        if origin != "default":
            source = _file_of(origin)
            section, _, name = key.rpartition(".")
            text = dump_value(value).replace(f"{Path.cwd()}/", "")
            text = text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 3] + "..."
            groups.setdefault(source, {}).setdefault(section, []).append(f"{name}={text}")
    where = f" (full recipe: {path})" if path is not None else ""
    lines = [f"settings that differ from the defaults{where}:"]
    own = _file_of(loaded.origins.get("name", ""))
    for source, sections in groups.items():
        text = f"  {source}: {', '.join(_shortened(*item) for item in sections.items())}"
        count = sum(map(len, sections.values()))
        if source not in ("", own) and not source.startswith("-") and count > FEW_SETTINGS:
            text = f"  {source}, which it extends: {count} settings"
        lines += textwrap.wrap(
            text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def _file_of(origin: str) -> str:
    """`/somewhere/recipe.yaml:12` -> `recipe.yaml`; the full recipe has the lines."""
    return re.sub(r":\d+$", "", origin).rpartition("/")[2]


def _shortened(section: str, settings: list[str]) -> str:
    """Return the settings of a section, such as `train.{lr=0.1, steps=5}`."""
    if not section:
        return ", ".join(settings)
    return f"{section}." + (settings[0] if len(settings) == 1 else f"{{{', '.join(settings)}}}")


def _changes(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the fields that are not at their default."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changes(value, f"{prefix}{name}.")
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            yield from _leaves(plain[name], prefix + name)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}")
    else:
        yield key, value
