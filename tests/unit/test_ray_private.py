"""The private names of Ray and DeepSpeed: one module names them, and a missing one is one line."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fmray.errors import ConfigError, exit_code
from fmray.runtime import ray_private

ROOT = Path(__file__).parents[2]
PRIVATE = {module for module, _ in ray_private.NAMES.values()} | {"ray._raylet", "ray.train.v2"}


def names_used(source: str) -> Iterator[str]:
    """Yield the dotted names of modules and attributes in a program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def private_names(source: str) -> list[str]:
    """Return the private names of Ray and DeepSpeed that a program uses."""
    return [
        name
        for name in names_used(source)
        if name.partition(".")[0] in ("ray", "deepspeed")
        and (
            any(part.startswith("_") for part in name.split("."))
            or any(f"{name}.".startswith(f"{module}.") for module in PRIVATE)
        )
    ]


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from ray._private.state import state", True),
        ("import ray\nray._private.worker", True),
        ("from ray.train.v2.api import x", True),
        ("from deepspeed.checkpoint import ds_to_universal", True),
        ("import deepspeed\ndeepspeed.comm.comm.cdb", True),
        ("import deepspeed\ndeepspeed.ops.__compatible_ops__", True),
        ("import ray.train\nray.train.report({})", False),
        ("from ray.util.state import list_actors", False),
    ],
)
def test_private_names_are_recognised(source: str, private: bool) -> None:
    assert bool(private_names(source)) == private


def test_only_ray_private_uses_private_names() -> None:
    files = [
        path
        for folder in ("fmray", "jobs", "tune_spaces", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "fmray/runtime/ray_private.py"
    ]
    assert len(files) > 100
    uses = {path.name: private_names(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in uses.items() if names} == {}


def test_the_installed_versions_have_every_name() -> None:
    ray_private.check_ray()
    for module, _ in ray_private.NAMES.values():  # DeepSpeed takes seconds to import
        assert module.startswith("ray.") or importlib.util.find_spec(module.partition(".")[0])


@pytest.mark.parametrize(
    ("entry", "missing"),
    [
        (("ray.train.v2._internal.constants", "RENAMED"), "RENAMED"),
        (("ray.train.v3.constants", "NAMES"), "NAMES"),
    ],
    ids=["name", "module"],
)
def test_a_missing_name_is_one_line_with_the_versions(
    entry: tuple[str, str],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(ray_private.NAMES, "ENV_VARS_TO_PROPAGATE", entry)
    monkeypatch.setattr(ray_private, "version", lambda package: "2.99.0")
    with pytest.raises(ConfigError, match=r"^ray 2\.99\.0 has no ray\.train\..*\." + missing):
        _ = ray_private.ENV_VARS_TO_PROPAGATE
    assert exit_code(ray_private.check_ray) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith('fmray is tested with ray 2.60: pip install "ray==2.60.*"')


def test_pyproject_pins_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {pin.name: pin.specifier for pin in map(Requirement, project["dependencies"])}
    for package, tested in ray_private.TESTED.items():
        major, minor = map(int, tested.split("."))
        assert pins[package].contains(f"{tested}.99")
        assert not pins[package].contains(f"{major}.{minor - 1}.99")
        assert not pins[package].contains(f"{major}.{minor + 1}.0")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ray_private.nonsense
