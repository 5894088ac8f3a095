"""The search for static plans: what an adaptive model can do at a budget with one plan for all.

In: a `LoadedRecipe` of kind plans, and a run id. Out: a `PlansResult`, and in `<storage>/<run
id>/`: recipe.yaml, answers.jsonl (every plan asked, by which an interrupted search goes on),
plans.json, and evaluation/, where the plans found are beside the learned scheduler's on held-out
questions as in `fmray.train.adallava.evaluate`. Needs no Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from fmray.adallava import AdaptiveVLM, best_plan
from fmray.adallava.static_plans import leave_one_out, plan_score, search_plan
from fmray.adallava.store import WEIGHTS
from fmray.config import LoadedRecipe
from fmray.config.search import PlansRecipe
from fmray.data.loader import Batch, evaluation_batches
from fmray.data.processor import load_processor
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.search.state import append_line, whole_lines
from fmray.train.adallava.batches import model_inputs, score_answers
from fmray.train.adallava.evaluate import BudgetReport, Plan, measure, random_plans, row_ids

# Which calibration questions an adaptive model answers under which plan; each is asked once.
#
# In: a model and batches of questions. Out: right or wrong and the loss of every question under
# every plan asked for; a file of JSON lines, one for each batch and plan, from which a search that
# was interrupted goes on.


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


@dataclass(frozen=True)
class StaticPlan:
    """The plan found with `units_on` switches on.

    tag: the type of question that it is for; None: all of them. plan: a digit a switch. questions,
    accuracy: of the calibration. evaluations: plans scored; exhaustive: there are no others.
    """

    units_on: int
    tag: str | None
    plan: str
    questions: int
    accuracy: float
    evaluations: int
    exhaustive: bool


@dataclass(frozen=True)
class PlansResult:
    """plans: by size, then for all questions and for each type. evaluation: on held-out ones."""

    plans: list[StaticPlan]
    evaluation: BudgetReport


def search_plans(loaded: LoadedRecipe[PlansRecipe], run_id: str) -> PlansResult:
    """Search on questions of the training split, measure on the validation split.

    Raises ValueError for what is no adaptive model or data store, a budget below the always-on
    layers, and an earlier run of another model or other questions.
    """
    recipe = loaded.recipe
    run_dir = recipe.cluster.storage / run_id
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AdaptiveVLM.from_pretrained(recipe.model).to(device).eval()
    # with as many tokens at each layer, how many there are does not change a plan's share
    sizes = {model.cost.max_units(budget, tokens=1) for budget in recipe.budgets}
    origin = {
        "model": _digest(recipe.model / WEIGHTS),
        "store": _digest(recipe.store / "manifest.json"),
        "rows": recipe.calibration_rows,
    }
    processor = load_processor(recipe.store / "processor")
    calibration = list(
        evaluation_batches(recipe.store, "train", processor, recipe.batch, recipe.calibration_rows)
    )
    held_out = evaluation_batches(recipe.store, "validation", processor, recipe.batch, recipe.rows)
    run_dir.mkdir(parents=True, exist_ok=True)
    answers = PlanAnswers(run_dir / "answers.jsonl", model, calibration, origin)
    (run_dir / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    with tracking.open_job_run(recipe, run_id, "plans") as run:
        # of each unit for each question: [K, Q]
        importance = leave_one_out(
            lambda plans: torch.from_numpy(answers.of(plans)[1]), model.layout.num_units
        )
        found: list[StaticPlan] = []
        for units_on in sorted(sizes):
            learned = _learned(model, calibration, units_on)
            found += _search(recipe, answers, importance, learned, units_on)
        _write(found, run_dir / "plans.json")
        kinds = _kinds(found, importance.mean(1))
        out = run_dir / "evaluation"
        names = row_ids(recipe.store)
        result = measure(model, model, kinds, recipe.budgets, held_out, names, out)
        run.log(0, **{f"evaluate/{p.plans}/{p.budget:g}": p.accuracy for p in result.points})
        for path in (out, run_dir / "plans.json"):
            run.artifact(path)
    say(result.table())
    return PlansResult(found, result)


@torch.no_grad()
def _learned(model: AdaptiveVLM, calibration: list[Batch], units_on: int) -> list[str]:
    """The plan that the model's own scheduler has for each question: Q of them."""
    parameter, plans = next(model.parameters()), []
    for batch in calibration:
        inputs = model_inputs(batch, parameter.dtype, parameter.device)
        sizes = torch.full((len(batch.rows),), units_on, device=parameter.device)
        plans += [digits(plan) for plan in model(**inputs, units_on=sizes).plan]
    return plans


