"""The report of a search: one complete page, escaped, that loads nothing."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.search import finished

from fmray.config.search import ObjectiveConfig
from fmray.search.report import pareto_figure, write_report
from fmray.search.state import FinishedTrial

BOTH = (ObjectiveConfig(metric="accuracy"), ObjectiveConfig(metric="operations", mode="min"))
HOSTILE = '<script src="https://example.org/a.js"></script> & $\\frac{1$ "\''
NO_TEXT = "\ud800\x00"  # may occur in a worker's error
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags in order with their attributes, and text. Fails if a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def trials() -> list[FinishedTrial]:
    generator = np.random.default_rng(0)
    results = []
    for number in range(12):
        items = [name for name in ("birds", "$10$ signs", HOSTILE) if generator.random() < 0.6]
        metrics = {"accuracy": generator.random(), "operations": generator.random()}
        values = {"tasks": items, "lr": 10 ** -generator.uniform(2, 5), "design": "layers"}
        origin = "warm: all tasks" if number < 2 else "suggested"
        results.append(finished(number, values=values, metrics=metrics, origin=origin))
    results.append(
        finished(12, status="failed", metrics={}, reason=HOSTILE + NO_TEXT, values={"design": None})
    )
    results.append(finished(13, status="duplicate", reason="equals trial 3", steps=0))
    results.append(finished(14, status="stopped", metrics={"accuracy": 0.1}, steps=3))
    return results


def test_the_report_is_complete_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "report.html"
    results = trials()
    rule = ("best accuracy under 0.6", results[3])
    write_report(path, results, BOTH, f"search {HOSTILE}", rule, notes=[f"rank {HOSTILE}"])
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "style", "background"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in path.read_text(encoding="utf-8")
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "Pareto front",
        "Parallel coordinates",
        "Trial timeline",
        "Subset heat map: tasks",
    ]
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        assert pixels.std() > 5  # not blank
    assert len(page.all("tr")) == 1 + len(results)
    shown = "".join(page.text)
    assert shown.count("<script src=") >= 3  # as text: title, note, reason
    assert "equals trial 3" in shown and "trial 3 (accuracy" in shown
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # no temporary file


@pytest.mark.parametrize("objectives", [BOTH[:1], (*BOTH, ObjectiveConfig(metric="latency"))])
def test_any_number_of_objectives(tmp_path: Path, objectives: tuple) -> None:
    results = [
        finished(n, metrics={"accuracy": n / 3, "operations": 1 - n / 3, "latency": 1.0})
        for n in range(3)
    ]
    write_report(tmp_path / "report.html", results, objectives, "search")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("img")) == 3  # no subset, so no heat map


def test_the_figure_shows_every_trial_and_the_front() -> None:
    latency = ObjectiveConfig(metric="latency", mode="min")
    values = [(0.9, 1.0, 3.0), (0.8, 0.5, 2.0), (0.7, 0.6, 2.5), (0.6, 0.7, 1.0)]
    results = [
        finished(n, metrics=dict(zip(("accuracy", "operations", "latency"), v, strict=True)))
        for n, v in enumerate(values)
    ]
    panels = pareto_figure(results, (*BOTH, latency), results[1]).axes
    drawn = [panel for panel in panels if panel.has_data()]
    assert len(drawn) == 3  # each pair of objectives
    for panel in drawn:
        lines = {line.get_label(): line for line in panel.lines}
        assert len(lines["suggested (4)"].get_xdata()) == 4
        assert {text.get_text() for text in panel.texts} == {"0", "1", "3"}
    both = {line.get_label(): line for line in drawn[0].lines}
    assert list(both["Pareto front (3)"].get_xdata()) == [0.5, 0.7, 1.0]
    assert list(both["recommended: trial 1"].get_xdata()) == [0.5]


def test_a_trial_is_drawn_at_each_of_its_budgets(tmp_path: Path) -> None:
    metrics = {"accuracy": 0.7, "accuracy/0.5": 0.6, "accuracy/1": 0.8}
    metrics |= {"operations": 0.75, "operations/0.5": 0.5, "operations/1": 1.0}
    results = [finished(0, metrics=metrics)]
    [half, full] = [
        finished(0, metrics={"accuracy": a, "operations": o, "budget": o})
        for a, o in ((0.6, 0.5), (0.8, 1.0))
    ]
    [panel] = pareto_figure(results, BOTH, half).axes
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines["Pareto front (2)"].get_xdata()) == [0.5, 1.0]
    assert list(lines["recommended: trial 0"].get_xdata()) == [0.5]
    write_report(tmp_path / "report.html", results, BOTH, "search", ("cheapest", full))
    page = Page((tmp_path / "report.html").read_text())
    assert "trial 0 at budget 1 (accuracy 0.8, operations 1" in "".join(page.text)
    assert len(page.all("tr")) == 2  # one row per trial


@pytest.mark.parametrize("results", [[], [finished(0, status="failed", metrics={}, reason="no")]])
def test_a_search_without_results_has_a_report(
    tmp_path: Path, results: list[FinishedTrial]
) -> None:
    write_report(tmp_path / "report.html", results, BOTH, "search")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("img")) == len(results)  # the timeline of failed trials
    assert "Nothing to draw" in "".join(page.text)


def test_figures_are_limited_to_a_page(tmp_path: Path) -> None:
    results = [
        finished(n, values={"tasks": ["a", "b"][: 1 + n % 2]}, metrics={"accuracy": n / 100})
        for n in range(100)
    ]
    write_report(tmp_path / "report.html", results, BOTH[:1], "search")
    page = Page((tmp_path / "report.html").read_text())
    for image in page.all("img"):
        content = base64.b64decode(image["src"].split(",")[1])
        assert Image.open(io.BytesIO(content)).height < 4000
    assert len(page.all("tr")) == 101
