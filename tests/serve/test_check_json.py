"""The check of depth and number of values, against a reader of one byte at a time."""

from __future__ import annotations

import random

import pytest

from fmray.serve import openai


def marks(text: bytes) -> tuple[int, int]:
    """Return the greatest depth and the number of values, up to a bracket that opens nowhere."""
    depth = deepest = values = 0
    inside = escaped = False
    for byte in text:
        if inside:
            inside = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            inside = True
        elif byte in b"[{":
            depth, values = depth + 1, values + 1
            deepest = max(deepest, depth)
        elif byte == ord(","):
            values += 1
        elif byte in b"]}":
            depth -= 1
            if depth < 0:
                break
    return deepest, values


def test_the_check_counts_like_a_reader_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5000):
        rng = random.Random(seed)
        text = bytes(rng.choice(b'"\\[]{},a:') for _ in range(rng.randint(0, 40)))
        depth, values = rng.randint(0, 4), rng.randint(0, 6)
        monkeypatch.setattr(openai, "MAX_DEPTH", depth)
        monkeypatch.setattr(openai, "MAX_VALUES", values)
        deepest, count = marks(text)
        refused = False
        try:
            openai.check_json(text)
        except openai.ApiError:
            refused = True
        assert refused == (deepest > depth or count > values), text
