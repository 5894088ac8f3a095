"""The search for static plans: against direct evaluation, interrupted, and with wrong input."""

from __future__ import annotations

import json
import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.training import ADAPTIVE, load_recipe, make_store

from fmray.adallava import AdaptiveVLM
from fmray.config import LoadedRecipe, load
from fmray.config.arguments import job_path
from fmray.config.search import PlansRecipe
from fmray.data.loader import evaluation_batches
from fmray.data.processor import load_processor
from fmray.search import plans as plans_module
from fmray.search.plans import PlansResult, search_plans
from fmray.train.adallava.batches import model_inputs, score_answers
from fmray.train.launch import train

UNITS = 6  # two in each of three layers
SIZES = {0.5: 2, 0.75: 4}  # the layer that always runs costs as much as two units


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a trained model with six units."""
    folder = tmp_path_factory.mktemp("plans")
    loaded = load_recipe(
        make_store(folder),
        folder,
        adaptive=ADAPTIVE | {"design": "heads", "unit": 2},
        train={"lr": 2e-3, "steps": 30, "global_batch": 16, "micro_batch": 16, "eval_rows": 8},
    )
    train(loaded, "run")
    return folder


def recipe_of(folder: Path, **changes: object) -> Path:
    values = {
        "kind": "plans",
        "name": "tiny-plans",
        "model": str(folder / "run" / "model"),
        "store": str(folder / "store"),
        "budgets": list(SIZES),
        "calibration_rows": 15,
        "batch": 8,
        "cluster": {"storage": str(folder)},
        "tracking": {"enabled": False},
    }
    path = folder / "plans.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def load_plans(folder: Path, **changes: object) -> LoadedRecipe[PlansRecipe]:
    return load(recipe_of(folder, **changes), (), (PlansRecipe,))


@pytest.fixture(scope="module")
def result(folder: Path) -> PlansResult:
    return search_plans(load_plans(folder), "plans")


def direct(folder: Path, split: str, plan: str, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Correctness and loss of each answer under a plan: the complete model, masked."""
    model = AdaptiveVLM.from_pretrained(folder / "run" / "model")
    processor = load_processor(folder / "store" / "processor")
    correct: list[float] = []
    losses: list[float] = []
    units = torch.tensor([[digit == "1" for digit in plan]])
    for batch in evaluation_batches(folder / "store", split, processor, 16, rows):
        inputs = model_inputs(batch, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            output = model(**inputs, plan=units.expand(len(batch.rows), -1), execution="masked")
        _, right, _, loss = score_answers(output.logits, inputs["labels"])
        correct, losses = correct + right.tolist(), losses + loss.tolist()
    return np.array(correct), np.array(losses)


def tags(folder: Path, rows: int) -> list[str]:
    processor = load_processor(folder / "store" / "processor")
    batches = evaluation_batches(folder / "store", "train", processor, 16, rows)
    return [tag for batch in batches for tag in batch.tags]


def test_the_plans_are_the_best_by_direct_evaluation(folder: Path, result: PlansResult) -> None:
    kinds = np.array(tags(folder, 15))
    assert {plan.units_on for plan in result.plans} == set(SIZES.values())
    assert {plan.tag for plan in result.plans} == {None, *kinds}
    for size in SIZES.values():
        texts = [
            "".join("01"[unit in on] for unit in range(UNITS))
            for on in combinations(range(UNITS), size)
        ]
        known = {text: direct(folder, "train", text, 15) for text in texts}
        for best in (plan for plan in result.plans if plan.units_on == size):
            chosen = kinds == best.tag if best.tag else np.ones(len(kinds), dtype=bool)
            score = {
                text: float((right - loss / (1 + loss))[chosen].mean())
                for text, (right, loss) in known.items()
            }
            assert score[best.plan] == pytest.approx(max(score.values()), abs=1e-6)
            assert best.accuracy == known[best.plan][0][chosen].mean()
            assert best.questions == chosen.sum()
            assert best.exhaustive and best.evaluations == len(texts) == 15


def test_held_out_questions_are_asked_under_the_plans_found(
    folder: Path, result: PlansResult
) -> None:
    plans = {(plan.units_on, plan.tag): plan.plan for plan in result.plans}
    lines = pq.read_table(result.evaluation.questions).to_pylist()
    names = ["learned", "searched", "per type", "importance", "random"]
    assert {line["plans"] for line in lines} == {"base", *names}
    for budget, size in SIZES.items():
        asked = [line for line in lines if line["budget"] == budget]
        assert len(asked) == 80 * len(names)
        assert all(line["plan"].count("1") == size and line["share"] <= budget for line in asked)
        searched = [line for line in asked if line["plans"] == "searched"]
        assert {line["plan"] for line in searched} == {plans[size, None]}
        right, loss = direct(folder, "validation", plans[size, None], None)
        assert [line["correct"] for line in searched] == right.astype(bool).tolist()
        assert [line["loss"] for line in searched] == pytest.approx(loss.tolist(), abs=1e-4)
        for line in asked:
            if line["plans"] == "per type":
                assert line["plan"] == plans.get((size, line["tag"]), plans[size, None])
        # one plan, with the units whose absence increases the calibration's loss most
        full = direct(folder, "train", "1" * UNITS, 15)[1].sum()
        increases = [
            direct(folder, "train", "1" * unit + "0" + "1" * (UNITS - 1 - unit), 15)[1].sum() - full
            for unit in range(UNITS)
        ]
        order = np.argsort(increases)[::-1][:size]
        expected = "".join("01"[unit in order] for unit in range(UNITS))
        assert {line["plan"] for line in asked if line["plans"] == "importance"} == {expected}
    written = json.loads((folder / "plans" / "plans.json").read_text())
    assert [entry["plan"] for entry in written] == [plan.plan for plan in result.plans]
    files = {path.name for path in (folder / "plans" / "evaluation").iterdir()}
    assert files == {"results.json", "questions.parquet", "budget_curve.png"}
    assert "over searched" in result.evaluation.table()


def test_an_interrupted_search_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evolution (at most 9 of 15 plans). No plan is asked twice of the same questions."""
    loaded = load_plans(folder, population=3, generations=2, seed=4)
    uninterrupted = search_plans(loaded, "uninterrupted")
    assert not any(plan.exhaustive for plan in uninterrupted.plans)
    lines = (folder / "uninterrupted" / "answers.jsonl").read_text().splitlines()

    left = [len(lines) // 2]
    original = plans_module.append_line

    def interrupted_append(path: Path, values: dict[str, object]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(plans_module, "append_line", interrupted_append)
        with pytest.raises(KeyboardInterrupt):
            search_plans(loaded, "interrupted")
    before = (folder / "interrupted" / "answers.jsonl").read_text().splitlines()
    assert before == lines[: len(lines) // 2]
    assert search_plans(loaded, "interrupted").plans == uninterrupted.plans
    assert (folder / "interrupted" / "answers.jsonl").read_text().splitlines() == lines
    keys = [(line["plan"], line["first"]) for line in map(json.loads, lines[1:])]
    assert len(keys) == len(set(keys))


def test_the_job_tracks_its_run_in_mlflow(
    folder: Path, result: PlansResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    path = recipe_of(folder, tracking={"enabled": True, "experiment": "plans"}, rows=5)
    arguments = ["search_plans.py", "--config", str(path), "--run-id", "job"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(job_path("search_plans.py")), run_name="__main__")
    assert stopped.value.code == 0
    plans = json.loads((folder / "job" / "plans.json").read_text())
    assert [entry["plan"] for entry in plans] == [plan.plan for plan in result.plans]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("plans")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["fmray.run_id"] == "job" and run.info.status == "FINISHED"
    assert {"evaluate/learned/0.5", "evaluate/per type/0.75"} <= run.data.metrics.keys()


def test_impossible_searches_are_errors_that_name_the_cause(
    folder: Path, result: PlansResult
) -> None:
    base = folder / "stock"
    AdaptiveVLM.from_pretrained(folder / "run" / "model").base.save_pretrained(base)
    with pytest.raises(ValueError, match=r"stock: not an adaptive model: it has no adaptive\.json"):
        search_plans(load_plans(folder, model=str(base)), "stock-plans")
    with pytest.raises(ValueError, match=r"nowhere: no complete data store"):
        search_plans(load_plans(folder, store=str(folder / "nowhere")), "low")
    with pytest.raises(ValueError, match=r"budget is 0\.2.*the smallest budget here is 0\.25"):
        search_plans(load_plans(folder, budgets=[0.2]), "low")
    with pytest.raises(
        ValueError, match=r"answers\.jsonl: these are answers of .*'rows': 15.*--run-id"
    ):
        search_plans(load_plans(folder, calibration_rows=9), "plans")
    with pytest.raises(ValueError, match=r"budgets: 0\.5 is listed more than once; keep one"):
        load_plans(folder, budgets=[0.5, 0.5])
    with pytest.raises(
        ValueError, match=r"tracking\.register_as: a search for plans makes no model"
    ):
        load_plans(folder, tracking={"register_as": "me"})
    assert not (folder / "low").exists() and not (folder / "stock-plans").exists()
