"""`fmray`: one command, a few subcommands, each of which is a module with `add_arguments` and
`run`.

In: the command line. Out: an exit code: 0, what the subcommand says, or 2 for a user's mistake,
which is said in one line. A subcommand's module is imported only when it is chosen, so that `fmray
--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from fmray import __version__

COMMANDS = {
    "quickstart": (
        "fmray.quickstart",
        "train, finetune and measure a small adaptive model on this machine",
    ),
    "ask": ("fmray.ask", "ask a trained model a question about an image, under a budget"),
    "serve": ("fmray.serve.command", "an OpenAI-style endpoint for a trained model, on Ray Serve"),
    "cost": ("fmray.adallava.cost_table", "what a budget buys: layers, operations, roofline time"),
    "top": ("fmray.top", "what a run is doing: workers, step, speed, checkpoints, what happened"),
    "doctor": ("fmray.doctor", "what is installed, what Ray sees, and whether a recipe fits"),
    "config": (
        "fmray.config_command",
        "a recipe resolved, with the origin of each value; or the JSON Schema",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fmray`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fmray", description="Foundation models adapted to a job and a compute budget, on Ray."
    )
    parser.add_argument("--version", action="version", version=f"fmray {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = words[0] if words else None
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    return exit_code(arguments.run, arguments)


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
