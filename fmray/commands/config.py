"""`fmray config`: a recipe of any kind resolved, with the origin of each value; or the JSON Schema.

In: a recipe and overrides, or `--schema`. Out: YAML that loads again, or JSON for an editor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fmray.config import AdaLlavaRecipe, BaseRecipe, ConfigError, load
from fmray.config.arguments import add_overrides
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import PlansRecipe, SearchRecipe

KINDS: tuple[type[BaseRecipe], ...] = (AdaLlavaRecipe, FewshotRecipe, SearchRecipe, PlansRecipe)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors and for checking recipes elsewhere.

    What a file may hold depends on its `kind`; one that does not say is of the first.
    """
    kinds, definitions = [], {}
    for model in KINDS:
        found = model.model_json_schema()
        found["properties"]["extends"] = {
            "type": "string",
            "description": "another recipe, relative to this file, whose values this one overrides",
        }
        # A file may take its name from the recipe it extends.
        found.pop("required")
        definitions |= found.pop("$defs")
        kinds.append(found)
    right = kinds[0]
    for model, other in zip(KINDS[1:], kinds[1:], strict=True):
        is_kind = {"properties": {"kind": {"const": model.model_fields["kind"].default}}}
        is_kind["required"] = ["kind"]
        right = {"if": is_kind, "then": other, "else": right}
    return {"$defs": definitions, **right}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fmray config`."""
    parser.add_argument("recipe", type=Path, nargs="?", help="recipe (YAML) to resolve and print")
    add_overrides(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of recipes")


def run(arguments: argparse.Namespace) -> int:
    """`fmray config`: print a resolved recipe with origins, or the JSON Schema."""
    if arguments.schema == (arguments.recipe is not None):
        raise ConfigError("config: name a recipe, or ask for --schema")
    if arguments.schema:
        print(json.dumps(schema(), indent=2))
    else:
        print(load(arguments.recipe, arguments.overrides, KINDS).dump(), end="")
    return 0
