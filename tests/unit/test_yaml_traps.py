"""Recipes with YAML's and editors' traps: read right, or refused with file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmray.config import load
from fmray.errors import ConfigError

BASE = "name: base\ntrain:\n  lr: 1e-5\nseed: 3\n"
RIGHT: dict[str, tuple[bytes, str, Any]] = {
    "byte order mark": (b"\xef\xbb\xbfextends: base.yaml\nname: bom\n", "name", "bom"),
    "CRLF": (b"extends: base.yaml\r\ntrain:\r\n  lr: 2e-5\r\n", "train.lr", 2e-5),
    "1e-5 is a number": (b"extends: base.yaml\n", "train.lr", 1e-5),
    "no is text": (b"extends: base.yaml\nname: no\n", "name", "no"),
    "on is text": (b"extends: base.yaml\nname: on\n", "name", "on"),
    "010 is ten": (b"extends: base.yaml\ntrain: {steps: 010}\n", "train.steps", 10),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "key twice": (b"name: a\nseed: 1\nseed: 2\n", ":3: seed is written twice (first in line 2)"),
    "empty section": (b"extends: base.yaml\ntrain:\n", ":2: train: should be a mapping"),
    "float for an integer": (
        b"extends: base.yaml\ntrain:\n  steps: 3.0\n",
        ":3: train.steps: should be a valid integer, not 3.0",
    ),
    "underscores": (
        b"extends: base.yaml\ntrain:\n  steps: 1_000\n",
        ":3: train.steps: should be a valid integer, not 1_000",
    ),
    "Hugging Face's names": (
        b"extends: base.yaml\ntrain:\n  learning_rate: 1e-5\n",
        ":3: train.learning_rate: there is no such key",
    ),
    "infinite": (b"extends: base.yaml\ntrain:\n  lr: .inf\n", ":3: train.lr: should be a finite"),
    "quoted number": (b"extends: base.yaml\ntrain:\n  lr: '1e-5'\n", ":3: train.lr: should be"),
    "Latin-1": (b"extends: base.yaml\nname: \xf4\xe9\n", "not a text file in UTF-8 (byte 25)"),
    "extends itself": (b"extends: trap.yaml\n", "`extends` forms a circle"),
    "two parents": (b"extends: [base.yaml, x.yaml]\n", ":1: extends: should name one recipe"),
    "merge key": (b"extends: base.yaml\nzero:\n  <<: {stage: 1}\n", ":3: zero.<<: there is no"),
    "commit that is a number": (
        b"extends: base.yaml\nmodel:\n  revision: 1234567\n",
        ":3: model.revision: should be text, not 1234567; write it in quotes",
    ),
    "commit that is 4481e27": (
        b"extends: base.yaml\nmodel:\n  revision: 4481e27\n",
        ":3: model.revision: should be text, not 4.481e+30; write it in quotes",
    ),
    "tab": (b"extends: base.yaml\ntrain:\n\tlr: 1e-5\n", ":3: not valid YAML"),
    "two documents": (b"name: a\n---\nname: b\n", ":2: not valid YAML"),
    "two training files": (
        b"extends: base.yaml\ndata:\n  train:\n    - a.json\n    - b.json\n",
        ":3: data.train: should be a valid string, not [a.json, b.json]",
    ),
    "yes for true": (
        b"extends: base.yaml\ntrain:\n  gradient_checkpointing: yes\n",
        ":3: train.gradient_checkpointing: should be a valid boolean, not yes",
    ),
}


def written(folder: Path, text: bytes) -> Path:
    (folder / "base.yaml").write_text(BASE)
    (folder / "trap.yaml").write_bytes(text)
    return folder / "trap.yaml"


@pytest.mark.parametrize("name", RIGHT)
def test_a_trap_is_read_right(tmp_path: Path, name: str) -> None:
    text, key, expected = RIGHT[name]
    value: Any = load(written(tmp_path, text)).recipe
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_trap_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(ConfigError) as refusal:
        load(written(tmp_path, text))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
