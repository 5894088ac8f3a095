"""Training whose loss, weights or evaluation are not finite: it stops, or skips the step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fewshot import TRAIN as FEWSHOT
from support.fewshot import fewshot_recipe, start_encoder
from support.ranks import train_on
from support.selection import color_store
from support.training import ADAPTIVE, load_recipe, losses, make_store

from fmray.data.image_store import ImageStore
from fmray.errors import exit_code
from fmray.runtime.run_log import read_log, read_status
from fmray.train.adallava.method import AdaLlavaMethod
from fmray.train.checkpoint import find_checkpoint, list_checkpoints, read_state
from fmray.train.fewshot import pretrain as pretraining
from fmray.train.fewshot.compare import compare
from fmray.train.fewshot.learners import MultitaskLearner
from fmray.train.fewshot.pretrain import pretrain_encoder
from fmray.train.finite import Diverged
from fmray.train.launch import Result, train

TRAIN = {"lr": 2e-3, "steps": 6, "global_batch": 16, "micro_batch": 8, "eval_rows": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Callable[..., Result]:
    """Train under the id `run` below the test's own folder."""
    return lambda **sections: train(load_recipe(store, tmp_path, **sections), "run")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], None]:
    """Make the images of the first pass of some steps NaN."""
    real = AdaLlavaMethod._training_inputs

    def spoil(steps: Collection[int]) -> None:
        left = set(steps)

        def inputs(method: AdaLlavaMethod, batch: Any, step: int) -> Any:
            values, share = real(method, batch, step)
            if step + 1 in left:
                left.remove(step + 1)
                values["pixel_values"] = values["pixel_values"] * math.nan
            return values, share

        monkeypatch.setattr(AdaLlavaMethod, "_training_inputs", inputs)

    return spoil


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in list_checkpoints(run_dir))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run(
    run: Callable[..., Result],
    spoil: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
) -> None:
    every = {"checkpoint_every": 2, "eval_every": 2}
    sections = {"adaptive": ADAPTIVE, "train": TRAIN | every, "zero": {"stage": stage}}
    spoil([5])
    assert exit_code(lambda: run(**sections)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fmray: run run: step 5: the loss is not finite (rank 0, samples train-")
    assert 1 <= line.count("train-") <= 8  # those of the pass, not of the batch
    assert line.endswith(
        "; nothing is exported; the last finite checkpoint is checkpoint-00000004, from which the"
        " same --run-id resumes; lower train.lr (and remove it to resume from checkpoint-00000002,"
        " if step 5 fails again), or set train.skip_nonfinite to skip such steps"
    )
    run_dir = tmp_path / "run"
    assert steps_kept(run_dir) == [2, 4] and not (run_dir / "model").exists()
    assert read_status(run_dir).state == "failed"
    # the log is JSON, and has the step
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    last = [json.loads(line, parse_constant=pytest.fail) for line in lines][-1]
    assert (last["step"], last["loss"], last["grad_norm"]) == (5, None, None)

    # without the bad sample the same run id resumes
    spoil([])
    result = run(**sections)
    assert result.skipped_steps == 0 and all(math.isfinite(loss) for loss in losses(run_dir))


def test_steps_are_skipped_and_counted_across_a_resume(
    run: Callable[..., Result], spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TRAIN | {"checkpoint_every": 3, "skip_nonfinite": 2}
    spoil([2, 5, 6])
    assert exit_code(lambda: run(train=settings)) == 1
    out, err = capsys.readouterr()
    assert "step 2: the loss is not finite (rank 0, samples train-" in out
    assert "); skipped, 1 of train.skip_nonfinite: 2\n" in out
    assert "step 6: the loss is not finite" in err and "2 steps were skipped before" in err

    # the checkpoint of step 3 knows of one; step 5 is the second
    spoil([5])
    result = run(train=settings)
    assert result.skipped_steps == 2
    assert read_state(find_checkpoint(result.run_dir)).skipped_steps == 2
    assert "skipped steps, because of a loss not finite: 2\n" in capsys.readouterr().out
    lines = [line for line in read_log(result.run_dir / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if line["loss"] is None] == [2, 5]
    # the schedule depends on the number of the step alone: it ends at zero
    assert lines[-1]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_skipped_step_changes_no_score(
    run: Callable[..., Result], spoil: Callable[..., None]
) -> None:
    spoil([3])
    result = run(train=TRAIN | {"steps": 3, "eval_every": 1, "skip_nonfinite": 1})
    scores = [
        line["loss/base"] for line in read_log(result.run_dir / "log.jsonl") if "loss/base" in line
    ]
    assert scores[0] != scores[1] == scores[2]


@pytest.mark.parametrize("sections", [{}, {"model": {"dtype": "bfloat16"}}])
def test_a_learning_rate_far_too_high_exports_nothing(
    run: Callable[..., Result], tmp_path: Path, sections: dict[str, Any]
) -> None:
    settings = TRAIN | {"lr": 1e30, "gradient_clip": 0, "checkpoint_every": 1}
    with pytest.raises(Diverged, match=r"^run run: step [1-6]: .* not finite.*; lower train.lr"):
        run(train=settings, **sections)
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_not_finite_are_no_checkpoint(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AdaLlavaMethod.steps

    def steps(method: AdaLlavaMethod, engine: Any, start: int) -> Any:
        for step, metrics in real(method, engine, start):
            if step == 4:
                next(engine.module.parameters()).data.view(-1)[0] = math.inf
            yield step, metrics

    monkeypatch.setattr(AdaLlavaMethod, "steps", steps)
    settings = TRAIN | {"checkpoint_every": 2, "eval_every": 2, "keep_checkpoints": 1}
    with pytest.raises(Diverged, match=r"step 4: the weights are not finite; .*-00000002, from"):
        run(train=settings)
    assert steps_kept(tmp_path / "run") == [2]


def test_an_evaluation_that_is_not_finite_is_never_the_best(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = AdaLlavaMethod.evaluate, []

    def evaluate(method: AdaLlavaMethod, engine: Any) -> Any:
        evaluation = real(method, engine)
        count.append(1)
        if len(count) < 2:
            return evaluation
        return replace(evaluation, scores=(replace(evaluation.scores[0], loss=math.nan),))

    monkeypatch.setattr(AdaLlavaMethod, "evaluate", evaluate)
    with pytest.raises(Diverged, match=r"step 4: loss/base of the evaluation is not finite; "):
        run(train=TRAIN | {"checkpoint_every": 2, "eval_every": 2})
    assert steps_kept(tmp_path / "run") == [2]
    assert read_state(find_checkpoint(tmp_path / "run")).best_step == 2


def spoil_rank_one(rank: int) -> None:
    """Make the images of rank 1 NaN at steps 2 and 4."""
    real = AdaLlavaMethod._training_inputs

    def inputs(method: AdaLlavaMethod, batch: Any, step: int) -> Any:
        values, share = real(method, batch, step)
        if step + 1 in (2, 4):
            values["pixel_values"] = values["pixel_values"] * math.nan
        return values, share

    if rank == 1:
        AdaLlavaMethod._training_inputs = inputs


def test_all_ranks_skip_and_stop_for_one_of_them(store: Path, tmp_path: Path) -> None:
    settings = TRAIN | {"checkpoint_every": 3, "skip_nonfinite": 1}
    loaded = load_recipe(store, tmp_path, train=settings, zero={"stage": 3})
    with pytest.raises(RuntimeError, match=r"run run: step 4: the loss is not finite \(rank 1, s"):
        train_on(2, loaded, "run", spoil_rank_one)
    assert [loss is None for loss in losses(tmp_path / "run")] == [False, True, False, True]
    assert read_status(tmp_path / "run").state == "failed"
    assert read_state(find_checkpoint(tmp_path / "run")).skipped_steps == 1


# --- Few-shot ---


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "multitask"},
        {"method": "multitask", "strategy": "zero"},
        {"method": "maml"},
        {"method": "standard", "eval_every": 1},
    ],
)
def test_finetuning_that_diverges_stops(
    colors: ImageStore, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = FEWSHOT | {"lr": 1e30, "gradient_clip": 0, "checkpoint_every": 1} | settings
    loaded = fewshot_recipe(colors, tmp_path, train=settings)
    with pytest.raises(Diverged, match=r"^run run: step \d: .* not finite.*; lower train.lr"):
        train(loaded, "run")
    assert not (tmp_path / "run" / "model").exists()
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_an_episode_is_named_and_skipped(
    colors: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real, calls = MultitaskLearner.forward, []

    def forward(learner: MultitaskLearner, *inputs: Any) -> Any:
        loss, accuracy = real(learner, *inputs)
        calls.append(1)
        return loss * (math.nan if len(calls) == 4 else 1.0), accuracy

    monkeypatch.setattr(MultitaskLearner, "forward", forward)
    result = train(fewshot_recipe(colors, tmp_path, train=FEWSHOT | {"skip_nonfinite": 1}), "run")
    assert result.skipped_steps == 1
    assert "step 2: the loss is not finite (rank 0, samples episode " in capsys.readouterr().out
    log = read_log(result.run_dir / "log.jsonl")
    assert [line["step"] for line in log if line["loss"] is None] == [2]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_comparison_stops_at_a_training_that_diverges(
    colors: ImageStore, tmp_path: Path, steps: int
) -> None:
    """After four steps the loss is not finite, after one the features."""
    loaded = fewshot_recipe(
        colors,
        tmp_path,
        encoder={"checkpoint": start_encoder(tmp_path / "start")},
        compare={
            "targets": [{"collection": "target"}],
            "methods": ["direct", "standard"],
            "lr": {"standard": 1e30},
        },
        train={"steps": steps, "gradient_clip": 0},
    )
    with pytest.raises(Diverged, match=r"^run target-test-standard: .* not.*; lower compare.lr.st"):
        compare(loaded, "run")
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 1  # direct adaptation


@pytest.mark.parametrize("objective", ["simclr", "moco", "supervised"])
def test_pretraining_that_diverges_stops_and_resumes_with_a_lower_rate(
    colors: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setattr(pretraining, "STATE_EVERY", 1)
    section = {"objective": objective, "steps": 4, "batch": 16, "lr": 1e-3}
    real = pretraining._train_step

    def train_step(objective: Any, optimizer: Any, images: Any, *rest: Any) -> Any:
        images = images.float() * math.nan if rest[-1] == 2 else images
        return real(objective, optimizer, images, *rest)

    monkeypatch.setattr(pretraining, "_train_step", train_step)
    with pytest.raises(Diverged, match=r"step 3: the loss is not finite \(images \d.* state\.pt,"):
        pretrain_encoder(fewshot_recipe(colors, tmp_path, pretrain=section), "run")
    assert not (tmp_path / "run" / "model").exists()
    skipping = section | {"lr": 1e-4, "skip_nonfinite": 1}
    result = pretrain_encoder(fewshot_recipe(colors, tmp_path, pretrain=skipping), "run")
    assert math.isfinite(result.metrics["loss"]) and result.model_dir.is_dir()
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]
