"""The command line of jobs: `--config`, `--set`, `--run-id`; and where `jobs/` lies.

In: words of the command line. Out: a `LoadedRecipe` and a run id.
"""

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
    """The option `--set`, as every command and job takes it."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override one value, such as {example}; repeatable",
    )


def job_arguments(
    argv: Sequence[str] | None, description: str, kinds: Sequence[type[R]] = (AdaLlavaRecipe,)
) -> tuple[LoadedRecipe[R], str]:
    """What every job takes: `--config`, `--set` and `--run-id`; for `kinds` see `load`.

    Returns the recipe and the run id; by default the recipe's name, the time in UTC and four hex
    digits.

    Raises:
        ConfigError: the recipe or the run id is wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    add_overrides(parser)
    parser.add_argument("--run-id", help="name of the run; an earlier one resumes it")
    arguments = parser.parse_args(argv)
    loaded = load(arguments.config, arguments.overrides, kinds)
    run_id = arguments.run_id
    if run_id is None:
        run_id = f"{loaded.recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not re.match(NAME, run_id):
        raise ConfigError(
            f"--run-id {run_id!r}: letters, digits, `_`, `.` and `-` only (it names a folder)"
        )
    return loaded, run_id


def job_path(name: str) -> Path:
    """A file or folder of `jobs/`, such as `recipes/shapes_tiny.yaml`, in checkout or wheel.

    Raises:
        FileNotFoundError: neither has it.
    """
    package = Path(__file__).parents[1]
    for folder in (package.parent / "jobs", package / "_jobs"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"there is no {name} in jobs/; is this a whole installation of fmray?")
