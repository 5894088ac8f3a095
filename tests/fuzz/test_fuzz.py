"""Every reader survives its seeds, the inputs that once broke it, and a short fuzz.

`python tests/fuzz/run.py TARGET --minutes 10` is the long one, guided by coverage.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
from fuzz.mutations import mutate
from fuzz.targets import TARGETS

FOUND = json.loads((Path(__file__).parent / "found.json").read_text())
RUNS = 1500  # per target; about a second each


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name: str) -> None:
    assert all(TARGETS[name](seed) for seed in TARGETS[name].seeds())


@pytest.mark.parametrize(
    ("name", "encoded"), [(name, data) for name, inputs in FOUND.items() for data in inputs]
)
def test_inputs_that_once_broke_a_reader(name: str, encoded: str) -> None:
    TARGETS[name](base64.b64decode(encoded))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_read_or_refused_in_one_line(name: str) -> None:
    target = TARGETS[name]
    seeds, refused = target.seeds(), 0
    for number in range(RUNS):
        data = mutate(seeds, target.tokens, random.Random(number))
        try:
            refused += not target(data)
        except Exception as error:
            error.add_note(f"{name} {base64.b64encode(data).decode()}")
            raise
    assert refused > RUNS / 20  # the mutations reach the checks
