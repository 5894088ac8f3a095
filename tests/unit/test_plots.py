"""The figures: drawn from generated values, read back as images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmray.plots.budget import (
    CurvePoint,
    PlanExample,
    budget_curve,
    plan_examples,
)


def colors_of(path: Path) -> set[tuple[int, int, int]]:
    """Return the colours of at least 20 pixels."""
    with Image.open(path) as image:
        counts = image.convert("RGB").getcolors(maxcolors=1 << 24)
    return {color for count, color in counts if count >= 20}


def rgb(code: str) -> tuple[int, int, int]:
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def points(kinds: tuple[str, ...] = ("learned", "random", "static")) -> list[CurvePoint]:
    return [
        CurvePoint(kind, budget, 0.9 - 0.2 * index * (1 - budget), 0.02)
        for index, kind in enumerate(kinds)
        for budget in (0.25, 0.5, 0.75, 1.0)
    ]


def example(budget: float, plan: list[bool], question: str = "shape ?") -> PlanExample:
    image = np.full((8, 8, 3), (10, 200, 30), dtype=np.uint8)
    return PlanExample(image, question, "circle", "circle", budget, plan, prefix=2)


def test_budget_curve_draws_every_kind_in_its_own_color(tmp_path):
    path = tmp_path / "made" / "curve.png"
    budget_curve(points(), 0.91, path)
    assert {rgb("#0072B2"), rgb("#E69F00"), rgb("#009E73")} <= colors_of(path)
    budget_curve(points(("random",)), 0.91, path)
    # a kind has the same colour in every figure
    assert rgb("#E69F00") in colors_of(path)
    assert rgb("#0072B2") not in colors_of(path)


def test_unknown_kinds_and_one_budget_are_drawn(tmp_path):
    budget_curve([CurvePoint("mine", 0.5, 0.5, 0.0)], 0.9, tmp_path / "curve.png")
    assert rgb("#56B4E9") in colors_of(tmp_path / "curve.png")


def test_plan_examples_show_the_image_and_every_state(tmp_path):
    path = tmp_path / "plans.png"
    plan_examples([example(0.5, [True, False]), example(1.0, [True, True])], path)
    assert {(10, 200, 30), rgb("#7f7f7f"), rgb("#0072B2")} <= colors_of(path)
    plan_examples([example(0.5, [False, False])], path)
    legend_only = np.asarray(Image.open(path).convert("RGB"))
    plan_examples([example(0.5, [True, True])], path)
    switched_on = np.asarray(Image.open(path).convert("RGB"))
    blue = np.array(rgb("#0072B2"))
    assert (switched_on == blue).all(-1).sum() > 2 * (legend_only == blue).all(-1).sum()


def test_examples_of_one_question_share_a_cell(tmp_path):
    budgets = (0.25, 0.5, 0.75, 1.0)
    plan_examples([example(b, [True, False]) for b in budgets], tmp_path / "one.png")
    plan_examples(
        [example(b, [True, False], question=f"shape {b} ?") for b in budgets], tmp_path / "four.png"
    )
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "four.png") as four:
        assert four.size[0] == 2 * one.size[0]


@pytest.mark.filterwarnings("error")
def test_plan_examples_accept_any_question(tmp_path):
    image = Image.new("L", (30, 20), 128)
    examples = [
        PlanExample(image, "is it $5 or $6_x^ ?", "$\\frac{$", "", 0.5, [True], 0),
        PlanExample(image.convert("RGB"), "word " * 80, "long " * 40, "x", 1.0, [False] * 60, 3),
        PlanExample(image, "", "", "", 1.0, [], 4),
    ]
    plan_examples(examples, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: budget_curve([], 0.9, path), "no points"),
        (lambda path: plan_examples([], path), "no examples"),
    ],
)
def test_nothing_to_draw_is_an_error(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_replaces_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "curve.svg"
    path.write_text("old")
    budget_curve(points(), 0.9, path)
    assert path.read_text().startswith("<?xml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.svg"]


def test_an_unknown_format_keeps_the_old_file(tmp_path):
    path = tmp_path / "curve.nosuch"
    path.write_text("old")
    with pytest.raises(ValueError, match="nosuch"):
        budget_curve(points(), 0.9, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.nosuch"]


def test_importing_plots_does_not_import_matplotlib():
    code = "import fmray.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
