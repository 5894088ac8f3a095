"""Which calibration questions an adaptive model answers under which plan; each is asked once.

In: a model and batches of questions. Out: right or wrong and the loss of every question under every
plan asked for; a file of JSON lines, one for each batch and plan, from which a search that was
interrupted goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch import Tensor

from fmray.adallava import AdaptiveVLM
from fmray.data.loader import Batch
from fmray.search.state import append_line, whole_lines
from fmray.train.samples import model_inputs, score_answers


class PlanAnswers:
    """Answers of one model to the questions of `batches`, by plan."""

    def __init__(
        self, path: Path, model: AdaptiveVLM, batches: Sequence[Batch], origin: Mapping[str, Any]
    ) -> None:
        """path: of the file, which may hold answers already. origin: what they depend on (model,
        questions); it is the file's first line.

        Raises ValueError for a file of another origin.
        """
        self._path, self._model, self._batches = path, model, batches
        self._starts = list(accumulate((len(batch.rows) for batch in batches[:-1]), initial=0))
        self.tags = np.array([tag for batch in batches for tag in batch.tags], dtype=object)
        self._correct: dict[str, np.ndarray] = {}
        self._loss: dict[str, np.ndarray] = {}  # NaN: not asked yet
        lines = whole_lines(path)
        if not lines:
            append_line(path, origin)
        for number, line in enumerate(lines, 1):
            read = json.loads(line)
            if number > 1:
                self._keep(**read)
            elif read != origin:
                raise ValueError(
                    f"{path}: these are answers of {read}, not of {dict(origin)}; give another "
                    "--run-id"
                )

    def of(self, plans: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Right or wrong, bool [P, Q], and loss in nats, float64 [P, Q], of all Q questions.

        plans: bool [P, K], all of one size. Only what is not known yet is asked.
        """
        keys = [digits(plan) for plan in plans]
        asked = [
            (first, batch, missing)
            for first, batch in zip(self._starts, self._batches, strict=True)
            if (missing := [i for i, key in enumerate(keys) if not self._knows(key, first)])
        ]
        bar = {"transient": True, "disable": not sys.stdout.isatty()}
        for first, batch, missing in track(asked, f"asking {len(plans)} plans", **bar):
            parameter = next(self._model.parameters())
            inputs = model_inputs(batch, parameter.dtype, parameter.device)
            for index, logits in self._model.logits_under(plans[missing], **inputs):
                _, right, _, loss = score_answers(logits, inputs["labels"])
                line = {"plan": keys[missing[index]], "first": first}
                line |= {"correct": right.int().tolist(), "loss": loss.tolist()}
                append_line(self._path, line)
                self._keep(**line)
        return (
            np.stack([self._correct[key] for key in keys]),
            np.stack([self._loss[key] for key in keys]),
        )

    def _knows(self, plan: str, question: int) -> bool:
        return plan in self._loss and not np.isnan(self._loss[plan][question])

    def _keep(self, plan: str, first: int, correct: list[int], loss: list[float]) -> None:
        """Answers to the questions from number `first` on."""
        questions = slice(first, first + len(loss))
        if plan not in self._loss:
            self._correct[plan] = np.zeros(len(self.tags), dtype=bool)
            self._loss[plan] = np.full(len(self.tags), np.nan)
        self._correct[plan][questions], self._loss[plan][questions] = correct, loss


def digits(plan: Tensor) -> str:
    """A plan bool [K] as text: a digit a switch."""
    return "".join("01"[on] for on in plan.int().tolist())
