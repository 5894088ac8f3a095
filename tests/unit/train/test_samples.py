"""Draws that do not depend on the workers, text-only batches, scores of answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats
from support.training import ADAPTIVE, load_recipe

from fmray.config import ScratchConfig
from fmray.data.loader import Batch
from fmray.data.processor import scratch_processor, unknown_token
from fmray.train.adallava.batches import blank_row, draw, model_inputs, score_answers, with_image
from fmray.train.adallava.model import build_model

PROCESSOR = scratch_processor(["red green blue circle square"], ScratchConfig())


def text_batch(rows: int) -> Batch:
    ids = torch.tensor([[1, 6, 7, 5, 8, 2]]).repeat(rows, 1)
    ids[:, 1] = 6 + torch.arange(rows) % 4
    labels = torch.full_like(ids, -100)
    labels[:, 4:] = ids[:, 4:]
    return Batch(ids, torch.ones_like(ids), labels, None, {}, [None] * rows, list(range(rows)))


def test_a_draw_belongs_to_its_sample() -> None:
    batch = text_batch(6)
    units_on, noise = draw(batch, 1, 5, range(4))
    for index in (4, 0, 2):
        one = Batch(
            torch.nn.functional.pad(batch.input_ids[index : index + 1], (0, 3)),
            torch.nn.functional.pad(batch.attention_mask[index : index + 1], (0, 3)),
            torch.nn.functional.pad(batch.labels[index : index + 1], (0, 3), value=-100),
            None,
            rows=[batch.rows[index]],
            tags=[None],
        )
        alone = draw(one, 1, 5, range(4))
        assert torch.equal(alone[0], units_on[index : index + 1])
        assert torch.equal(alone[1], noise[index : index + 1])
    assert not torch.equal(draw(batch, 1, 6, range(4))[1], noise)
    assert not torch.equal(draw(batch, 2, 5, range(4))[1], noise)


def test_draws_are_uniform_levels_and_gumbel_noise() -> None:
    batch = text_batch(2000)
    units_on, noise = draw(batch, 0, 0, range(2, 7))
    assert noise.shape == (2000, 6)
    counts = torch.bincount(units_on, minlength=7).tolist()
    assert counts[:2] == [0, 0]
    assert stats.chisquare(counts[2:]).pvalue > 1e-4
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-4


@pytest.mark.parametrize("adaptive", [None, ADAPTIVE])
def test_a_blank_picture_changes_no_loss_and_reaches_the_projector(
    tmp_path: Path, adaptive: dict[str, int] | None
) -> None:
    model = build_model(load_recipe(tmp_path, tmp_path, adaptive=adaptive).recipe, PROCESSOR)
    batch = text_batch(3)
    padded = with_image(batch, blank_row(PROCESSOR))
    assert with_image(padded, blank_row(PROCESSOR)) is padded
    losses = []
    for each in (batch, padded):
        drawn = {}
        if adaptive:
            units_on, noise = draw(each, 0, 0, range(4))
            drawn = {"units_on": units_on, "noise": noise}
        inputs = model_inputs(each, torch.float32, torch.device("cpu"))
        losses.append(model(**inputs, **drawn).loss)
    torch.testing.assert_close(losses[0], losses[1])
    losses[1].backward()
    base = model.base if adaptive else model
    gradients = [p.grad for p in base.model.multi_modal_projector.parameters()]
    assert all(g is not None and float(g.abs().max()) < 1e-12 for g in gradients)


def test_an_answer_is_right_when_every_token_is() -> None:
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 2, 3, -100], [-100, -100, -100, -100]])
    logits = torch.zeros(3, 4, 6)
    for row, place, token in ((0, 1, 3), (0, 2, 4), (1, 0, 2), (1, 1, 5)):
        logits[row, place, token] = 2.0
    answered, right, tokens, loss = score_answers(logits, labels)
    assert answered.tolist() == [1, 1, 0]
    assert right.tolist() == [1, 0, 0]
    assert tokens.tolist() == [2, 2, 0]
    hit, miss = (-torch.log_softmax(torch.tensor([2.0, 0, 0, 0, 0, 0]), 0))[:2].tolist()
    assert loss.tolist() == pytest.approx([2 * hit, hit + miss, 0], rel=1e-5)


def test_an_answer_with_an_unknown_word_is_never_right() -> None:
    """As in a set of one-word answers of which the vocabulary knows none."""
    processor = scratch_processor(["say it"], ScratchConfig())
    unknown = unknown_token(processor)
    ids = processor.tokenizer(["answer17", "it"], add_special_tokens=False)["input_ids"]
    assert ids[0] == [unknown] and ids[1] != [unknown]
    labels = torch.tensor([[-100, *ids[0], 2], [-100, *ids[1], 2]])
    logits = torch.nn.functional.one_hot(labels.roll(-1, 1).clamp(min=0), 16).float()
    assert score_answers(logits, labels, unknown)[1].tolist() == [0, 1]


def test_the_unknown_token_of_a_byte_level_tokenizer_ends_answers() -> None:
    class Tokenizer:
        unk_token_id = eos_token_id = 5

    assert unknown_token(type("P", (), {"tokenizer": Tokenizer})) is None