def _search(
    recipe: PlansRecipe,
    answers: PlanAnswers,
    importance: Tensor,
    learned: list[str],
    units_on: int,
) -> list[StaticPlan]:
    """The plans of one size: for all questions, and for each type where there are several.

    A plan is asked of all questions at once, so the searches for a type find many answers there.
    """
    types = sorted({tag for tag in answers.tags if tag is not None})
    found: list[StaticPlan] = []
    for tag in [None, *(types if len(types) > 1 else ())]:
        chosen = np.array([tag in (None, other) for other in answers.tags])

        def evaluate(plans: Tensor, chosen: np.ndarray = chosen) -> Tensor:
            correct, loss = answers.of(plans)
            return torch.from_numpy(plan_score(correct[:, chosen], loss[:, chosen]))

        often = Counter(np.array(learned)[chosen].tolist()).most_common(1)[0][0]
        starts = [often, *(plan.plan for plan in found[:1])]
        best = search_plan(
            evaluate,
            importance[:, torch.from_numpy(chosen)].mean(1),
            units_on,
            population=recipe.population,
            generations=recipe.generations,
            seed=recipe.seed,
            # the deterministic scheduler may have had fewer switches on
            starts=[_plan(text) for text in starts if text.count("1") == units_on],
        )
        [correct] = answers.of(best.plan[None])[0]
        found.append(
            StaticPlan(
                units_on,
                tag,
                digits(best.plan),
                int(chosen.sum()),
                float(correct[chosen].mean()),
                best.evaluations,
                best.exhaustive,
            )
        )
        say(_line(found[-1]))
    return found


def _line(found: StaticPlan) -> str:
    questions = "all questions" if found.tag is None else found.tag
    tried = f"all {found.evaluations}" if found.exhaustive else f"{found.evaluations}"
    return (
        f"{found.units_on} of {len(found.plan)} switches on, {questions}: {found.plan} answers"
        f" {found.accuracy:.4f} of {found.questions} (best of {tried} plans)"
    )


def _kinds(found: list[StaticPlan], importance: Tensor) -> dict[str, Plan]:
    """How each kind of plans is made on held-out questions, as evaluation makes them."""
    plans = {(static.units_on, static.tag): _plan(static.plan) for static in found}

    def searched(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        rows = [plans[units, None] for units in units_on.tolist()]
        return torch.stack(rows).to(units_on.device)

    def per_type(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        # a type that calibration did not have gets the plan for all questions
        asked = zip(units_on.tolist(), batch.tags, strict=True)
        rows = [plans.get((units, tag), plans[units, None]) for units, tag in asked]
        return torch.stack(rows).to(units_on.device)

    def important(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        return best_plan(importance.to(units_on.device).expand(len(units_on), -1), units_on)

    kinds: dict[str, Plan] = {"learned": lambda model, batch, units_on: None, "searched": searched}
    if any(static.tag is not None for static in found):
        kinds["per type"] = per_type
    return kinds | {"importance": important, "random": random_plans}


def _plan(text: str) -> Tensor:
    """The plan bool [K] that `digits` wrote."""
    return torch.tensor([digit == "1" for digit in text])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _write(found: list[StaticPlan], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(plan) for plan in found], indent=1) + "\n")
    os.replace(partial, path)
