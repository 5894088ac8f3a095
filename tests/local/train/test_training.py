"""The training loop in one process: gradients, resuming, accumulation, export, refusals."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.training import ADAPTIVE, forget_after, load_recipe, losses, make_store
from torch.nn import functional

from fmray.adallava import AdaptiveVLM
from fmray.config import LoadedRecipe
from fmray.data.loader import InstructionLoader
from fmray.data.processor import load_processor
from fmray.errors import exit_code
from fmray.runtime.run_log import STATUS_FILE, StepLog, read_log, read_status
from fmray.train.adallava.model import build_model
from fmray.train.checkpoint import find_checkpoint, read_state
from fmray.train.engine import lr_factor
from fmray.train.launch import Result, train

TRAIN = {"lr": 2e-3, "steps": 8, "global_batch": 16, "micro_batch": 8, "eval_rows": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Callable[..., Result]:
    """Train under a run id below the test's own folder."""
    return lambda run_id, **sections: train(load_recipe(store, tmp_path, **sections), run_id)


def weights(result: Result) -> dict[str, torch.Tensor]:
    return AdaptiveVLM.from_pretrained(result.model_dir).state_dict()


def test_a_step_is_the_gradient_of_the_mean_answer_token(
    store: Path, run: Callable[..., Result]
) -> None:
    """Loss and gradient norm of the first step against plain autograd, one sample at a time."""
    result = run("first", train=TRAIN | {"steps": 1, "gradient_clip": 0.01})
    recipe = load_recipe(store, store).recipe
    processor = load_processor(store / "processor")
    loader = InstructionLoader(
        store, "train", processor, global_batch=16, rank=0, world_size=1, seed=recipe.seed,
        samples="turn", max_length=64, micro_batch=1,
    )  # fmt: skip
    model = build_model(recipe, processor)
    samples = next(iter(loader.epoch(0)))
    assert len(samples) == 16
    total, tokens = torch.zeros(()), 0
    for sample in samples:
        logits = model(
            input_ids=sample.input_ids,
            attention_mask=sample.attention_mask,
            pixel_values=sample.pixel_values,
        ).logits
        wanted = sample.labels[:, 1:].flatten()
        total = total + functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100, reduction="sum"
        )
        tokens += int((wanted != -100).sum())
    (total / tokens).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    [line] = [line for line in read_log(result.run_dir / "log.jsonl") if "loss" in line]
    assert line["loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)


def test_the_loss_falls_and_the_model_is_exported(run: Callable[..., Result]) -> None:
    result = run("falls", adaptive=ADAPTIVE, train=TRAIN | {"steps": 24})
    found = losses(result.run_dir)
    assert len(found) == 24
    assert sum(found[-4:]) / 4 < found[0] - 0.3
    assert set(result.metrics) >= {"accuracy/0.5", "accuracy/1", "loss/0.75", "budget", "step"}
    state = json.loads((find_checkpoint(result.run_dir) / "state.json").read_text())
    assert (state["step"], state["seed"], state["world_size"]) == (24, 3, 1)
    assert "lr: 0.002  # test" in (find_checkpoint(result.run_dir) / "recipe.yaml").read_text()
    assert load_processor(result.model_dir).chat_template
    assert not list(result.run_dir.glob(".*partial"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resumed_equals_uninterrupted(run: Callable[..., Result], stage: int) -> None:
    recipe = {
        "adaptive": ADAPTIVE,
        "zero": {"stage": stage, "parameter_persistence": 0},
        "train": TRAIN | {"checkpoint_every": 3, "keep_checkpoints": 9},
    }
    whole = run("whole", **recipe)
    names = sorted(path.name for path in whole.run_dir.glob("checkpoint-*"))
    assert names == ["checkpoint-00000003", "checkpoint-00000006", "checkpoint-00000008"]
    wanted, wanted_weights = losses(whole.run_dir), weights(whole)
    # as if the process had died after step 3, with two more steps already in the log
    forget_after(whole.run_dir, step=3)
    log = whole.run_dir / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:5]) + '{"st')
    resumed = run("whole", **recipe)
    assert losses(resumed.run_dir) == wanted
    found = weights(resumed)
    assert all(torch.equal(found[name], wanted_weights[name]) for name in wanted_weights)


def test_a_finished_run_is_not_trained_again(run: Callable[..., Result]) -> None:
    first = run("done", adaptive=ADAPTIVE)
    wanted = weights(first)
    shutil.rmtree(first.model_dir)
    again = run("done", adaptive=ADAPTIVE)
    assert len(losses(again.run_dir)) == 8
    assert again.metrics["accuracy/0.5"] == first.metrics["accuracy/0.5"]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(again).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_and_stages_compute_the_same(run: Callable[..., Result], stage: int) -> None:
    wanted = run("large", adaptive=ADAPTIVE, train=TRAIN | {"micro_batch": 16}, zero={"stage": 0})
    found = run(
        "small",
        adaptive=ADAPTIVE,
        train=TRAIN | {"micro_batch": 4},
        zero={"stage": stage, "parameter_persistence": 0},
    )
    assert losses(found.run_dir) == pytest.approx(losses(wanted.run_dir), rel=1e-4)
    assert found.metrics["budget"] == pytest.approx(wanted.metrics["budget"])


