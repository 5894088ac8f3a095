"""The reason of a failed trial: the innermost error, in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from fmray.errors import GaveUp
from fmray.search.watch import _reason

MISTAKE = ValueError("no candidate tasks: lower episodes.ways\nand more")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RayTaskError("train", "trace", MISTAKE), "no candidate tasks: lower episodes.ways"),
        (
            RayTaskError("train", "trace", GaveUp("the loss is not finite")),
            "the loss is not finite",
        ),
        (WorkerGroupError("2 failed", {1: RuntimeError("boom")}), "RuntimeError: boom"),
        (
            RayTaskError("train", "trace", ControllerError(MemoryError())),
            "MemoryError: ",
        ),
    ],
)
def test_the_innermost_error_is_the_reason(tmp_path: Path, error: Exception, expected: str) -> None:
    path = tmp_path / "error.pkl"
    path.write_bytes(cloudpickle.dumps(error))
    assert _reason(SimpleNamespace(pickled_error_file=str(path))) == expected
