"""Finished trials for tests of searches."""

from __future__ import annotations

from typing import Any

from fmray.search.state import FinishedTrial


def finished(number: int, **changes: Any) -> FinishedTrial:
    """A suggested trial with ten steps and accuracy 0.5."""
    values: dict[str, Any] = {
        "number": number,
        "key": f"key {number}",
        "values": {},
        "overrides": (),
        "metrics": {"accuracy": 0.5},
        "curve": (),
        "status": "done",
        "reason": None,
        "seconds": 2.0,
        "started": 1_700_000_000.0 + 2 * number,
        "steps": 10,
        "origin": "suggested",
    }
    return FinishedTrial(**values | changes)
