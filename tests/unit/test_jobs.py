"""The table of jobs: the kinds of recipe, and the data that a search prepares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmray.commands import jobs
from fmray.config import KINDS, SearchRecipe, load
from fmray.config.arguments import job_path


def test_the_table_of_jobs_has_every_kind_of_recipe() -> None:
    assert {name: kind.recipe for name, kind in jobs.KINDS.items()} == KINDS


@pytest.mark.parametrize(
    ("recipe", "function", "base"),
    [
        ("search_budgets.yaml", "fmray.data.ingest.prepare", "shapes-tiny"),
        ("search_fewshot.yaml", "fmray.data.image_ingest.prepare_images", "fewshot-small"),
    ],
)
def test_a_search_prepares_the_data_of_its_base_recipe(
    recipe: str, function: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(function, prepared.append)
    monkeypatch.chdir(tmp_path)  # `base` is relative to the file of the search
    loaded = load(job_path("recipes") / recipe, (), (SearchRecipe,))
    jobs.KINDS["search"].function("prepare")(loaded)
    assert [item.name for item in prepared] == [base]
