"""`fmray config`: print a recipe of any kind with the origin of each value, or the JSON Schema."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fmray.config import KINDS, ConfigError, load
from fmray.config.arguments import add_overrides
from fmray.runtime.files import dumps


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipe files, for editors and other checkers.

    The `kind` in a file decides which of `KINDS` it has to match; a file without one is of the
    first.
    """
    schemas: dict[str, dict[str, Any]] = {}
    definitions: dict[str, Any] = {}
    for kind, model in KINDS.items():
        schemas[kind] = model.model_json_schema()
        schemas[kind]["properties"]["extends"] = {
            "type": "string",
            "description": "another recipe, relative to this file, whose values this one overrides",
        }
        # A file may inherit required keys from the recipe that it extends.
        schemas[kind].pop("required")
        definitions |= schemas[kind].pop("$defs")
    default, *others = schemas
    result = schemas[default]
    for kind in others:
        is_kind = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        result = {"if": is_kind, "then": schemas[kind], "else": result}
    return {"$defs": definitions, **result}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmray config`."""
    parser.add_argument("recipe", type=Path, nargs="?", help="recipe (YAML) to resolve and print")
    add_overrides(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of recipes")


def run(arguments: argparse.Namespace) -> int:
    """Print a resolved recipe with origins, or the JSON Schema."""
    if arguments.schema == (arguments.recipe is not None):
        raise ConfigError("config: name a recipe, or give --schema")
    if arguments.schema:
        print(dumps(schema(), indent=2))
    else:
        print(load(arguments.recipe, arguments.overrides, tuple(KINDS.values())).dump(), end="")
    return 0
