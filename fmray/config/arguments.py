"""Command line of jobs: `--config`, `--set`, `--run-id`, `--verbose`; location of `jobs/`."""

from __future__ import annotations

import argparse
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fmray.config.adallava import AdaLlavaRecipe
from fmray.config.base import NAME
from fmray.config.recipes import LoadedRecipe, R, load
from fmray.errors import ConfigError


def add_overrides(parser: argparse.ArgumentParser, example: str = "train.lr=1e-5") -> None:
    """Add the option `--set` to a parser."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a value, such as {example}; repeatable",
    )


def job_arguments(
    argv: Sequence[str] | None, description: str, kinds: Sequence[type[R]] = (AdaLlavaRecipe,)
) -> tuple[LoadedRecipe[R], str, bool]:
    """Parse the command line of a job into its recipe, its run id and `--verbose`.

    The default run id is the recipe's name, the time in UTC and four hex digits.

    Args:
        argv: words of the command line; None for those of the process.
        description: of the job, for `--help`.
        kinds: see `load`.

    Raises:
        ConfigError: the recipe or the run id is wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    add_overrides(parser)
    parser.add_argument("--run-id", help="name of the run; that of an earlier run resumes it")
    parser.add_argument(
        "--verbose", action="store_true", help="show everything that the log file gets"
    )
    arguments = parser.parse_args(argv)
    loaded = load(arguments.config, arguments.overrides, kinds)
    run_id = arguments.run_id
    if run_id is None:
        run_id = f"{loaded.recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not re.match(NAME, run_id):
        raise ConfigError(
            f"--run-id {run_id!r}: letters, digits, `_`, `.` and `-` only (it names a folder)"
        )
    return loaded, run_id, arguments.verbose


def job_path(name: str) -> Path:
    """Return the path of `jobs/NAME`, such as `recipes/shapes_tiny.yaml`, in checkout or wheel.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    package = Path(__file__).parents[1]
    for folder in (package.parent / "jobs", package / "_jobs"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"there is no {name} in jobs/; is the installation of fmray complete?")
