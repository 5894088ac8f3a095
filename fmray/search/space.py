"""The space of a search: its parameters, how values become a trial, and which trials are equal.

A space is a file of `tune_spaces/` with a Pydantic model `Options` and a function
`space(base, options) -> Space`. A file that varies which tasks to train on sets `TASKS = True`; its
function has a third argument, `tasks: Tasks`.
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
from fmray.runtime.files import dumps

Values = Mapping[str, Any]  # by parameter; a Subset's value is a tuple in the order of its items


# --- Parameters ---


@dataclass(frozen=True)
class Choice:
    """One of a list of values."""

    name: str
    values: tuple[Any, ...]

    def mistake(self) -> str | None:
        """Return what is wrong with the parameter itself, or None."""
        if not self.values:
            return "has no values to choose from; give one or more"
        return _twice(self.values)

    def read(self, value: Any) -> Any:
        """Return a value in this parameter's own form.

        Raises:
            ValueError: it is not a value of this parameter.
        """
        value = tuple(value) if isinstance(value, list) else value
        for known in self.values:
            if known == value and type(known) is type(value):  # 1 and True are different values
                return known
        raise ValueError(f"{self.name}: {value!r} is not one of {_listed(self.values)}")

    def points(self) -> Iterator[Any]:
        """Yield all values, for a grid."""
        return iter(self.values)


@dataclass(frozen=True)
class Integer:
    """An integer from low to high, both included."""

    name: str
    low: int
    high: int

    def mistake(self) -> str | None:
        """See `Choice.mistake`."""
        if self.low > self.high:
            return f"runs from {self.low} down to {self.high}; give the lower end first"
        return None

    def read(self, value: Any) -> int:
        """See `Choice.read`."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(
                f"{self.name}: {value!r} is not an integer from {self.low} to {self.high}"
            )
        return value

    def points(self) -> Iterator[int]:
        """See `Choice.points`."""
        return iter(range(self.low, self.high + 1))


@dataclass(frozen=True)
class Real:
    """A number from low to high."""

    name: str
    low: float
    high: float
    log: bool = False  #: uniform in the logarithm

    def mistake(self) -> str | None:
        """See `Choice.mistake`."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            return f"runs from {self.low} to {self.high}; give two finite ends, the lower one first"
        if self.log and self.low <= 0:
            return f"is logarithmic and starts at {self.low}; start above 0"
        return None

    def read(self, value: Any) -> float:
        """See `Choice.read`."""
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise ValueError(
                f"{self.name}: {value!r} is not a number from {self.low} to {self.high}"
            )
        return float(value)

    def points(self) -> Iterator[float]:
        """Raise ValueError: there are infinitely many."""
        raise ValueError(
            f"algorithm: a grid cannot list all values of {self.name}; use random or tpe, or give"
            " it a few values to choose from"
        )


@dataclass(frozen=True)
class Subset:
    """One or more of some items, in any order."""

    name: str
    items: tuple[str, ...]

    def mistake(self) -> str | None:
        """See `Choice.mistake`."""
        if not self.items:
            return "has no items to take a subset of; give one or more"
        return _twice(self.items)

    def read(self, value: Any) -> tuple[str, ...]:
        """See `Choice.read`."""
        taken = set(value) if isinstance(value, (list, tuple, set, frozenset)) else {value}
        unknown = sorted(str(item) for item in taken if item not in self.items)
        if unknown:
            raise ValueError(f"{self.name}: {unknown[0]!r} is not one of {_listed(self.items)}")
        if not taken:
            raise ValueError(f"{self.name}: an empty subset; take one item or more")
        return tuple(item for item in self.items if item in taken)

    def points(self) -> Iterator[tuple[str, ...]]:
        """See `Choice.points`; the smallest subsets first."""
        for size in range(1, len(self.items) + 1):
            yield from itertools.combinations(self.items, size)


Parameter = Choice | Integer | Real | Subset


# --- Spaces ---


@dataclass(frozen=True)
class WarmStart:
    """A trial that runs before all suggestions."""

    name: str
    values: Values


@dataclass(frozen=True)
class Space:
    """The values that a search may try, and the first trials."""

    parameters: tuple[Parameter, ...]
    #: values -> `KEY=VALUE` overrides of the base recipe (see `override`). Settings without effect
    #: under these values are left out, so that equal trials are recognized.
    to_overrides: Callable[[Values], list[str]]
    warm_starts: tuple[WarmStart, ...] = ()

    def read(self, values: Values) -> dict[str, Any]:
        """Return values in this space's own form (lists from JSON become tuples, in order).

        Raises:
            ValueError: a parameter is missing or unknown, or a value is outside the space.
        """
        if set(values) != set(self.names):
            raise ValueError(f"values of {_listed(values)} in a space of {_listed(self.names)}")
        return {parameter.name: parameter.read(values[parameter.name]) for parameter in self}

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [parameter.name for parameter in self]

    def key(self, values: Values) -> str:
        """Return the sorted overrides as JSON: equal for trials that would train the same."""
        return dumps(sorted(self.to_overrides(self.read(values))))

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield all values, for a grid; the last parameter varies fastest.

        Raises:
            ValueError: a parameter is continuous.
        """
        columns = [parameter.points() for parameter in self]
        for row in itertools.product(*columns):
            yield dict(zip(self.names, row, strict=True))

    def check(self) -> None:
        """Raise ValueError, with a one-line message, for a space that cannot be searched."""
        if not self.parameters:
            raise ValueError("the space varies nothing; give it a parameter")
        if repeated := _twice(self.names):
            raise ValueError(f"parameters: {repeated}")
        for parameter in self:
            if mistake := parameter.mistake():
                raise ValueError(f"{parameter.name}: {mistake}")
        for start in self.warm_starts:
            try:
                values = self.read(start.values)
            except ValueError as error:
                raise ValueError(f"warm start {start.name}: {error}") from error
            for text in self.to_overrides(values):
                parse_override(text)


