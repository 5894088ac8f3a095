"""What a search may vary: parameters, how their values become a trial, and equal trials.

In: the name of a file of `tune_spaces/`, the base recipe and options. Out: a `Space`. A file there
has a model `Options` and `def space(base, options) -> Space`; one that varies which tasks to train
on has a third argument, `tasks: Tasks`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from fmray.config import BaseRecipe, ConfigError
from fmray.config.yaml_file import dump_value, explain, parse_override

Values = Mapping[str, Any]  # by parameter; of a Subset, a tuple of its items in their order


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    name: str
    values: tuple[Any, ...]

    def mistake(self) -> str | None:
        """What is wrong with the parameter itself; None: nothing."""
        if not self.values:
            return "has no values to choose from; give one or more"
        return _twice(self.values)

    def read(self, value: Any) -> Any:
        """The value, as this parameter has it. Raises ValueError for what is none of its own."""
        value = tuple(value) if isinstance(value, list) else value
        for known in self.values:
            if known == value and type(known) is type(value):  # 1 and True are two values
                return known
        raise ValueError(f"{self.name}: {value!r} is none of {_listed(self.values)}")

    def points(self) -> Iterator[Any]:
        """All values, for a grid."""
        return iter(self.values)


@dataclass(frozen=True)
class Integer:
    """A whole number from low to high, both included."""

    name: str
    low: int
    high: int

    def mistake(self) -> str | None:
        """As `Choice.mistake`."""
        if self.low > self.high:
            return f"runs from {self.low} down to {self.high}; give the lower end first"
        return None

    def read(self, value: Any) -> int:
        """As `Choice.read`."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(f"{self.name}: {value!r} is no whole number {self.low}..{self.high}")
        return value

    def points(self) -> Iterator[int]:
        """As `Choice.points`."""
        return iter(range(self.low, self.high + 1))


