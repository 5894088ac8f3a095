"""Generate the tables of every recipe key for `recipes.md`, from the JSON schema.

mkdocs runs `on_page_markdown` as a hook (see mkdocs.yml), so the built page matches the code.
Run as a script, this file prints the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fmray.commands.config import schema
from fmray.config.serve import ServeConfig

MARKER = "<!-- generated: every key -->"
Node = dict[str, Any]
BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": "≥",
    "exclusiveMaximum": "<",
    "maximum": "≤",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the tables into `recipes.md` (an mkdocs hook)."""
    if page.file.src_uri != "recipes.md":
        return markdown
    if MARKER not in markdown:
        raise ValueError(f"docs/recipes.md has no line {MARKER!r}")
    return markdown.replace(MARKER, reference())


def reference() -> str:
    """Return the tables of all recipe kinds and of the endpoint's settings, as Markdown."""
    complete = schema()
    lines: list[str] = []
    for kind in _kinds(complete):
        name = kind["properties"]["kind"]["const"]
        lines += [f"### `kind: {name}`", "", *_section("", kind, complete["$defs"])]
    endpoint = ServeConfig.model_json_schema()
    lines += ["### Endpoint settings", ""]
    lines += [
        "`args:` of `cluster/serve.yaml`, and `--set KEY=VALUE` of `fmray serve`.",
        "",
        *_section("", endpoint, endpoint.get("$defs", {})),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _kinds(node: Node) -> Iterator[Node]:
    """Yield the schema of each kind; `schema` nests them as if/then/else."""
    alternatives = []
    while "if" in node:
        alternatives.append(node["then"])
        node = node["else"]
    yield node
    yield from reversed(alternatives)


def _section(prefix: str, section: Node, definitions: dict[str, Node]) -> Iterator[str]:
    """Yield a table of the section's own keys, then its subsections."""
    rows: list[str] = []
    subsections: list[tuple[str, str, Node]] = []
    required = section.get("required", [])
    for key, node in section["properties"].items():
        path = f"{prefix}{key}"
        nested = _nested(node, definitions)
        if nested is not None:
            suffix, definition = nested
            subsections.append((path, path + suffix, definition))
            if suffix == "" and not _optional(node):
                continue
        default = "required" if key in required else _default(key, node)
        text = node.get("description", "")
        if nested is not None:
            text = f"{text}; see `{subsections[-1][1]}`".removeprefix("; ")
        rows.append(f"| `{path}` | {_type(node, definitions)} | {default} | {_cell(text)} |")
    if rows:
        yield from ("| key | type | default | description |", "| --- | --- | --- | --- |")
        yield from (*rows, "")
    for _, title, definition in subsections:
        yield from (f"#### `{title}`", "")
        if "description" in definition:
            yield from (definition["description"].replace("\n", " "), "")
        yield from _section(f"{title}.", definition, definitions)


def _nested(node: Node, definitions: dict[str, Node]) -> tuple[str, Node] | None:
    """Return (path suffix, definition) of the section below a key, or None for a plain value."""
    if "$ref" in node:
        definition = definitions[node["$ref"].rpartition("/")[2]]
        return ("", definition) if "properties" in definition else None
    for option in node.get("anyOf", []):
        if (nested := _nested(option, definitions)) is not None:
            return nested
    for container, suffix in (("items", "[]"), ("additionalProperties", ".NAME")):
        inner = node.get(container)
        if isinstance(inner, dict) and (nested := _nested(inner, definitions)) is not None:
            return suffix + nested[0], nested[1]
    return None


def _optional(node: Node) -> bool:
    return any(option.get("type") == "null" for option in node.get("anyOf", []))


def _default(key: str, node: Node) -> str:
    if "const" in node:
        return f"`{node['const']}`"
    if "default" not in node:
        return "none" if key == "extends" else "required"
    return f"`{_cell(json.dumps(node['default'], ensure_ascii=False))}`"


def _type(node: Node, definitions: dict[str, Node]) -> str:
    """Return the type of a value in words, with its bounds."""
    if "$ref" in node:
        definition = definitions[node["$ref"].rpartition("/")[2]]
        return "section" if "properties" in definition else _type(definition, definitions)
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "anyOf" in node:
        return " or ".join(_type(option, definitions) for option in node["anyOf"])
    bounds = [f"{sign} {node[name]:g}" for name, sign in BOUNDS.items() if name in node]
    words = " ".join((_plain_type(node, definitions), ", ".join(bounds))).strip()
    return f"{words} matching `{_cell(node['pattern'])}`" if "pattern" in node else words


def _plain_type(node: Node, definitions: dict[str, Node]) -> str:
    match node.get("type"):
        case "array" if "prefixItems" in node:
            inner = ", ".join(_type(item, definitions) for item in node["prefixItems"])
            return f"[{inner}]"
        case "array":
            return f"list of {_type(node.get('items', {}), definitions)}"
        case "object":
            inner = node.get("additionalProperties")
            values = _type(inner, definitions) if isinstance(inner, dict) and inner else "value"
            return f"mapping of name to {values}"
        case "string":
            return "path" if node.get("format") == "path" else "text"
        case None:
            return "any"
        case name:
            return str(name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(reference(), end="")
