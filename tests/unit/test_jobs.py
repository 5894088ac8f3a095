"""The table of jobs: the kinds of recipe, and the data that a search prepares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmray.commands import jobs
from fmray.config import KINDS, PlansRecipe, SearchRecipe, load
from fmray.config.arguments import job_path
from fmray.search.state import FinishedTrial, append_trial


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


def test_a_search_evaluates_its_recommended_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of two trials for one objective, in its folder, under its own recipe."""
    evaluated: list[tuple[Any, str]] = []
    monkeypatch.setattr(
        "fmray.train.fewshot.evaluate.evaluate_encoder", lambda *call: evaluated.append(call)
    )
    path = job_path("recipes") / "search_fewshot.yaml"
    overrides = [f"cluster.storage={tmp_path}", "objectives=[{metric: accuracy}]", "recommend=null"]
    loaded = load(path, overrides, (SearchRecipe,))
    for number, accuracy in enumerate((0.2, 0.7)):
        metrics = {"accuracy": accuracy}
        trial = FinishedTrial(
            number, str(number), {}, (), metrics, (), "done", None, 1.0, 0.0, 4, "suggested"
        )
        folder = tmp_path / "run" / "trials" / f"run-{number:03d}"
        folder.mkdir(parents=True)
        append_trial(tmp_path / "run" / "trials.jsonl", trial)
        (folder / "recipe.yaml").write_text(f"kind: fewshot\nname: trial-{number}\n")
    jobs.KINDS["search"].function("evaluate")(loaded, "run")
    [(trial_recipe, run_id)] = evaluated
    assert (trial_recipe.recipe.name, run_id) == ("trial-1", "run-001")
    assert trial_recipe.recipe.cluster.storage == tmp_path / "run" / "trials"
    with pytest.raises(ValueError, match=r"none: no finished trial; --run-id must name a run of"):
        jobs.KINDS["search"].function("evaluate")(loaded, "none")


def test_a_plan_search_needs_a_prepared_store(tmp_path: Path) -> None:
    path = job_path("recipes") / "search_plans.yaml"
    loaded = load(path, [f"store={tmp_path}"], (PlansRecipe,))
    with pytest.raises(ValueError, match=r"is not prepared; run `python jobs/prepare_data\.py`"):
        jobs.KINDS["plans"].function("prepare")(loaded)
    (tmp_path / "manifest.json").write_text("{}")
    jobs.KINDS["plans"].function("prepare")(loaded)


def test_a_ray_job_with_a_relative_storage_tells_where_its_outputs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.setattr("fmray.train.launch.train", lambda loaded, run_id: None)
    recipe = str(job_path("recipes") / "shapes_tiny.yaml")

    def out(folder: Path, *overrides: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(
            "sys.argv", ["train.py", "--config", recipe, "--run-id", "r", *overrides]
        )
        assert jobs.run_job("train") == 0
        return capsys.readouterr().out

    line = f"the outputs of this Ray job are in {copy / 'runs'} on this node"
    assert line in out(copy)
    assert line not in out(copy, "--set", f"cluster.storage={tmp_path}")
    assert "outputs" not in out(tmp_path)
