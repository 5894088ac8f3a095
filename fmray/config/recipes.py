"""Loads a recipe of any kind: typed values, and the origin of each.

In: a YAML recipe (with at most one `extends:` parent) and dotted `--set` overrides. Out: a
`LoadedRecipe`: the typed recipe, where each value came from, and a resolved dump. A user's mistake
is a `ConfigError` of one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from fmray.config.adallava import AdaLlavaRecipe
from fmray.config.base import BaseRecipe
from fmray.config.yaml_file import Entry, dump_value, explain, read
from fmray.errors import ConfigError

R = TypeVar("R", bound=BaseRecipe, default=AdaLlavaRecipe)


@dataclass(frozen=True)
class LoadedRecipe(Generic[R]):
    """A recipe and where each value came from: dotted key -> `file:line`, `--set` or `default`."""

    recipe: R
    origins: dict[str, str]

    @property
    def hash(self) -> str:
        """12 hex digits that change with any resolved value."""
        values = json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def dump(self) -> str:
        """All values as YAML that loads again, each with its origin as a comment."""
        return "\n".join(self._lines(self.recipe.model_dump(mode="json"), "")) + "\n"

    def _lines(self, values: dict[str, Any], prefix: str) -> Iterator[str]:
        indent = "  " * prefix.count(".")
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield f"{indent}{name}:"
                yield from self._lines(value, f"{prefix}{name}.")
            else:
                yield f"{indent}{name}: {dump_value(value)}  # {self.origins[prefix + name]}"


def load(
    path: Path, overrides: Sequence[str] = (), kinds: Sequence[type[R]] = (AdaLlavaRecipe,)
) -> LoadedRecipe[R]:
    """Read a recipe, its parents and the overrides (`train.lr=1e-5`) on top.

    Args:
        kinds: the kinds of recipe that will do; the file's `kind` says which it is, and a file that
            does not say is of the first.

    Raises:
        ConfigError: one line: file:line, the key, what is wrong and what would be right.
    """
    path = Path(path)
    tree = read(path, overrides)
    model = _kind(tree, path, kinds)
    try:
        # JSON's strict mode is the useful one: `true` is no number and "5" is text, yet a list may
        # fill a tuple.
        recipe = model.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, tree, path, model)) from error
    return LoadedRecipe(recipe, dict(_origins(recipe.model_dump(mode="json"), tree, "")))


def _kind(tree: Entry, path: Path, kinds: Sequence[type[R]]) -> type[R]:
    written = tree.value.get("kind") if isinstance(tree.value, dict) else None
    if written is None:
        return kinds[0]
    known = {kind.model_fields["kind"].default: kind for kind in kinds}
    if written.value not in known:
        right = " or ".join(f"kind: {name}" for name in known)
        raise ConfigError(
            f"{written.origin}: kind: this needs a recipe of {right}, not of {written.value!r}"
        )
    return known[written.value]


def _origins(values: dict[str, Any], tree: Entry | None, prefix: str) -> Iterator[tuple[str, str]]:
    written = tree.value if tree and isinstance(tree.value, dict) else {}
    for name, value in values.items():
        entry = written.get(name)
        if isinstance(value, dict) and value:
            yield from _origins(value, entry, f"{prefix}{name}.")
        else:
            yield prefix + name, entry.origin if entry else "default"
