"""Recipe files: YAML with at most one `extends:` parent, and dotted `key=VALUE` overrides.

In: the path of a recipe and the overrides of the command line. Out: one tree of `Entry`, each of
which knows where it was written, and texts for mistakes in it that Pydantic finds. What the keys
mean is `fmray.config`'s business.

The YAML is version 1.2's core schema: `1e-5` is a number; `on`, `no` and `2024-01-01` are strings.
(PyYAML speaks 1.1, in which a forgotten dot turns a learning rate into text.)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fmray.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_PARENTS = 10


@dataclass(frozen=True)
class Entry:
    """A value of a recipe (`dict[str, Entry]` for a mapping) and where it was written."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return self.value


RESOLVERS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars, without aliases (which can expand for ever)."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed; write the value out, or use `extends:`",
                problem_mark=event.start_mark,
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Decimal whole numbers; PyYAML would read `010` as eight."""
        return int(self.construct_scalar(node))


class RecipeDumper(yaml.SafeDumper):
    """Writes scalars so that `RecipeLoader` reads them back as they were."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, (_pattern, _first) in RESOLVERS.items():
    for _class in (RecipeLoader, RecipeDumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_decimal)


def dump_value(value: Any) -> str:
    """One line of YAML for a scalar or a list of scalars."""
    text = yaml.dump(
        value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse(text: str, name: str) -> Entry | None:
    """The tree of one YAML text; None when it is empty. `name` is what origins and errors call it.

    Raises:
        ConfigError: not YAML, a duplicate key, a key that is not a string, or a tag or alias.
    """
    try:
        # A text with characters YAML forbids fails in the loader's constructor already.
        loader = RecipeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _entry(node, loader, name)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: not valid YAML: {reason}") from error


def _entry(node: yaml.Node, loader: RecipeLoader, name: str) -> Entry:
    origin = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        try:
            return Entry(loader.construct_object(node, deep=True), origin)
        except ValueError as error:  # such as `!!int text`, or a number of 5000 digits
            raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is not a name; keys are plain text")
        if key in entries:
            first = entries[key].origin.rpartition(":")[2]
            raise ConfigError(
                f"{where}: {key} is written twice (first in line {first}); keep one of them"
            )
        # A mapping's own mark is the line of its first key: the line of its name is the useful one.
        entries[key] = Entry(_entry(value_node, loader, name).value, where)
    return Entry(entries, origin)


def merge(base: Entry, over: Entry) -> Entry:
    """`over` on top of `base`: mappings merge key by key, all else (lists, null) replaces."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, entry in over.value.items():
        merged[key] = merge(merged[key], entry) if key in merged else entry
    return Entry(merged, over.origin)


def read(path: Path, overrides: Sequence[str] = ()) -> Entry:
    """The recipe at `path` on top of its parents, with the overrides on top of that.

    Raises:
        ConfigError: with file, line and key, whatever is wrong.
    """
    tree = _read_with_parents(path, ())
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return tree


def parse_override(text: str) -> Entry:
    """The tree of one `--set`, such as `train.lr=1e-5`; the value is YAML, as in a file."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: write key=VALUE with a dotted key, such as train.lr=1e-5")
    parsed = parse(value, f"--set {text}")
    entry = _relabel(parsed, "--set") if parsed else Entry(None, "--set")
    for part in reversed(key.split(".")):
        entry = Entry({part: entry}, "--set")
    return entry


def _relabel(entry: Entry, origin: str) -> Entry:
    value = entry.value
    if isinstance(value, dict):
        value = {key: _relabel(child, origin) for key, child in value.items()}
    return Entry(value, origin)


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> Entry:
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(child.name for child in (*children, resolved))
        raise ConfigError(f"{children[-1]}: `extends` goes round in a circle: {chain}")
    if len(children) > MAX_PARENTS:
        raise ConfigError(f"{path}: more than {MAX_PARENTS} recipes extend one another")
    tree = _read_file(path)
    parent = tree.value.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent.value, str) or not parent.value:
        raise ConfigError(
            f"{parent.origin}: extends: should name one recipe file, not {parent.plain()!r}"
        )
    parent_path = path.parent / parent.value
    if not parent_path.is_file():
        raise ConfigError(f"{parent.origin}: extends: there is no file {parent_path}")
    return merge(_read_with_parents(parent_path, (*children, resolved)), tree)


def _read_file(path: Path) -> Entry:
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, not a recipe; name a YAML file in it")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such recipe file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; this is not a recipe")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    tree = parse(text, str(path))
    if tree is None or tree.value is None:
        raise ConfigError(f"{path}: the recipe is empty; it needs at least `name:`")
    if not isinstance(tree.value, dict):
        raise ConfigError(
            f"{tree.origin}: a recipe is a mapping of `key: value` lines, not {_kind(tree.value)}"
        )
    return tree


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the value {value!r}"


def explain(error: ValidationError, tree: Entry, path: Path, model: type[BaseModel]) -> str:
    """One line for Pydantic's first complaint about `tree`, with the number of the others."""
    mistakes = error.errors(include_url=False)
    mistake = mistakes[0]
    kind, context = mistake["type"], mistake.get("ctx", {})
    keys = [str(key) for key in mistake["loc"]]
    if kind == "conflict":
        keys = context["key"].split(".")
        text = context["text"]
    elif kind == "extra_forbidden":
        text = f"there is no such key; {_nearest(keys, model)}"
    elif kind == "missing" and isinstance(mistake["loc"][-1], int):
        text = "is missing (the list is too short)"
    elif kind == "missing":
        text = "is missing"
    elif kind == "too_short":
        text = f"should be a list of {context['min_length']} or more, not []"
    elif kind == "tuple_type":
        text = f"should be a list such as [1, 2], not {_short(mistake['input'])}"
    elif kind == "model_type":
        text = f"should be a mapping of keys, not {_short(mistake['input'])}"
    elif kind == "string_pattern_mismatch":
        text = f"should match {context['pattern']}, not {_short(mistake['input'])}"
    else:
        wanted = mistake["msg"].removeprefix("Input ")
        text = f"{wanted[0].lower()}{wanted[1:]}, not {_short(mistake['input'])}"
    where, entry = str(path), tree
    for key in keys:
        if not isinstance(entry.value, dict) or key not in entry.value:
            break
        entry = entry.value[key]
        where = entry.origin
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{where}: {'.'.join(keys)}: {text}{more}"


def _short(value: Any) -> str:
    text = dump_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(keys: list[str], model: type[BaseModel]) -> str:
    """What to say of an unknown key: the nearest in its section, the same elsewhere, or all."""
    everything = list(_dotted(model, ""))
    section = ".".join(keys[:-1])
    names = [
        name for parent, _, name in (key.rpartition(".") for key in everything) if parent == section
    ]
    close = difflib.get_close_matches(keys[-1], names, n=1)
    if close:
        return f"did you mean {'.'.join([*keys[:-1], close[0]])}?"
    elsewhere = [key for key in everything if key.rpartition(".")[2] == keys[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the keys here are {', '.join(names)}"


def _dotted(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _dotted(part, f"{prefix}{name}.")
