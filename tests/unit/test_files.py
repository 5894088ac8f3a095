"""Atomic files and folders: the old content or the new, never a mixture, and nothing left over."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

import fmray
from fmray.runtime.files import atomic_folder, atomic_path, dumps, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced(tmp_path: Path, durable: bool) -> None:
    write_atomic(tmp_path / "a.txt", "old", durable)
    write_atomic(tmp_path / "a.txt", b"n\xc3\xa9w", durable)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "n\u00e9w"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write_atomic(tmp_path / "a.txt", "old")

    def interrupted() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    values = {"x": [1, None, 2.5], "y": {"z": (math.nan, -math.inf)}, "n": np.float64("nan")}
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [1, None, 2.5], "y": {"z": [None, None]}, "n": None}
    assert dumps({"b": math.inf, "a": {1, 2}}, sort_keys=True, default=sorted) == (
        '{"a": [1, 2], "b": null}'
    )
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps({"a": math.nan, "b": object()})


def test_all_json_is_written_by_dumps() -> None:
    """`json.dumps` writes NaN. Some modules use it for values that they read again at once."""
    root = Path(fmray.__file__).parent
    writers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            (isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder"))
            and (isinstance(node.value, ast.Name) and node.value.id == "json")
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
    }
    read_at_once = {"config/recipes.py", "search/space.py"}
    read_at_once |= {"serve/image_pool.py", "serve/image_worker.py"}  # messages over a pipe
    assert writers == {"runtime/files.py"} | read_at_once


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for word in ("old", "new"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / word).write_text(word)
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text(word)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new", "sub"]


def test_an_interrupted_folder_keeps_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "old").write_text("old")

    def interrupted() -> None:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_a_leftover_of_a_killed_process_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("half")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]
