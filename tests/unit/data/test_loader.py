"""The loader: the same batches for any number of ranks, equal to the processor's output."""

from __future__ import annotations

import json
import shutil
import threading
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_store import make_store, shapes_store

from fmray.config import ScratchConfig, ShapesConfig
from fmray.data import loader as loader_module
from fmray.data.loader import (
    IGNORED,
    Batch,
    InstructionLoader,
    Schedule,
    evaluation_batches,
    lanes_of,
)
from fmray.data.processor import load_processor, scratch_processor
from fmray.data.records import chat_messages, encode
from fmray.data.store import StoreSplit
from fmray.train.adallava.batches import answer_tokens

IMAGES = 500


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 generated images with three questions each, in three shards."""
    config = ShapesConfig(pictures=IMAGES, validation_pictures=1, turns=3)
    return shapes_store(tmp_path_factory.mktemp("shapes"), config)


def make_loader(store: Path, **changed: Any) -> InstructionLoader:
    options = {
        "global_batch": 32,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
        "samples": "turn",
        "max_length": 100,
        "micro_batch": 8,
    }
    processor = load_processor(store / "processor")
    return InstructionLoader(store, "train", processor, **(options | changed))


def contents(steps: Any) -> list[list[tuple]]:
    """Return the samples of each step as comparable tuples: row, ids and labels."""
    result = []
    for micro_batches in steps:
        step = []
        for batch in micro_batches:
            for i, row in enumerate(batch.rows):
                length = int(batch.attention_mask[i].sum())
                ids, labels = batch.input_ids[i, :length], batch.labels[i, :length]
                step.append((row, tuple(ids.tolist()), tuple(labels.tolist())))
        result.append(step)
    return result


def test_global_batches_do_not_depend_on_the_number_of_ranks(store: Path) -> None:
    alone = contents(make_loader(store).epoch(1))
    assert len(alone) == make_loader(store).steps_per_epoch == IMAGES * 3 // 32
    for world_size in (2, 3, 4, 5, 7, 32):
        loaders = [make_loader(store, rank=r, world_size=world_size) for r in range(world_size)]
        ranks = [list(islice(loader.epoch(1), 5)) for loader in loaders]
        assert {len(step) for rank in ranks for step in rank} == {loaders[0].passes}
        samples = [
            contents([[batch for batch in step if not batch.filler] for step in rank])
            for rank in ranks
        ]
        for step, together in enumerate(zip(*samples, strict=True)):
            assert sorted(chain(*together)) == sorted(alone[step])
            assert max(map(len, together)) - min(map(len, together)) <= 1


def test_filler_has_no_loss(store: Path) -> None:
    """33 samples in micro batches of 8: rank 1 has 17, one micro batch more than rank 0."""
    first, second = (
        next(make_loader(store, global_batch=33, rank=rank, world_size=2).epoch(0))
        for rank in range(2)
    )
    assert [len(batch.rows) for batch in second] == [8, 8, 1]
    assert [batch.filler for batch in first] == [False, False, True]
    assert [answer_tokens(batch) > 0 for batch in first] == [True, True, False]


def test_epochs_differ_and_use_each_sample_at_most_once(store: Path) -> None:
    loader = make_loader(store)
    epochs = [list(chain(*contents(loader.epoch(epoch)))) for epoch in (0, 1)]
    for samples in epochs:
        assert len(set(samples)) == len(samples) == loader.steps_per_epoch * 32
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # other samples are left over
    assert list(chain(*contents(make_loader(store).epoch(0)))) == epochs[0]
    assert list(chain(*contents(make_loader(store, seed=1).epoch(0)))) != epochs[0]


def test_resumed_epoch_is_the_tail_of_the_full_epoch(store: Path) -> None:
    full = contents(make_loader(store).epoch(2))
    assert contents(make_loader(store).epoch(2, start_step=30)) == full[30:]
    assert contents(make_loader(store, threads=3, prefetch=2).epoch(2, start_step=3)) == full[3:]
    assert contents(make_loader(store).epoch(2, start_step=len(full))) == []


def test_labels_are_exactly_the_answers(store: Path) -> None:
    tokenizer = load_processor(store / "processor").tokenizer
    records = json.loads((store.parent / "source" / "train.json").read_text())
    for kind in ("turn", "conversation"):
        loader = make_loader(store, samples=kind)
        for micro_batches in list(loader.epoch(0))[:5]:
            for batch in micro_batches:
                assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
                for i, row in enumerate(batch.rows):
                    has_loss = batch.labels[i] != IGNORED
                    labels = batch.labels[i][has_loss]
                    assert (labels == batch.input_ids[i][has_loss]).all()
                    text = tokenizer.decode(labels)
                    answers = [turn["value"] for turn in records[row]["conversations"][1::2]]
                    shown = tokenizer.decode(batch.input_ids[i]).count("ASSISTANT:")
                    if kind == "turn":
                        assert text == f"{answers[shown - 1]} </s>"
                        assert batch.tags[i] == records[row]["tags"][shown - 1]
                    else:
                        assert text == " ".join(f"{answer} </s>" for answer in answers)


def test_batches_equal_the_output_of_the_processor(store: Path) -> None:
    processor = load_processor(store / "processor")
    records = json.loads((store.parent / "source" / "train.json").read_text())
    batch = next(make_loader(store, samples="conversation").epoch(0))[0]
    texts, images = [], []
    for row in batch.rows:
        texts.append(processor.apply_chat_template(chat_messages(records[row]["conversations"])))
        images.append(Image.open(store.parent / "source" / records[row]["image"]))
    real = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, real["input_ids"])
    assert torch.equal(batch.attention_mask, real["attention_mask"])
    assert torch.equal(batch.pixel_values, real["pixel_values"])


def test_samples_of_similar_length_share_a_batch_on_all_ranks() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 400, 40_000)
    schedule = Schedule(lengths, np.arange(40_000) // 64, global_batch=64, seed=0)

    def padded(batches: np.ndarray) -> float:
        return float(lengths[batches].max(axis=1).sum() * batches.shape[1] / lengths[batches].sum())

    ranks = np.stack([schedule.epoch(0, rank, 4) for rank in range(4)])  # [4, steps, 16]
    bucketed = np.mean([padded(rank) for rank in ranks])
    shuffled = padded(generator.permutation(40_000).reshape(-1, 16))
    assert shuffled > 1.5 and bucketed < 1.1
    longest = lengths[ranks].max(axis=2)  # ranks wait for the slowest one
    assert (longest.max(axis=0) / longest.min(axis=0)).mean() < 1.15
    steps = lengths[ranks[0]].mean(axis=1)  # no trend from short to long
    assert abs(np.corrcoef(np.arange(len(steps)), steps)[0, 1]) < 0.15


def test_windows_are_smaller_if_samples_are_large() -> None:
    sizes = {
        "lengths": np.ones(10**6),
        "groups": np.zeros(10**6, int),
        "global_batch": 128,
        "seed": 0,
    }
    small, large = Schedule(**sizes, sample_bytes=100.0), Schedule(**sizes, sample_bytes=1e5)
    assert small._window_steps(2) == 2048
    assert large._window_steps(2) * 2 * 64 * 1e5 <= 2**30


@pytest.mark.parametrize(
    "batch, lanes", [(64, 64), (128, 64), (96, 48), (7, 7), (130, 26), (67, 1)]
)
def test_lanes(batch: int, lanes: int) -> None:
    assert lanes_of(batch) == lanes


def test_long_samples_are_skipped_and_long_conversations_cut(store: Path) -> None:
    split = StoreSplit(store, "train")
    everything = split.samples("turn", 10**9)
    assert len(everything.row) == IMAGES * 3
    limit = int(np.median(everything.length))
    turns = split.samples("turn", limit)
    assert turns.length.max() == limit
    assert len(turns.row) == (everything.length <= limit).sum()
    cut = split.samples("conversation", limit)
    assert len(cut.row) == len(set(cut.row)) == len(set(turns.row))
    for row, turn in zip(cut.row, cut.turn, strict=True):
        assert turn == turns.turn[turns.row == row].max()
    for batch in chain(*make_loader(store, max_length=limit).epoch(0)):
        assert batch.attention_mask.sum(dim=1).max() <= limit


def test_evaluation_leaves_out_what_training_leaves_out(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "again please"}, {"from": "gpt", "value": "one two three"}]
    records = [{"id": str(i), "conversations": turns * (100 if i < 2 else 1)} for i in range(4)]
    processor = scratch_processor([turn["value"] for turn in turns], ScratchConfig())
    store = make_store(tmp_path / "store", records, tmp_path, processor, max_length=128)
    split = StoreSplit(store, "train")
    longest = {row: split.samples("turn").turn[split.samples("turn").row == row].max()
               for row in range(4)}  # fmt: skip

    def batches(**options: Any) -> list[Batch]:
        return list(evaluation_batches(store, "train", processor, 8, **options))

    for batch in batches():  # the limit is the store's
        assert batch.input_ids.shape[1] <= 128
    rows = [row for batch in batches() for row in batch.rows]
    assert [rows.count(row) for row in range(4)] == [longest[row] + 1 for row in range(4)]
    assert str(split.samples("turn", rows=1)) == (
        f"{longest[0] + 1} samples of 1 row ({99 - longest[0]} answers of more than 128 tokens"
        " left out)"
    )
    trained = make_loader(store, max_length=30, global_batch=4).samples.row.tolist()
    assert [row for batch in batches(max_length=30) for row in batch.rows] == trained
    with pytest.raises(ValueError, match="all 202 answers to evaluate are longer than data"):
        batches(max_length=3)


def test_error_in_a_thread_is_raised_at_its_step(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(store, global_batch=30, micro_batch=30)
    original, calls = loader._step, []

    def failing(samples: np.ndarray) -> list[Batch]:
        calls.append(samples)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return original(samples)

    monkeypatch.setattr(loader, "_step", failing)
    steps = loader.epoch(0)
    next(steps)
    next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_deleted_store_is_an_error(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    loader = make_loader(copy, global_batch=30, micro_batch=30)
    for part in (copy / "train").iterdir():
        part.unlink()
    with pytest.raises(FileNotFoundError):
        list(loader.epoch(0))


def test_closing_ends_the_threads_and_prefetch_is_bounded(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(store, threads=2, prefetch=3)
    calls = []
    original = loader_module.InstructionLoader._step
    monkeypatch.setattr(
        loader_module.InstructionLoader,
        "_step",
        lambda self, samples: (calls.append(1), original(self, samples))[1],
    )
    steps = loader.epoch(0)
    next(steps)
    time.sleep(0.5)
    assert len(calls) == 3  # one consumed, two waiting
    assert any(thread.name.startswith("fmray-loader") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("fmray-loader") for thread in threading.enumerate())
    assert loader.wait_seconds > 0


def test_text_only_rows_and_images_share_a_batch(tmp_path: Path) -> None:
    records, texts = [], ["what ?", "a", "b"]
    for index in range(8):
        has_image = index % 2 == 0
        question = "<image>\nwhat ?" if has_image else "what ? what ?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ab"[index % 2]}]
        record: dict[str, Any] = {"id": str(index), "conversations": turns}
        if has_image:
            Image.new("RGB", (40 + index, 50), (index, 0, 0)).save(tmp_path / f"{index}.png")
            record["image"] = f"{index}.png"
        records.append(record)
    processor = scratch_processor(texts, ScratchConfig())
    store = make_store(tmp_path / "store", records, tmp_path, processor, rows_per_shard=3)
    (step,) = make_loader(store, global_batch=8, micro_batch=8).epoch(0)
    batch = step[0]
    assert batch.pixel_values.shape == (4, 3, 32, 32)
    assert batch.tags == [None] * 8
    images = processor.image_processor
    with_image = [row for row in batch.rows if row % 2 == 0]
    for pixels, row in zip(batch.pixel_values, with_image, strict=True):
        # the row number is the red value, so this checks the order of the images
        red = (row / 255 - images.image_mean[0]) / images.image_std[0]
        assert abs(float(pixels[0].mean()) - red) < 1e-3
    for ids, row in zip(batch.input_ids, batch.rows, strict=True):
        assert (ids == processor.image_token_id).sum() == (4 if row % 2 == 0 else 0)
    only_text = make_store(tmp_path / "text", records[1::2], tmp_path, processor)
    (step,) = make_loader(only_text, global_batch=4, micro_batch=4).epoch(0)
    assert step[0].pixel_values is None and step[0].to("cpu").pixel_values is None


def test_evaluation_covers_every_answer_once_with_equal_batches_per_rank(store: Path) -> None:
    processor = load_processor(store / "processor")

    def batches(**options: Any) -> list[Batch]:
        return list(evaluation_batches(store, "train", processor, 16, **options))

    alone = batches(rows=45)
    assert [row for batch in alone for row in batch.rows] == [
        r for r in range(45) for _ in range(3)
    ]
    ranks = [batches(rows=45, rank=rank, world_size=4) for rank in range(4)]
    assert len({len(rank) for rank in ranks}) == 1
    counted = [batch for rank in ranks for batch in rank if not batch.filler]
    assert sorted(contents([counted])[0]) == sorted(contents([alone])[0])
    fillers = [batch for rank in ranks for batch in rank if batch.filler]
    assert fillers and all((batch.labels == IGNORED).all() for batch in fillers)
    assert sum(len(batch.rows) for batch in batches()) == IMAGES * 3


def test_lengths_in_the_store_equal_those_of_the_batches(store: Path) -> None:
    split = StoreSplit(store, "train")
    processor = load_processor(store / "processor")
    for row in range(0, IMAGES, 50):
        encoded = encode(processor, split.conversation(row))
        first = split.first_answer[row]
        assert split.turn_tokens[first : first + 3].tolist() == encoded.turn_tokens(4)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"world_size": 33}, "32 is less than a sample for each of 33 workers; use fewer"),
        ({"global_batch": 1600}, "1500 train samples of at most 100 tokens are less than one"),
        ({"max_length": 1}, "0 train samples of at most 1 tokens"),
    ],
)
def test_impossible_settings_are_errors(store: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(store, **changed)


def test_incomplete_store_is_an_error(store: Path, tmp_path: Path) -> None:
    processor = load_processor(store / "processor")
    shutil.copytree(store, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no complete data store \(no manifest.json\)"):
        next(evaluation_batches(tmp_path / "copy", "train", processor, 4))
    (tmp_path / "copy" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="no data store manifest"):
        next(evaluation_batches(tmp_path / "copy", "train", processor, 4))
    with pytest.raises(ValueError, match="no split 'test', only train"):
        next(evaluation_batches(store, "test", processor, 4))
