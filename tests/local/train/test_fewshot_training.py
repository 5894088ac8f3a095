"""Few-shot jobs in one process: every finetuning method, resume, evaluation, comparison."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.fewshot import TRAIN, fewshot_recipe, start_encoder, weights
from support.selection import color_store
from support.training import forget_after, losses

from fmray.config.arguments import job_path
from fmray.data.image_store import ImageStore
from fmray.data.images import decode_image
from fmray.fewshot import MetaDatasetSampler, confidence_interval, create_encoder
from fmray.runtime.files import MANIFEST, describe_files, write_manifest
from fmray.train.fewshot import compare
from fmray.train.fewshot import comparison as cells
from fmray.train.fewshot import pretrain as pretraining
from fmray.train.fewshot.encoder import ImageReader, load_encoder
from fmray.train.fewshot.evaluate import evaluate_encoder, measure_accuracy, task_samplers
from fmray.train.fewshot.method import EVALUATION_SEED
from fmray.train.fewshot.pretrain import pretrain_encoder
from fmray.train.launch import train

TARGETS = [{"collection": "target"}, {"collection": "sea", "split": "all"}]
COMPARE = {
    "targets": TARGETS,
    "methods": ["direct", "standard", "multitask"],
    "selections": ["all", "random", "no_consistency", "selected"],
    "random_seeds": [0, 1],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the encoder that finetuning starts from."""
    return start_encoder(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize("method", ["multitask", "standard", "lp_ft", "maml"])
def test_resumed_run_ends_with_the_same_weights(
    store, start: Path, tmp_path: Path, method: str
) -> None:
    sections: dict[str, Any] = {
        "train": TRAIN | {"method": method, "checkpoint_every": 2, "keep_checkpoints": 9}
    }
    sections["encoder"] = {"checkpoint": start}
    loaded = fewshot_recipe(store, tmp_path, **sections)
    complete = train(loaded, "run")
    wanted, lines = weights(complete.model_dir), losses(complete.run_dir)
    assert len(lines) == 6
    assert not any(torch.equal(wanted[name], tensor) for name, tensor in weights(start).items())
    forget_after(complete.run_dir, step=4)
    again = train(loaded, "run")
    assert losses(again.run_dir) == lines
    for name, tensor in weights(again.model_dir).items():
        assert torch.equal(tensor, wanted[name]), name
    for section, key, old, new in (
        ("train", "temperature", 10.0, 5.0),
        ("select", "method", "all", "random"),
        ("target", "collection", "target", "sea"),
    ):
        other = sections | {section: sections.get(section, {}) | {key: new}}
        with pytest.raises(ValueError, match=rf"{section}\.{key} was {old!r} and is {new!r}"):
            train(fewshot_recipe(store, tmp_path, **other), "run")


def test_tasks_are_chosen_again_until_there_is_a_checkpoint(store, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "selection.json").write_text('{"tasks": ["sea"]}')
    loaded = fewshot_recipe(store, tmp_path, train=TRAIN | {"steps": 1})
    assert len(train(loaded, "run").tasks) > 1


@pytest.mark.parametrize("strategy", ["ddp", "zero"])
def test_a_moved_encoder_resumes_at_another_learning_rate_and_other_weights_are_refused(
    store, start: Path, tmp_path: Path, strategy: str, capsys
) -> None:
    steps = {"strategy": strategy, "steps": 4}
    encoder = {"checkpoint": shutil.copytree(start, tmp_path / "old")}
    first = train(fewshot_recipe(store, tmp_path, encoder=encoder, train=TRAIN | steps), "run")
    half = weights(first.model_dir)
    encoder = {"checkpoint": (tmp_path / "old").rename(tmp_path / "new")}
    more = {"strategy": strategy, "lr": 1e-12}
    capsys.readouterr()
    result = train(fewshot_recipe(store, tmp_path, encoder=encoder, train=TRAIN | more), "run")
    assert "\ntrain.lr: 0.02 -> 1e-12\ntrain.steps: 4 -> 6\n" in capsys.readouterr().out
    assert len(losses(result.run_dir)) == 6
    for name, tensor in weights(result.model_dir).items():
        torch.testing.assert_close(tensor, half[name], rtol=0, atol=1e-8)

    other = {"checkpoint": first.model_dir}
    with pytest.raises(ValueError, match=r"the model to start from changed \(sha256 "):
        train(fewshot_recipe(store, tmp_path, encoder=other, train=TRAIN | more), "run")


def test_evaluation_during_training_reports_accuracy_and_changes_nothing(
    store, tmp_path: Path
) -> None:
    start_encoder(tmp_path / "it")
    encoder = {"checkpoint": tmp_path / "it"}
    blind = train(fewshot_recipe(store, tmp_path, encoder=encoder), "blind")
    steps = TRAIN | {"eval_every": 4, "eval_split": "train"}
    result = train(fewshot_recipe(store, tmp_path, encoder=encoder, train=steps), "run")
    for name, tensor in weights(result.model_dir).items():
        assert torch.equal(tensor, weights(blind.model_dir)[name]), name
    assert losses(result.run_dir) == losses(blind.run_dir)
    lines = [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line for line in lines if "accuracy/1-shot" in line}
    assert list(evaluations) == [4, 6]
    # the last evaluation is of the exported encoder, on other tasks of the same images
    sections = {"target": {"collection": "target", "split": "train"}, "train": TRAIN}
    again = fewshot_recipe(store, tmp_path, encoder=encoder, **sections).recipe
    model = load_encoder(again.encoder.model_copy(update={"checkpoint": result.model_dir}))
    rows = store.select("target", "train")
    samplers = task_samplers(
        store, rows, again.target, again.evaluate, again.seed + EVALUATION_SEED
    )
    accuracies = measure_accuracy(
        model, ImageReader(store, model.preprocess), rows, samplers, again.evaluate
    )
    for shots, values in accuracies.items():
        assert result.metrics[f"accuracy/{shots}-shot"] == values.mean()
        assert evaluations[6][f"accuracy/{shots}-shot"] == values.mean()
    # a run resumed after its last step trains nothing and still reports the accuracy
    assert (
        train(fewshot_recipe(store, tmp_path, encoder=encoder, train=steps), "run").metrics[
            "accuracy/1-shot"
        ]
        == accuracies[1].mean()
    )


def test_zero_with_sgd_resumes_with_the_same_number_of_workers_only(store, tmp_path: Path) -> None:
    steps = TRAIN | {"steps": 2, "strategy": "zero"}
    run_dir = train(fewshot_recipe(store, tmp_path, train=steps), "run").run_dir
    [state] = run_dir.glob("checkpoint-*/state.json")
    state.write_text(state.read_text().replace('"world_size": 1', '"world_size": 2'))
    folder = state.parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    write_manifest(folder, describe_files(folder, files))
    with pytest.raises(ValueError, match="2 workers with ZeRO and SGD, which can only be resumed"):
        train(fewshot_recipe(store, tmp_path, train=steps), "run")


def test_evaluation_reports_both_encoders_and_the_gain(
    store, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = fewshot_recipe(store, tmp_path, encoder={"checkpoint": start})
    with pytest.raises(ValueError, match="no model/ to evaluate"):
        evaluate_encoder(loaded, "run")
    train(loaded, "run")
    result = evaluate_encoder(loaded, "run")
    assert set(result.accuracies) == {(m, s) for m in ("direct", "multitask") for s in (1, 5)}
    out = tmp_path / "run" / "evaluation"
    table = pq.read_table(out / "tasks.parquet").to_pandas()
    for line in json.loads((out / "results.json").read_text())["accuracy"]:
        rows = table[(table.method == line["method"]) & (table.shots == line["shots"])]
        assert len(rows) == 20
        assert line["mean"] == pytest.approx(rows.accuracy.mean())
        assert line["half_width"] == pytest.approx(confidence_interval(rows.accuracy).half_width)
    assert "multitask      3-way 5-shot" in capsys.readouterr().out
    alone = fewshot_recipe(
        store, tmp_path, encoder={"checkpoint": start}, train={"method": "direct"}
    )
    direct = evaluate_encoder(alone, "direct")
    np.testing.assert_array_equal(direct.accuracies["direct", 1], result.accuracies["direct", 1])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"method": "direct"}}, "train.method: direct adaptation trains nothing"),
        ({"episodes": {"ways": 7}}, "no candidate tasks"),
    ],
)
def test_untrainable_recipe_is_an_error(store, tmp_path: Path, sections: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(fewshot_recipe(store, tmp_path, **sections), "run")


@pytest.mark.parametrize("objective", ["simclr", "moco", "supervised"])
def test_pretraining_resumes_where_it_stopped(
    store, tmp_path: Path, objective: str, monkeypatch, capsys
) -> None:
    section = {
        "objective": objective,
        "steps": 8,
        "batch": 16,
        "queue": 64,
        "collections": ["sea", "moss"],
    }
    monkeypatch.setattr(pretraining, "STATE_EVERY", 5)
    loaded = fewshot_recipe(store, tmp_path, pretrain=section)
    complete = pretrain_encoder(loaded, "complete")
    if objective != "moco":  # its queue is random at the start, so the task gets harder
        assert losses(tmp_path / "complete")[-1] < losses(tmp_path / "complete")[0]

    step_log = pretraining.StepLog.write

    def write(log: pretraining.StepLog, step: int, metrics: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt
        step_log(log, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.StepLog, "write", write)
        with pytest.raises(KeyboardInterrupt):
            pretrain_encoder(loaded, "parts")
    assert not (tmp_path / "parts" / "model").exists()
    parts = pretrain_encoder(loaded, "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "complete")
    wanted = weights(complete.model_dir)
    for name, tensor in weights(parts.model_dir).items():
        assert torch.equal(tensor, wanted[name]), name
    changed = fewshot_recipe(store, tmp_path, pretrain=section | {"weight_decay": 0.5})
    with pytest.raises(ValueError, match=r"pretrain\.weight_decay was 0\.0001 and is 0\.5"):
        pretrain_encoder(changed, "parts")
    longer = fewshot_recipe(store, tmp_path, pretrain=section | {"steps": 9, "lr": 0.5})
    capsys.readouterr()
    pretrain_encoder(longer, "parts")
    assert "pretrain.lr: 0.001 -> 0.5\npretrain.steps: 8 -> 9\n" in capsys.readouterr().out
    assert len(losses(tmp_path / "parts")) == 9
    with pytest.raises(ValueError, match=r"pretrain\.steps: .*state\.pt has taken 9 steps"):
        pretrain_encoder(loaded, "parts")


def test_comparison_is_computed_cell_by_cell(store, tmp_path: Path, monkeypatch, capsys) -> None:
    loaded = fewshot_recipe(
        store, tmp_path, compare=COMPARE, pretrain={"steps": 2, "batch": 16}, train={"steps": 2}
    )
    trained: list[list[str]] = []

    def counted(recipe, group, decoded):
        trained.append([cell.name for cell in group])
        return cells.run_cells(recipe, group, decoded)

    monkeypatch.setattr(compare, "run_cells", counted)
    result = compare.compare(loaded, "table")
    lines = ["direct", "standard", *(f"multitask/{s}" for s in COMPARE["selections"])]
    assert list(result.accuracies) == lines
    assert list(result.ways) == [(t, s) for t in ("target", "sea (all)") for s in (1, 5)]
    for column in result.ways:  # the same tasks by definition, so one training
        np.testing.assert_array_equal(
            result.accuracies["multitask/all"][column],
            result.accuracies["multitask/no_consistency"][column],
        )
    assert sum(len(group) for group in trained) == 2 * 7
    assert len(trained) < 2 * 7

    run_dir = tmp_path / "table"
    table = pq.read_table(run_dir / "tasks.parquet").to_pandas()
    random = table[
        (table.line == "multitask/random") & (table.target == "target") & (table.shots == 1)
    ]
    assert sorted(random.seed.unique()) == [0, 1]
    np.testing.assert_allclose(
        random.groupby("task").accuracy.mean(), result.accuracies["multitask/random"]["target", 1]
    )
    values = json.loads((run_dir / "results.json").read_text())
    assert {claim["better"] for claim in values["claims"]} >= {"multitask/selected", "standard"}
    assert (run_dir / "comparison.png").stat().st_size > 1000

    # a second run computes nothing; without the file of a cell it computes that cell
    trained.clear()
    again = compare.compare(loaded, "table")
    assert trained == []
    standard = [c for c in values["trainings"] if c["cell"] == "target-test-standard"]
    assert len(standard) == 1
    capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in (run_dir / "cells").iterdir()}
    missing = min(files)
    missing.unlink()
    monkeypatch.undo()
    third = compare.compare(loaded, "table")
    assert "1 trainings to run" in capsys.readouterr().out
    assert {p: t for p, t in files.items() if p != missing} == {
        p: p.stat().st_mtime_ns for p in files if p != missing
    }
    for line, columns in third.accuracies.items():
        for column, accuracy in columns.items():
            np.testing.assert_array_equal(accuracy, again.accuracies[line][column])


def test_comparison_without_targets_is_an_error(store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compare\.targets: name at least one"):
        compare.compare(fewshot_recipe(store, tmp_path), "none")


def test_evaluation_with_the_sampler_of_meta_dataset_matches_its_definition(
    store, start: Path, tmp_path: Path
) -> None:
    loaded = fewshot_recipe(
        store,
        tmp_path,
        encoder={"checkpoint": start},
        train={"method": "direct"},
        target={"collection": "target", "split": "all"},
        evaluate={"sampler": "meta_dataset_v1"},
    )
    result = evaluate_encoder(loaded, "run")
    assert result.ways == {0: 0} and "variable-shot" in result.table()
    rows = store.select("target", "all")
    sampler = MetaDatasetSampler(rows.labels, loaded.recipe.seed, "all")
    encoder = create_encoder("small/conv", start)
    images = [decode_image(encoded).image for encoded in store.images(rows.rows)]
    pixels = encoder.preprocess.normalise(encoder.preprocess.pixels(images))
    with torch.no_grad():
        features = encoder(pixels)
    wanted = []
    for index in range(20):
        task = sampler[index]
        centroids = torch.stack([features[support].mean(0) for support in task.support])
        cosine = torch.nn.functional.cosine_similarity
        right = [
            (cosine(features[query][:, None], centroids[None], dim=2).argmax(1) == n).double()
            for n, query in enumerate(task.query)
        ]
        wanted.append(float(torch.cat(right).mean()))
    assert result.accuracies["direct", 0].tolist() == pytest.approx(wanted)
    assert len(set(map(len, (sampler[i].classes for i in range(20))))) > 1


def test_job_scripts_run_a_fewshot_recipe(store, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"kind: fewshot\nname: mine\nimages: {{store: {store.path}}}\n"
        "encoder: {name: small/conv, image_size: 16}\npretrain: {steps: 2, batch: 16}\n"
        "target: {collection: target}\nepisodes: {ways: 3, queries: 4, tasks: 5}\n"
        "train: {steps: 2}\nevaluate: {tasks: 5, ways: 3, queries: 4}\n"
        f"cluster: {{storage: {tmp_path}, workers: 0}}\ntracking: {{enabled: false}}\n"
    )

    def run(job: str, run_id: str, *more: str) -> int:
        words = [job, "--config", str(recipe), "--run-id", run_id, *more]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(job_path(job)), run_name="__main__")
        return stopped.value.code

    assert run("pretrain_encoder.py", "start") == 0
    checkpoint = ["--set", f"encoder.checkpoint={tmp_path / 'start' / 'model'}"]
    assert run("train_fewshot.py", "run", *checkpoint) == 0
    chosen = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert (
        set(chosen["tasks"]) <= set(chosen["similarity"]) == {"crimson", "scarlet", "sea", "moss"}
    )
    assert run("evaluate.py", "run", *checkpoint) == 0
    assert "multitask      3-way 5-shot" in capsys.readouterr().out
    assert run("train_fewshot.py", "run", *checkpoint, "--set", "target=null") == 2
    assert "set target.collection" in capsys.readouterr().err
