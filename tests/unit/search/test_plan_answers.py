"""Answers under plans: each question is asked once, stored, and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import adaptive, batch, tiny_llava

from fmray.data.loader import Batch
from fmray.search.plans import PlanAnswers, plan_digits

ORIGIN = {"model": "a", "rows": 5}


@pytest.fixture(scope="module")
def model():
    return adaptive(tiny_llava(layers=6), first=2)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    made = []
    for number, lengths in enumerate(([9, 7], [8, 6, 7])):
        data = batch(lengths, answers=[2] * len(lengths), seed=number)
        tags = ["color", "count", None][: len(lengths)]
        made.append(Batch(**data, tags=tags, rows=list(range(len(lengths)))))
    return made


def plans(*texts: str) -> torch.Tensor:
    return torch.tensor([[digit == "1" for digit in text] for text in texts])


def losses(model, batches: list[Batch], plan: str) -> list[float]:
    """Loss of each answer by a forward of the complete model, masked, in float64."""
    values: list[float] = []
    for part in batches:
        rows = plans(plan).expand(len(part.rows), -1)
        data = (part.input_ids, part.attention_mask, part.pixel_values, part.labels)
        with torch.no_grad():
            logits = model(*data, plan=rows, execution="masked").logits.double()
        targets = part.labels[:, 1:]
        chosen = logits.log_softmax(-1)[:, :-1].gather(2, targets[..., None].clamp(min=0))[..., 0]
        values += (-chosen * (targets != -100)).sum(1).tolist()
    return values


def test_losses_equal_those_of_a_forward(model, batches, tmp_path: Path) -> None:
    answers = PlanAnswers(tmp_path / "answers.jsonl", model, batches, ORIGIN)
    correct, loss = answers.of(plans("1100", "0101"))
    assert correct.shape == loss.shape == (2, 5) and correct.dtype == bool
    assert loss[0].tolist() == pytest.approx(losses(model, batches, "1100"), rel=1e-4)
    assert loss[1].tolist() == pytest.approx(losses(model, batches, "0101"), rel=1e-4)
    assert answers.tags.tolist() == ["color", "count", "color", "count", None]


def test_an_answer_is_correct_if_every_token_is_the_most_probable(
    model, batches, tmp_path: Path
) -> None:
    """The answers are the model's own under one plan, so all are correct under it."""
    made = []
    for part in batches:
        ids, labels = part.input_ids.clone(), part.labels.clone()
        for position in range(1, ids.shape[1]):  # teacher-forced: one token after the other
            rows = plans("0110").expand(len(part.rows), -1)
            with torch.no_grad():
                logits = model(
                    ids, part.attention_mask, part.pixel_values, labels, plan=rows
                ).logits
            answer = labels[:, position] != -100
            ids[:, position] = torch.where(
                answer, logits[:, position - 1].argmax(-1), ids[:, position]
            )
            labels[:, position] = torch.where(answer, ids[:, position], labels[:, position])
        made.append(
            Batch(ids, part.attention_mask, labels, part.pixel_values, {}, part.tags, part.rows)
        )
    answers = PlanAnswers(tmp_path / "answers.jsonl", model, made, ORIGIN)
    correct, _ = answers.of(plans("0110", "1001"))
    assert correct[0].all() and not correct[1].all()


def test_no_question_is_asked_twice_even_after_a_crash(
    model, batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    original = type(model).logits_under

    def counted(self, plans, *data, **options):
        asked.extend((plan_digits(plan), options["input_ids"].shape[0]) for plan in plans)
        return original(self, plans, *data, **options)

    monkeypatch.setattr(type(model), "logits_under", counted)
    path = tmp_path / "answers.jsonl"
    answers = PlanAnswers(path, model, batches, ORIGIN)
    first = answers.of(plans("1100", "0101"))
    again = answers.of(plans("0101", "1010", "1100"))
    assert sorted(asked) == sorted((p, n) for p in ("1100", "0101", "1010") for n in (2, 3))
    np.testing.assert_array_equal(again[1][[2, 0]], first[1])

    # a crash cut the last line; the line before it is of the same plan's first batch
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    asked.clear()
    restored = PlanAnswers(path, model, batches, ORIGIN).of(plans("0101", "1010", "1100"))
    assert asked == [("1010", 3)]
    np.testing.assert_array_equal(restored[0], again[0])
    np.testing.assert_array_equal(restored[1], again[1])
    assert path.read_bytes() == content


def test_answers_of_another_model_are_an_error(model, batches, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    PlanAnswers(path, model, batches, ORIGIN)
    with pytest.raises(
        ValueError, match=r"answers.jsonl: these are answers of .*'model': 'a'.*give"
    ):
        PlanAnswers(path, model, batches, ORIGIN | {"model": "b"})