def test_bfloat16_and_gradient_checkpointing_stay_close(run: Callable[..., Result]) -> None:
    wanted = losses(run("float32", adaptive=ADAPTIVE).run_dir)
    checkpointed = run("again", adaptive=ADAPTIVE, train=TRAIN | {"gradient_checkpointing": True})
    assert losses(checkpointed.run_dir) == pytest.approx(wanted, rel=1e-5)
    low = run("bfloat16", adaptive=ADAPTIVE, model={"dtype": "bfloat16"}, zero={"stage": 2})
    assert losses(low.run_dir) == pytest.approx(wanted, rel=0.01)
    assert {tensor.dtype for tensor in weights(low).values()} == {torch.bfloat16}


def test_frozen_parts_are_exported_unchanged(store: Path, run: Callable[..., Result]) -> None:
    sections = {"adaptive": ADAPTIVE, "model": {"freeze": ["vision"]}}
    found = weights(run("frozen", **sections))
    processor = load_processor(store / "processor")
    before = build_model(load_recipe(store, store, **sections).recipe, processor).state_dict()
    same = {name for name in found if torch.equal(found[name], before[name])}
    assert same == {name for name in found if ".vision_tower." in name}


def test_lora_is_trained_and_merged(store: Path, run: Callable[..., Result]) -> None:
    sections = {"adaptive": ADAPTIVE, "model": {"freeze": ["vision"], "lora": {"rank": 4}}}
    result = run("lora", **sections, zero={"stage": 3, "parameter_persistence": 0})
    assert losses(result.run_dir)[-1] < losses(result.run_dir)[0] - 0.1
    found = weights(result)
    processor = load_processor(store / "processor")
    plain = build_model(load_recipe(store, store, **sections).recipe, processor, lora=False)
    before = plain.state_dict()
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    decoder = ".language_model.layers."
    adapted = {n for n in found if decoder in n and "norm" not in n}
    assert {name for name in changed if decoder in name} == adapted
    for name in adapted:
        rank = torch.linalg.matrix_rank(found[name] - before[name], rtol=1e-3)
        assert 1 <= int(rank) <= 4
    assert "base.lm_head.weight" not in changed
    assert "base.model.multi_modal_projector.linear_1.weight" in changed


