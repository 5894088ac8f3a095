"""The command `fmray`. Each subcommand is a module with `add_arguments` and `run`.

The exit code is the subcommand's, or 2 after one line about a user's mistake. A subcommand's module
is imported only when it is chosen, so that `fmray --help` is quick.
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
        "train and evaluate a small adaptive model on this machine",
    ),
    "ask": ("fmray.commands.ask", "ask a trained model a question about an image, under a budget"),
    "serve": ("fmray.commands.serve", "serve a trained model to OpenAI clients, on Ray Serve"),
    "cost": ("fmray.commands.cost", "units, operations and roofline time of a model under budgets"),
    "models": ("fmray.commands.models", "register a finished run's model in the registry"),
    "top": (
        "fmray.commands.top",
        "show what a run is doing: workers, step, speed, checkpoints",
    ),
    "doctor": (
        "fmray.commands.doctor",
        "check the installation, the cluster, and whether a recipe fits",
    ),
    "config": (
        "fmray.commands.config",
        "print a recipe with the origin of each value, or the JSON Schema",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fmray` and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fmray", description="Adapt foundation models to a task and a compute budget, on Ray."
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
