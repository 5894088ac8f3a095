"""Method rooms do not know the platform: the rule of pyproject.toml, kept and complete."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHOD_ROOMS = {"adallava", "engine", "fewshot", "selection"}


def contract() -> dict[str, list[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [rule] = settings["tool"]["importlinter"]["contracts"]
    return rule


def test_method_rooms_do_not_import_the_platform() -> None:
    program = (
        "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_the_rule_names_every_room() -> None:
    """A file or room that is added has to be put on one side or the other."""
    names = {
        path.stem
        for path in (ROOT / "fmray").iterdir()
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    rule = contract()
    method = {f"fmray.{name}" for name in names & METHOD_ROOMS}
    platform = {f"fmray.{name}" for name in names - METHOD_ROOMS}
    assert set(rule["source_modules"]) == method
    assert {name for name in rule["forbidden_modules"] if name.startswith("fmray.")} == platform
    assert {"ray", "deepspeed", "mlflow", "fastapi", "starlette", "peft"} <= set(
        rule["forbidden_modules"]
    )
