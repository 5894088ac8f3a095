"""The few-shot figures: drawn from generated values, read back as images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmray.plots.fewshot import Accuracy, comparison, coverage_curve, similarity_bars

BLUE, ORANGE, GREY, RED = (0, 114, 178), (230, 159, 0), (184, 184, 184), (213, 94, 0)


def pixels(path: Path, color: tuple[int, int, int]) -> int:
    return int((np.asarray(Image.open(path).convert("RGB")) == np.array(color)).all(-1).sum())


def test_bars_are_as_long_as_the_similarities_and_coloured_by_the_choice(tmp_path):
    path = tmp_path / "new" / "bars.png"
    similarity_bars(["a", "$b_", "c"], [0.9, 0.6, 0.3], {"a", "$b_"}, path)
    image = np.asarray(Image.open(path).convert("RGB"))
    blue = (image == np.array(BLUE)).all(-1).sum(axis=1)
    grey = (image == np.array(GREY)).all(-1).sum(axis=1)
    lengths = [length for length in np.unique(blue) if (blue == length).sum() > 20 and length > 60]
    assert len(lengths) == 2
    assert lengths[0] / lengths[1] == pytest.approx(2 / 3, abs=0.02)
    assert np.bincount(grey[grey > 60]).argmax() / lengths[1] == pytest.approx(1 / 3, abs=0.02)


def test_a_thousand_tasks_are_drawn_without_names(tmp_path):
    names = [f"task {i}" for i in range(1000)]
    values = np.linspace(1, -1, 1000).tolist()
    similarity_bars(names, values, names[:500], tmp_path / "bars.png")
    coverage_curve(names, values, names[:500], tmp_path / "curve.png")
    for file in ("bars.png", "curve.png"):
        assert pixels(tmp_path / file, BLUE) > 1000
        assert Image.open(tmp_path / file).size[1] < 4000


def test_infinite_coverage_is_marked(tmp_path):
    path = tmp_path / "curve.png"
    coverage_curve(["a", "b"], [1.0, 2.0], ["a"], path)
    assert pixels(path, BLUE) > 50 and pixels(path, RED) == 0
    coverage_curve(["a", "b"], [math.inf, 2.0], ["a"], path)
    assert pixels(path, RED) > 10


def test_comparison_has_a_panel_per_shots_and_a_colour_per_method(tmp_path):
    points = [
        Accuracy(target, shots, row, 0.4 + 0.1 * shots, 0.01)
        for target in ("birds", "signs_$1")
        for shots in (1, 5)
        for row in ("direct", "multitask/all")
    ]
    comparison(points, tmp_path / "both.png")
    comparison([p for p in points if p.shots == 1], tmp_path / "one.png")
    assert pixels(tmp_path / "both.png", ORANGE) > 100
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.size[1] > 1.5 * one.size[1]


def test_nothing_to_draw_is_an_error(tmp_path):
    for draw in (
        lambda path: similarity_bars([], [], [], path),
        lambda path: coverage_curve([], [], [], path),
        lambda path: comparison([], path),
    ):
        with pytest.raises(ValueError, match=r"no (tasks|accuracies) to draw"):
            draw(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
