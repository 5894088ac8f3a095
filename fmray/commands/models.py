"""`fmray models register RUN NAME`: put the model of a finished run into the model registry.

The version gets the alias `production`, which `fmray serve --set model=models:/NAME@production` and
`fmray ask` follow.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmray models`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    text = "register a finished run's model and make it the production version"
    register = actions.add_parser("register", help=text, description=text)
    register.add_argument("run_id", metavar="RUN", help="run id, or the run's folder")
    register.add_argument("name", metavar="NAME", help="name in the registry")
    register.add_argument(
        "--storage",
        type=Path,
        default=Path("runs"),
        help="cluster.storage of the run (default: runs)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Register the model.

    Raises:
        ValueError: no such run, no model in it yet, or tracking is off in its recipe.
        TrackingError: the registry did not answer or refused.
    """
    from fmray.commands.jobs import KINDS
    from fmray.config import load
    from fmray.runtime.registry import register

    folder = Path(arguments.run_id)
    if not (folder / "recipe.yaml").is_file():
        folder = arguments.storage / arguments.run_id
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder}: no run there (no recipe.yaml); give a run id with --storage, or its folder"
        )
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder}: no model/; the run has not finished")
    kinds = [kind.recipe for kind in KINDS.values()]
    tracking = load(folder / "recipe.yaml", kinds=kinds).recipe.tracking
    version = register(
        tracking, folder.parent, arguments.name, folder / "model", folder.resolve().name
    )
    print(
        f"registered {folder / 'model'} as models:/{arguments.name}@production (version {version})"
    )
    return 0
