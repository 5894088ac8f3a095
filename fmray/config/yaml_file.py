"""Read YAML files and `key=VALUE` overrides into trees that know where each value was written.

A recipe may extend one parent (`extends:`); overrides go on top. The result is a tree of `Entry`.
`explain` turns Pydantic's complaint about such a tree into one line with file, line, key, reason
and remedy. The meaning of the keys is up to the models of `fmray.config`.

The YAML is version 1.2's core schema: `1e-5` is a number; `on`, `no` and `2024-01-01` are strings;
`010` is ten. (PyYAML implements 1.1, in which a forgotten dot turns a learning rate into text.)
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
from pydantic_core import ErrorDetails

from fmray.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_PARENTS = 10


@dataclass(frozen=True)
class Entry:
    """A value and where it was written."""

    value: Any  # a scalar, `dict[str, Entry]` for a mapping, `list[Entry]` for a list
    origin: str  # `file:line`, or another name such as `--set`

    def plain(self) -> Any:
        """Return the value without origins."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def child(self, key: str) -> Entry | None:
        """Return the entry at a key of a mapping or an index of a list; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None


# --- YAML 1.2 -------------------------------------------------------------------------------------

RESOLVERS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
COLLECTION_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars, without aliases (which can expand forever)."""

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
        """Return a decimal integer; PyYAML reads `010` as eight."""
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Writes scalars that `_Loader` reads back unchanged."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, (_pattern, _starts) in RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def dump_value(value: Any) -> str:
    """Return one line of YAML for a scalar or a list of scalars."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse(text: str, name: str, secret: bool = False) -> Entry | None:
    """Return the tree of one YAML text; None if it is empty.

    Args:
        name: what origins and errors call the text.
        secret: errors quote nothing of the text.

    Raises:
        ConfigError: not YAML, a duplicate key, a key that is not a string, a tag or an alias.
    """
    try:
        # The loader's constructor already rejects characters that YAML forbids.
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _entry(node, loader, name)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        where, reason = f"{name}{line}", f"not valid YAML: {error.problem}"
    except yaml.YAMLError as error:
        where, reason = name, f"not valid YAML: {' '.join(str(error).split())}"
    except _Mistake as error:
        where, reason = f"{name}:{error.line}", error.reason
    if secret:
        reason = "not valid YAML with unique keys, no tags and no aliases"
    raise ConfigError(f"{where}: {reason}")


class _Mistake(Exception):
    """Valid YAML that a settings file may not contain."""

    def __init__(self, node: yaml.Node, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = node.start_mark.line + 1, reason


def _entry(node: yaml.Node, loader: _Loader, name: str) -> Entry:
    origin = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.CollectionNode):
        try:
            return Entry(loader.construct_object(node, deep=True), origin)
        except ValueError as error:  # such as `!!int text`, or a number of 5000 digits
            raise _Mistake(node, f"not valid YAML: {error}") from error
    if node.tag not in COLLECTION_TAGS:
        raise _Mistake(node, f"not valid YAML: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(item, loader, name) for item in node.value], origin)
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _Mistake(key_node, f"the key {key!r} is not a name; keys are plain text")
        if key in entries:
            line = entries[key].origin.rpartition(":")[2]
            raise _Mistake(
                key_node, f"{key} is written twice (first in line {line}); keep one of them"
            )
        # A mapping's own mark is the line of its first key; the line of its name is more useful.
        where = f"{name}:{key_node.start_mark.line + 1}"
        entries[key] = Entry(_entry(value_node, loader, name).value, where)
    return Entry(entries, origin)


# --- Files, parents and overrides -----------------------------------------------------------------


def read(path: Path, overrides: Sequence[str] = ()) -> Entry:
    """Return the tree of the recipe at `path`, on top of its parents, under the overrides.

    Raises:
        ConfigError: with file, line and key.
    """
    return override(_read_with_parents(path, ()), overrides)


def read_yaml(path: Path, what: str, secret: bool = False) -> Entry | None:
    """Return the tree of one YAML file, without parents; None if it is empty.

    Args:
        what: the kind of file, for errors.
        secret: see `parse`.

    Raises:
        ConfigError: missing, too large, not UTF-8 text, or see `parse`.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, not a {what}; name a YAML file in it")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such {what}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; this is not a {what}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        # The error holds the text, which may be secret: it is not chained.
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    return parse(text, str(path), secret)


def override(tree: Entry, overrides: Sequence[str]) -> Entry:
    """Return the tree with `key=VALUE` overrides on top, the last one first."""
    for text in overrides:
        tree = _merge(tree, parse_override(text))
    return tree


def parse_override(text: str) -> Entry:
    """Return the tree of one `--set`, such as `train.lr=1e-5`; the value is YAML, as in a file."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: write key=VALUE with a dotted key, such as train.lr=1e-5")
    parsed = parse(value, f"--set {text}")
    entry = _relabel(parsed, "--set") if parsed else Entry(None, "--set")
    for part in reversed(key.split(".")):
        entry = Entry({part: entry}, "--set")
    return entry


def _merge(base: Entry, over: Entry) -> Entry:
    """Put `over` on top of `base`: mappings merge key by key, all else (lists, null) replaces."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, entry in over.value.items():
        merged[key] = _merge(merged[key], entry) if key in merged else entry
    return Entry(merged, over.origin)


