"""fmray's errors, and the exit code of each outcome of a command or job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class ConfigError(ValueError):
    """A user's mistake in a recipe or an override; the text is one line."""


class GaveUp(RuntimeError):
    """A job that stopped and is not retried: it failed too often, or would fail again.

    The text gives the reason, and how to resume it.
    """


class NotFinite(ValueError):
    """Features or scores that should be finite are not."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def exit_code(function: Callable[..., int | None], *arguments: object) -> int:
    """Call `function` and return the exit code of its outcome.

    A user's mistake (a ValueError raised by fmray's own code, or a file that is missing or not
    readable) is one line on stderr and 2. Anything else, such as a ValueError raised by a library,
    is a bug and keeps its traceback.
    """
    try:
        code = function(*arguments) or 0
        sys.stdout.flush()  # where a closed pipe can still be caught
        return code
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        _report(error)
    except ValueError as error:
        if not raised_by_fmray(error):
            raise
        _report(error)
    except BrokenPipeError:
        # The reader (`| head`) has ended; the interpreter must not flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a process that SIGPIPE ended
    except GaveUp as error:
        _report(error)
        return 1
    except KeyboardInterrupt:
        print("fmray: interrupted", file=sys.stderr)
        return 130
    return 2


def _report(error: Exception) -> None:
    """Print an error and its notes, such as where the full log is, as one line."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"fmray: {error}{notes}", file=sys.stderr)


def raised_by_fmray(error: BaseException) -> bool:
    """Return whether fmray's own code raised the error, not a library."""
    trace = error.__traceback__
    assert trace is not None, "the error was never raised"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "fmray"