def test_a_checkpoint_of_another_recipe_is_refused(run: Callable[..., Result]) -> None:
    run("taken")
    with pytest.raises(ValueError, match=r"seed was 3 and is 4; set it back, or give a new"):
        run("taken", seed=4)
    with pytest.raises(ValueError, match=r"adaptive\.design was None and is 'layers'"):
        run("taken", adaptive=ADAPTIVE)
    with pytest.raises(ValueError, match=r"train\.steps: .* has taken 8 steps, .* asks for 6"):
        run("taken", train=TRAIN | {"steps": 6})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_changed_learning_rate_takes_effect(
    run: Callable[..., Result], capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    """Under a negligible rate the four added steps leave the weights as they were."""
    zero = {"stage": stage, "parameter_persistence": 0}
    half = weights(run("run", adaptive=ADAPTIVE, zero=zero, train=TRAIN | {"steps": 4}))
    rates = {"lr": 1e-12, "scheduler_lr": 2e-12}
    capsys.readouterr()
    result = run("run", adaptive=ADAPTIVE, zero=zero, train=TRAIN | rates)
    out = capsys.readouterr().out
    assert "\ntrain.lr: 0.002 -> 1e-12\ntrain.scheduler_lr: null -> 2e-12\n" in out
    assert "\ntrain.steps: 4 -> 8\n" in out
    for name, tensor in weights(result).items():
        torch.testing.assert_close(tensor, half[name], rtol=0, atol=1e-8)
    lines = [line for line in read_log(result.run_dir / "log.jsonl") if "lr" in line]
    found = [line["lr"] for line in lines[4:]]
    # the rest of the schedule is that of eight steps
    assert found == pytest.approx([1e-12 * lr_factor(step, 8, 0.03) for step in (5, 6, 7, 8)])


def test_a_moved_folder_resumes_and_other_data_are_refused(store: Path, tmp_path: Path) -> None:
    def loaded(folder: Path) -> LoadedRecipe:
        source = folder / "source"
        paths = {"train": source / "train.json", "validation": source / "validation.json"}
        data = {"shapes": None, "image_folder": source, **paths}
        train = TRAIN | {"checkpoint_every": 4}
        return load_recipe(folder / "store", folder / "runs", data=data, train=train)

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(store / "source", old / "source")
    make_store(old, loaded(old).recipe)
    complete = train(loaded(old), "run")
    wanted = losses(complete.run_dir)
    forget_after(complete.run_dir, step=4)
    old.rename(new)
    resumed = train(loaded(new), "run")
    assert losses(resumed.run_dir) == wanted

    # other answers under the same paths
    forget_after(resumed.run_dir, step=4)
    records = json.loads((new / "source" / "train.json").read_text())
    answers = [record["conversations"][1] for record in records]
    for record, answer in zip(records, [*answers[1:], answers[0]], strict=True):
        record["conversations"][1] = answer
    (new / "source" / "train.json").write_text(json.dumps(records))
    make_store(new, loaded(new).recipe)
    with pytest.raises(
        ValueError, match=r"the records of the store changed \(sha256 \w+ -> \w+\);"
    ):
        train(loaded(new), "run")
    assert losses(resumed.run_dir) == wanted


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (cut, "deepspeed/mp_rank_00_model_states.pt", r"has \d+ bytes instead of \d+"),
        (flip, "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", "was altered"),
        (Path.unlink, "manifest.json", "so the folder is incomplete"),
        (flip, "state.json", "was altered"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(
    run: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    name: str,
    reason: str,
) -> None:
    sections = {"adaptive": ADAPTIVE, "train": TRAIN | {"steps": 4, "checkpoint_every": 2}}
    whole = run("run", **sections)
    wanted, weights_wanted = losses(whole.run_dir), weights(whole)
    change(whole.run_dir / "checkpoint-00000004" / name)
    shutil.rmtree(whole.model_dir)
    capsys.readouterr()
    again = run("run", **sections)
    out = capsys.readouterr().out
    assert re.search(rf"run: checkpoint-00000004: .*{reason}.*; skipped", out)
    assert "run: step 2 of 4" in out
    assert losses(again.run_dir) == wanted
    for key, tensor in weights(again).items():
        torch.testing.assert_close(tensor, weights_wanted[key], rtol=0, atol=0)


def test_a_run_with_damaged_checkpoints_only_is_an_error(
    run: Callable[..., Result],
) -> None:
    result = run("run", train=TRAIN | {"steps": 1})
    cut(result.run_dir / "checkpoint-00000001" / "state.json")
    with pytest.raises(ValueError, match=r"checkpoints are damaged \(checkpoint-00000001: state"):
        run("run", train=TRAIN | {"steps": 1})


def test_sigterm_saves_a_checkpoint_and_the_run_resumes(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("whole", train=TRAIN)
    real, kept = StepLog.write, signal.getsignal(signal.SIGTERM)

    def write(log: StepLog, step: int, metrics: dict[str, float]) -> None:
        real(log, step, metrics)
        if step == 2 and "loss" in metrics:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", write)
        with pytest.raises(SystemExit) as stopped:
            run("stopped", train=TRAIN)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == kept
    assert read_state(find_checkpoint(tmp_path / "stopped")).step == 3  # the step it came in
    assert losses(run("stopped", train=TRAIN).run_dir) == losses(whole.run_dir)


def test_replaced_workers_stop_writing(
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as those of a lost head node after the job was submitted again."""
    real, path = StepLog.write, tmp_path / "taken" / STATUS_FILE

    def write(log: StepLog, step: int, metrics: dict[str, float]) -> None:
        real(log, step, metrics)
        path.write_text(path.read_text().replace('"groups": 1', '"groups": 2'))

    monkeypatch.setattr(StepLog, "write", write)
    assert exit_code(lambda: run("taken", train=TRAIN)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fmray: run taken: another job with this --run-id has started (worker group 2); this one,"
        " group 1, stops"
    )
    assert find_checkpoint(path.parent) is None and not (path.parent / "model").exists()
    status = read_status(path.parent)
    assert (status.groups, status.state) == (2, "running")


def test_a_mistake_found_by_a_worker_is_an_error_of_the_job(run: Callable[..., Result]) -> None:
    with pytest.raises(ValueError, match=r"budget is 0\.1, less than .* smallest budget here is"):
        run("budget", adaptive=ADAPTIVE, train=TRAIN | {"eval_budgets": (0.1, 1.0)})
    with pytest.raises(ValueError, match=r"nowhere .*does not load"):
        run("source", model={"source": "nowhere"})
    with pytest.raises(ValueError, match=r"less than one train.global_batch of 1024"):
        run("batch", train=TRAIN | {"global_batch": 1024})


def test_an_unprepared_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no processor; prepare it with `python jobs/prepare"):
        train(load_recipe(tmp_path / "nothing", tmp_path), "run")


def test_old_checkpoints_are_removed_and_the_best_stays(run: Callable[..., Result]) -> None:
    every = {"checkpoint_every": 1, "eval_every": 1, "keep_checkpoints": 2}
    result = run("pruned", train=TRAIN | every)
    kept = sorted(int(path.name[-8:]) for path in result.run_dir.glob("checkpoint-*"))
    scores = {
        line["step"]: line["accuracy/base"]
        for line in read_log(result.run_dir / "log.jsonl")
        if "accuracy/base" in line
    }
    best = min(step for step in scores if scores[step] == max(scores.values()))
    assert len(scores) == 8 and len(kept) == 2
    assert kept == sorted({best, 8}) or best == 8
    assert result.best_checkpoint == result.run_dir / f"checkpoint-{best:08d}"
