"""fmray's own errors, and the exit code that each outcome of a command or job has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class ConfigError(ValueError):
    """A user's mistake in a recipe or an override; the text is one line."""


class GaveUp(RuntimeError):
    """A job has failed as often as it may; its text says why, and how it goes on."""


def exit_code(function: Callable[..., int | None], *arguments: object) -> int:
    """Call `function` and turn its outcome into an exit code; what a job script ends with.

    A user's mistake (a ValueError that fmray itself raised, or a file that is not there or may not
    be read) is one line on stderr and 2. Anything else, a ValueError from inside a library too, is
    a bug and keeps its traceback.
    """
    try:
        code = function(*arguments) or 0
        sys.stdout.flush()  # where a closed pipe can still be caught
        return code
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        print(f"fmray: {error}", file=sys.stderr)
    except ValueError as error:
        if not raised_by_fmray(error):
            raise
        print(f"fmray: {error}", file=sys.stderr)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Nothing is left to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a process that SIGPIPE ended
    except GaveUp as error:
        print(f"fmray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fmray: interrupted", file=sys.stderr)
        return 130
    return 2


def raised_by_fmray(error: BaseException) -> bool:
    """Whether the error comes from fmray's own code, not from a library's."""
    trace = error.__traceback__
    assert trace is not None, "only raised errors come here"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "fmray"
