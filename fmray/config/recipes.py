"""Load a recipe of any kind: typed values, and the origin of each.

A recipe is a YAML file with at most one `extends:` parent, under dotted `--set` overrides; its
`kind` says which of `KINDS` it is. A user's mistake is a `ConfigError` of one line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from fmray.config.adallava import AdaLlavaRecipe
from fmray.config.base import BaseRecipe
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import PlansRecipe, SearchRecipe
from fmray.config.yaml_file import Entry, dump_value, explain, read
from fmray.errors import ConfigError

R = TypeVar("R", bound=BaseRecipe, default=AdaLlavaRecipe)

#: Every kind of recipe by the name that its file gives; a file without `kind` is of the first.
KINDS: dict[str, type[BaseRecipe]] = {
    "adallava": AdaLlavaRecipe,
    "fewshot": FewshotRecipe,
    "search": SearchRecipe,
    "plans": PlansRecipe,
}


@dataclass(frozen=True)
class LoadedRecipe(Generic[R]):
    """A recipe and where each of its values came from."""

    recipe: R
    origins: dict[str, str]  # dotted key -> `file:line`, `--set` or `default`

    def dump(self) -> str:
        """Return all values as YAML that loads again, each with its origin as a comment."""
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
    """Load a recipe: its parents, the file, and the overrides (`train.lr=1e-5`) on top.

    Args:
        kinds: accepted kinds of recipe (`tuple(KINDS.values())` for all); a file without `kind` is
            of the first.

    Raises:
        ConfigError: one line with file, line, key, what is wrong and what would be right.
    """
    path = Path(path)
    tree = read(path, overrides)
    model = _model(tree, kinds)
    try:
        # JSON's strict mode fits YAML: `true` is no number and "5" is text, yet a list may fill a
        # tuple.
        recipe = model.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, model, tree, str(path))) from error
    return LoadedRecipe(recipe, dict(_origins(recipe.model_dump(mode="json"), tree, "")))


def _model(tree: Entry, kinds: Sequence[type[R]]) -> type[R]:
    kind = tree.child("kind")
    if kind is None:
        return kinds[0]
    accepted = {name: model for name, model in KINDS.items() if model in kinds}
    if isinstance(kind.value, str) and kind.value in accepted:
        return accepted[kind.value]
    name = kind.plain()
    close = difflib.get_close_matches(str(name), accepted, n=1) if name not in KINDS else []
    hint = f"; did you mean {close[0]}?" if close else ""
    wanted = " or ".join(f"kind: {name}" for name in accepted)
    raise ConfigError(
        f"{kind.origin}: kind: this needs a recipe of {wanted}, not of {name!r}{hint}"
    )


def _origins(values: dict[str, Any], tree: Entry | None, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        entry = tree.child(name) if tree else None
        if isinstance(value, dict) and value:
            yield from _origins(value, entry, f"{prefix}{name}.")
        else:
            yield prefix + name, entry.origin if entry else "default"
