"""`trials.jsonl` is read as it was written, even after a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fmray.search.state import FinishedTrial, append_trial, read_finished

TRIAL = FinishedTrial(
    number=3,
    key='{"tasks": ["a", "b"]}',
    values={"tasks": ["a", "b"], "lr": 1e-3},
    overrides=("select.only=[a, b]", "train.lr=0.001"),
    metrics={"accuracy": 0.5},
    curve=({"step": 2, "accuracy": 0.4}, {"step": 4, "accuracy": 0.5}),
    status="done",
    reason=None,
    seconds=1.5,
    started=1e9,
    steps=4,
    origin="warm: all",
)


def test_complete_lines_are_read_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    assert read_finished(path) == []
    failed = replace(TRIAL, number=4, metrics={}, curve=(), status="failed", reason="no\nmemory é")
    append_trial(path, TRIAL)
    append_trial(path, failed)
    with path.open("ab") as file:  # a crash in the middle of a line
        file.write(b'{"number": 5, "key": "')
    assert read_finished(path) == [TRIAL, failed]
    append_trial(path, replace(TRIAL, number=5))
    assert [trial.number for trial in read_finished(path)] == [3, 4, 5]


@pytest.mark.parametrize("line", ["[]", "{}", "not JSON", '{"overrides": [], "curve": []}'])
def test_an_invalid_line_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trials.jsonl"
    append_trial(path, TRIAL)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl:2: not a trial"):
        read_finished(path)