def _relabel(entry: Entry, origin: str) -> Entry:
    value = entry.value
    if isinstance(value, dict):
        value = {key: _relabel(child, origin) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_relabel(child, origin) for child in value]
    return Entry(value, origin)


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> Entry:
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(child.name for child in (*children, resolved))
        raise ConfigError(f"{children[-1]}: `extends` forms a circle: {chain}")
    if len(children) > MAX_PARENTS:
        raise ConfigError(f"{path}: more than {MAX_PARENTS} recipes extend one another")
    tree = _read_recipe(path)
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
    return _merge(_read_with_parents(parent_path, (*children, resolved)), tree)


def _read_recipe(path: Path) -> Entry:
    tree = read_yaml(path, "recipe file")
    if tree is None or tree.value is None:
        raise ConfigError(f"{path}: the recipe is empty; it needs at least `name:`")
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else f"the value {tree.value!r}"
        raise ConfigError(f"{tree.origin}: a recipe is a mapping of `key: value` lines, not {kind}")
    return tree


# --- Errors ---------------------------------------------------------------------------------------


def explain(
    error: ValidationError,
    model: type[BaseModel],
    tree: Entry | None = None,
    origin: str = "",
    prefix: str = "",
    secret: bool = False,
) -> str:
    """Return one line for Pydantic's first complaint: where, which key, why, and how many more.

    Args:
        model: the model that refused the values; it has the nearest name to an unknown key.
        tree: the values; the line starts with the origin of the key, or of what is next above it.
        origin: starts the line if the tree has no such key.
        prefix: dotted key of the section that `model` describes.
        secret: values, and names of unknown keys, are not quoted.
    """
    mistakes = error.errors(include_url=False)
    mistake = _first(mistakes)
    keys = _keys_of(mistake)
    is_unknown = mistake["type"] == "extra_forbidden"
    reason = unknown_key(keys, model, prefix) if is_unknown else reason_of(mistake, secret)
    where, entry = origin, tree
    for key in keys:
        entry = entry and entry.child(key)
        if entry is None:
            break
        where = entry.origin
    if secret and is_unknown:
        keys = keys[:-1]
    dotted = ".".join([prefix, *keys] if prefix else keys)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return ": ".join(part for part in (where, dotted, reason + more) if part)


def unknown_key(keys: Sequence[str], model: type[BaseModel], prefix: str = "") -> str:
    """Return what is right instead of an unknown key: the nearest name in its section, the same
    name in another one, or all names of the section.
    """
    section = _section(model, keys[:-1])
    start = [prefix, *keys[:-1]] if prefix else keys[:-1]
    close = difflib.get_close_matches(keys[-1], section.model_fields, n=1)
    if close:
        return f"there is no such key; did you mean {'.'.join([*start, close[0]])}?"
    elsewhere = [key for key in _dotted(model, "") if key.rpartition(".")[2] == keys[-1]]
    if elsewhere:
        return f"there is no such key; did you mean {' or '.join(elsewhere)}?"
    return f"there is no such key; the keys here are {', '.join(section.model_fields)}"


def _first(mistakes: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the first mistake; a missing key gives way to a misspelt one in the same section."""
    first = mistakes[0]
    if first["type"] != "missing":
        return first
    unknown = (mistake for mistake in mistakes if mistake["type"] == "extra_forbidden")
    return next((m for m in unknown if m["loc"][:-1] == first["loc"][:-1]), first)


def reason_of(mistake: ErrorDetails, secret: bool = False) -> str:
    """Return what is wrong with a value and what would be right, without its key.

    Args:
        mistake: one of `ValidationError.errors()`; with `secret` it needs no `input`.
        secret: the value is not quoted.
    """
    kind, message = mistake["type"], mistake["msg"]
    context = mistake.get("ctx", {})
    quoted = "" if secret else f", not {_short(mistake['input'])}"
    match kind:
        case "conflict":
            return context["text"]
        case "missing" if isinstance(mistake["loc"][-1], int):
            return "is missing (the list is too short)"
        case "missing":
            return "is missing"
        case "credentials":
            return message
        case "value_error":
            return message.removeprefix("Value error, ")
        case "too_short":
            return f"should be a list of {context['min_length']} or more{quoted}"
        case "tuple_type":
            return f"should be a list such as [1, 2]{quoted}"
        case "model_type":
            return f"should be a mapping of keys{quoted}"
        case "string_pattern_mismatch":
            return f"should match {context['pattern']}{quoted}"
        case "string_type" if isinstance(mistake.get("input"), (int, float)):
            return f"should be text{quoted}; write it in quotes"
    expected = message.removeprefix("Input ")
    return f"{expected[0].lower()}{expected[1:]}{quoted}"


def _keys_of(mistake: ErrorDetails) -> list[str]:
    """Return the path to the mistake, relative to the model."""
    keys = [str(key) for key in mistake["loc"]]
    if keys and keys[-1].endswith("]"):  # a branch of a union, or a dict's `[key]`
        keys.pop()
    if mistake["type"] == "conflict":
        keys += mistake["ctx"]["key"].split(".")
    return keys


def _short(value: Any) -> str:
    text = dump_value(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _section(model: type[BaseModel], keys: Sequence[str]) -> type[BaseModel]:
    """Return the model at `keys`; indices of lists and names in dicts are passed over."""
    for key in keys:
        if key in model.model_fields:
            model = next(_models(model.model_fields[key].annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation such as `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _dotted(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models(field.annotation):
            yield from _dotted(section, f"{prefix}{name}.")