@dataclass(frozen=True)
class Tasks:
    """The candidate tasks of a few-shot recipe as Algorithm 1 scores them.

    The fields are those of `fmray.selection.Selection`, and the keys of `tasks.json`.
    """

    names: Sequence[str]  #: the tasks that Algorithm 1 selects
    order: Sequence[str]  #: all tasks, most similar to the target first
    similarity: Sequence[float]  #: of each task in `order`
    coverage: Sequence[float]  #: of the target by the first 1, 2, ... tasks of `order`


def override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` as `--set` takes it."""
    return f"{key}={dump_value(list(value) if isinstance(value, tuple) else value)}"


def warm_start(name: str, parameters: Sequence[Parameter], values: Values) -> tuple[WarmStart, ...]:
    """Return a warm start, or () if its values are outside the space (a base recipe's may be)."""
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
    """Return the checked space `name` of `tune_spaces/` for a base recipe.

    Args:
        tasks: called if the space varies which tasks to train on; it embeds the candidates.

    Raises:
        ValueError: the space or an option does not exist, the base recipe is of another kind, or
            the space cannot be searched.
    """
    module = _load(name)
    try:
        read = module.Options.model_validate_json(json.dumps(dict(options)), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, module.Options, prefix="options")) from error
    try:
        if getattr(module, "TASKS", False):
            if tasks is None:
                raise ValueError(
                    "it varies tasks, and there are no tasks; use a few-shot base recipe"
                )
            space = module.space(base, read, tasks())
        else:
            space = module.space(base, read)
        space.check()
    except ValueError as error:
        raise ValueError(f"space {name}: {error}") from error
    return space


def _load(name: str) -> ModuleType:
    """Import a file of `tune_spaces/`, which is not a package."""
    package = Path(__file__).parents[1]
    # next to the package in a checkout, inside it in a wheel
    folders = [package.parent / "tune_spaces", package / "_tune_spaces"]
    files = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    if name not in files:  # a name, never a path: no code from elsewhere is run
        raise ValueError(f"space: tune_spaces/ has no {name!r}; it has {_listed(sorted(files))}")
    specification = importlib.util.spec_from_file_location(f"tune_spaces.{name}", files[name])
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # Pydantic resolves annotations there
    specification.loader.exec_module(module)
    for needed in ("Options", "space"):
        if not hasattr(module, needed):
            raise ValueError(
                f"space: tune_spaces/{name}.py defines no `{needed}`; see the other files there"
            )
    return module


def _twice(values: Sequence[Any]) -> str | None:
    for index, value in enumerate(values):
        if value in values[:index]:
            return f"{value!r} is listed twice; keep one of them"
    return None


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
