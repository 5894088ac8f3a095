"""Evaluation of a trained model: measurements, kept budgets, written files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from support.training import ADAPTIVE, load_recipe, make_store
from transformers import AutoModelForImageTextToText

from fmray.config import EvaluateConfig, LoadedRecipe
from fmray.data.loader import evaluation_batches
from fmray.data.processor import load_processor
from fmray.train.adallava.batches import model_inputs, score_answers
from fmray.train.adallava.evaluate import BudgetReport, evaluate, evaluate_run
from fmray.train.launch import train

BUDGETS = (0.25, 0.5, 0.75, 1.0)
KINDS = ("learned", "random", "static", "importance")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedRecipe]:
    folder = tmp_path_factory.mktemp("evaluate")
    loaded = load_recipe(
        make_store(folder),
        folder,
        adaptive=ADAPTIVE | {"latency_token": "probe"},
        train={"lr": 2e-3, "steps": 30, "global_batch": 16, "micro_batch": 16, "eval_rows": 99},
        evaluate={"budgets": BUDGETS, "plans": KINDS, "calibration_rows": 20, "batch": 7},
    )
    train(loaded, "run")
    return folder, loaded


@pytest.fixture(scope="module")
def result(trained: tuple[Path, LoadedRecipe]) -> BudgetReport:
    return evaluate_run(trained[1], "run")


def test_every_question_is_asked_once_at_each_budget(result: BudgetReport) -> None:
    table = pq.read_table(result.questions)
    assert table.num_rows == 80 * (1 + len(BUDGETS) * len(KINDS))
    keys = table.select(["row", "turn", "plans", "budget"])
    assert keys.group_by(keys.column_names).aggregate([]).num_rows == table.num_rows
    assert set(table["id"].to_pylist()) == {f"validation-{i:06d}" for i in range(20)}
    assert None not in table["tag"].to_pylist()


def test_no_plan_exceeds_its_budget(result: BudgetReport) -> None:
    table = pq.read_table(result.questions)
    given = table.filter(pc.is_valid(table["budget"])).to_pylist()
    assert len(given) == 80 * len(BUDGETS) * len(KINDS)
    for line in given:
        # one layer of four always runs; a unit is a quarter
        assert line["plan"].count("1") == round(line["budget"] * 4) - 1
        assert line["share"] <= line["budget"] + 1e-9
    plans = {
        kind: {(i["budget"], i["plan"]) for i in given if i["plans"] == kind} for kind in KINDS
    }
    assert len(plans["static"]) == len(plans["importance"]) == len(BUDGETS)  # one plan each
    assert len(plans["random"]) == 1 + 3 + 3 + 1  # all there are


def test_a_full_probe_plan_is_the_base_model(
    trained: tuple[Path, LoadedRecipe], result: BudgetReport
) -> None:
    folder, loaded = trained
    store = loaded.recipe.data.store
    processor = load_processor(store / "processor")
    stock = AutoModelForImageTextToText.from_pretrained(folder / "run" / "model")
    right = 0.0
    for batch in evaluation_batches(store, "validation", processor, 16):
        inputs = model_inputs(batch, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            logits = stock(**inputs).logits
        right += float(score_answers(logits, batch.labels)[1].sum())
    assert result.base.accuracy == right / 80
    assert result.base.questions == 80
    for point in result.points:
        if point.budget == 1.0:
            assert point.accuracy == result.base.accuracy
            assert point.loss == pytest.approx(result.base.loss, rel=1e-5)


def test_skipped_evaluation_agrees_with_the_masked_one_in_training(
    trained: tuple[Path, LoadedRecipe], result: BudgetReport
) -> None:
    lines = (trained[0] / "run" / "log.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    learned = {point.budget: point for point in result.points if point.plans == "learned"}
    for budget in (0.5, 0.75, 1.0):
        assert learned[budget].accuracy == pytest.approx(last[f"accuracy/{budget:g}"])


def test_the_results_are_written_and_shown(
    trained: tuple[Path, LoadedRecipe], result: BudgetReport
) -> None:
    out = trained[0] / "run" / "evaluation"
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "questions.parquet",
        "budget_curve.png",
        "plans.png",
    }
    written = json.loads((out / "results.json").read_text())
    assert len(written["points"]) == len(BUDGETS) * len(KINDS)
    assert [entry["budget"] for entry in written["dependence"]] == list(BUDGETS)
    assert len(written["paired"]) == 3 * len(BUDGETS)
    shown = result.table()
    assert all(kind in shown for kind in KINDS) and "over 80 samples" in shown


def test_wrong_run_id_or_budget_is_an_error(trained: tuple[Path, LoadedRecipe]) -> None:
    folder, loaded = trained
    with pytest.raises(ValueError, match=r"nothing: no model/ to evaluate; --run-id must name"):
        evaluate_run(loaded, "nothing")
    with pytest.raises(ValueError, match=r"the smallest budget here is 0\.25"):
        evaluate(
            folder / "run" / "model",
            loaded.recipe.data.store,
            EvaluateConfig(budgets=(0.2,)),
            folder / "low",
        )
