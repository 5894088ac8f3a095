"""The `fmray` command: exit codes, errors of one line, and a start without torch or Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmray.cli import COMMANDS, main
from fmray.errors import exit_code


def test_help_lists_all_commands_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom fmray.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_a_wrong_or_missing_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["trian"], []):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_config_prints_origins_and_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("name: a\n")
    assert main(["config", str(recipe), "--set", "seed=3"]) == 0
    assert "seed: 3  # --set\n" in capsys.readouterr().out
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)  # nested by kind, the last one outside
    assert "extends" in schema["then"]["properties"]
    assert main(["config"]) == 2
    assert main(["config", str(recipe), "--schema"]) == 2
    assert main(["config", str(recipe), "--set", "sed=3"]) == 2
    mistakes = capsys.readouterr().err.splitlines()
    assert len(mistakes) == 3
    assert mistakes[2] == "fmray: --set: sed: there is no such key; did you mean seed?"


def test_exit_code_tells_mistakes_from_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda code: code, 3) == 3
    missing = Path("no") / "such" / "file"
    assert exit_code(missing.read_text) == 2
    assert str(missing) in capsys.readouterr().err
    with pytest.raises(ValueError, match="Expecting value"):
        exit_code(json.loads, "raised inside a library: a bug of ours, not a mistake in a recipe")
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_not_an_error(lines: int) -> None:
    program = (
        "import sys; from fmray.errors import exit_code\n"
        f"sys.exit(exit_code(print, 'many lines\\n' * {lines}))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(timeout=60) == 141