@dataclass(frozen=True)
class Real:
    """A number from low to high; log: drawn evenly in its logarithm."""

    name: str
    low: float
    high: float
    log: bool = False

    def mistake(self) -> str | None:
        """As `Choice.mistake`."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            return f"runs from {self.low} to {self.high}; give two finite ends, the lower one first"
        if self.log and self.low <= 0:
            return f"is logarithmic and starts at {self.low}; start above 0"
        return None

    def read(self, value: Any) -> float:
        """As `Choice.read`."""
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise ValueError(f"{self.name}: {value!r} is no number {self.low}..{self.high}")
        return float(value)

    def points(self) -> Iterator[float]:
        """Raises ValueError: there are too many."""
        raise ValueError(
            f"algorithm: a grid cannot list all values of {self.name}; use random or tpe, or give"
            " it a few values to choose from"
        )


@dataclass(frozen=True)
class Subset:
    """One or more of some items; their order does not count."""

    name: str
    items: tuple[str, ...]

    def mistake(self) -> str | None:
        """As `Choice.mistake`."""
        if not self.items:
            return "has no items to take a subset of; give one or more"
        return _twice(self.items)

    def read(self, value: Any) -> tuple[str, ...]:
        """As `Choice.read`."""
        taken = set(value) if isinstance(value, (list, tuple, set, frozenset)) else {value}
        unknown = sorted(str(item) for item in taken if item not in self.items)
        if unknown:
            raise ValueError(f"{self.name}: {unknown[0]!r} is none of {_listed(self.items)}")
        if not taken:
            raise ValueError(f"{self.name}: an empty subset; take one item or more")
        return tuple(item for item in self.items if item in taken)

    def points(self) -> Iterator[tuple[str, ...]]:
        """As `Choice.points`; the smallest subsets first."""
        for size in range(1, len(self.items) + 1):
            yield from itertools.combinations(self.items, size)


Parameter = Choice | Integer | Real | Subset


@dataclass(frozen=True)
class WarmStart:
    """A trial that goes before all suggestions."""

    name: str
    values: Values


@dataclass(frozen=True)
class Space:
    """What is varied. to_overrides: values to `KEY=VALUE`, on the base recipe (`override` writes
    one); what does not count under these values is left out, so that equal trials are found."""

    parameters: tuple[Parameter, ...]
    to_overrides: Callable[[Values], list[str]]
    warm_starts: tuple[WarmStart, ...] = ()

    def read(self, values: Values) -> dict[str, Any]:
        """The values in this space's own form (a list from JSON is a tuple again, in order).

        Raises ValueError for a parameter that is missing or unknown, or a value outside.
        """
        if set(values) != set(self.names):
            raise ValueError(f"values of {_listed(values)} in a space of {_listed(self.names)}")
        return {parameter.name: parameter.read(values[parameter.name]) for parameter in self}

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [parameter.name for parameter in self]

    def key(self, values: Values) -> str:
        """Equal for trials that would train the same: their overrides, in one order."""
        return json.dumps(sorted(self.to_overrides(self.read(values))))

    def points(self) -> Iterator[dict[str, Any]]:
        """All values, for a grid; the last parameter varies fastest.

        Raises ValueError where a parameter is continuous.
        """
        columns = [parameter.points() for parameter in self]
        for row in itertools.product(*columns):
            yield dict(zip(self.names, row, strict=True))

    def check(self) -> None:
        """Raises ValueError, one line, for a space that cannot be searched."""
        if not self.parameters:
            raise ValueError("the space varies nothing; give it a parameter")
        if again := _twice(self.names):
            raise ValueError(f"parameters: {again}")
        for parameter in self:
            if wrong := parameter.mistake():
                raise ValueError(f"{parameter.name}: {wrong}")
        for start in self.warm_starts:
            try:
                values = self.read(start.values)
            except ValueError as error:
                raise ValueError(f"warm start {start.name}: {error}") from error
            for text in self.to_overrides(values):
                parse_override(text)


@dataclass(frozen=True)
class Tasks:
    """The candidate tasks of a few-shot recipe, as Algorithm 1 sees them
    (`fmray.selection.Selection`): order, most similar to the target first, and the similarity of
    each; coverage by the first 1, 2, ... of them; names: those that it selects."""

    names: Sequence[str]
    order: Sequence[str]
    similarity: Sequence[float]
    coverage: Sequence[float]


def override(key: str, value: Any) -> str:
    """`KEY=VALUE` as `--set` takes it."""
    return f"{key}={dump_value(list(value) if isinstance(value, tuple) else value)}"


def warm_start(name: str, parameters: Sequence[Parameter], values: Values) -> tuple[WarmStart, ...]:
    """A warm start, or none where its values lie outside of the space (a base recipe's may)."""
    try:
        read = {parameter.name: parameter.read(values[parameter.name]) for parameter in parameters}
    except ValueError:
        return ()
    return (WarmStart(name, read),)


def load_space(
    name: str,
    base: BaseRecipe,
    options: Mapping[str, Any],
    tasks: Callable[[], Tasks] | None = None,
) -> Space:
    """The space `name` of `tune_spaces/`, for a base recipe, checked.

    Args:
        tasks: called where the space varies which tasks to train on; it embeds the candidates.

    Raises:
        ValueError: no such space, options that it does not have, a base recipe that it is not for,
            or a space that cannot be searched.
    """
    module = _load(name)
    try:
        read = module.Options.model_validate_json(json.dumps(dict(options)), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, module.Options, prefix="options")) from error
    try:
        if getattr(module, "TASKS", False):
            if tasks is None:
                raise ValueError("it varies tasks, and there are none; use a few-shot base recipe")
            space = module.space(base, read, tasks())
        else:
            space = module.space(base, read)
        space.check()
    except ValueError as error:
        raise ValueError(f"space {name}: {error}") from error
    return space


def _load(name: str) -> ModuleType:
    package = Path(__file__).parents[1]
    # a checkout has them beside the package, a wheel inside
    folders = [package.parent / "tune_spaces", package / "_tune_spaces"]
    files = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    if name not in files:  # only names: what is run lies in that folder
        raise ValueError(f"space: tune_spaces/ has no {name!r}; it has {_listed(sorted(files))}")
    specification = importlib.util.spec_from_file_location(f"tune_spaces.{name}", files[name])
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # Pydantic looks up the names of annotations there
    specification.loader.exec_module(module)
    for needed in ("Options", "space"):
        if not hasattr(module, needed):
            raise ValueError(f"space: tune_spaces/{name}.py has no `{needed}`; see the others")
    return module


def _twice(values: Sequence[Any]) -> str | None:
    for place, value in enumerate(values):
        if value in values[:place]:
            return f"{value!r} is there twice; keep one of them"
    return None


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
