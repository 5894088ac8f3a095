"""`fmray`: one command, a few subcommands, each of which is a module with `add_arguments` and
`run`.

In: the command line. Out: an exit code: 0, what the subcommand says, or 2 for a user's mistake,
which is said in one line. A subcommand's module is imported only when it is chosen, so that `fmray
--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fmray import __version__
from fmray.errors import exit_code

COMMANDS = {
    "quickstart": (
        "fmray.commands.quickstart",
        "train, finetune and measure a small adaptive model on this machine",
    ),
    "ask": ("fmray.commands.ask", "ask a trained model a question about an image, under a budget"),
    "serve": ("fmray.commands.serve", "an OpenAI-style endpoint for a trained model, on Ray Serve"),
    "cost": ("fmray.commands.cost", "what a budget buys: layers, operations, roofline time"),
    "models": ("fmray.commands.models", "register a finished run's model in the registry"),
    "top": (
        "fmray.commands.top",
        "what a run is doing: workers, step, speed, checkpoints",
    ),
    "doctor": (
        "fmray.commands.doctor",
        "what is installed, what Ray sees, whether a recipe fits",
    ),
    "config": (
        "fmray.commands.config",
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
