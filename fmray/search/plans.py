"""Searches static plans: how well an adaptive model answers at a budget with one plan for all.

Plans are searched on questions of the training split (the calibration) and measured on held-out
ones next to the learned scheduler, as `fmray.train.adallava.evaluate` does. The folder
`<storage>/<run id>/` gets recipe.yaml, answers.jsonl (every plan asked, from which an interrupted
search resumes), plans.json, and evaluation/. Needs no Ray.

A plan is bool [K], one entry per unit. In files and keys it is written as `plan_digits`: "1011".
"""

from __future__ import annotations

import json
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
from fmray.data.loader import Batch, evaluation_batches, evaluation_samples
from fmray.data.processor import load_processor, unknown_token
from fmray.data.store import Manifest, StoreSplit
from fmray.runtime import tracking
from fmray.runtime.console import changed_settings, say
from fmray.runtime.files import sha256, write_atomic, write_json
from fmray.search.state import append_line, complete_lines
from fmray.train.adallava.batches import model_inputs, score_answers
from fmray.train.adallava.evaluate import BudgetReport, Plan, measure, random_plans, row_ids

# --- Plans, results ---


def plan_digits(plan: Tensor) -> str:
    """Return a plan bool [K] as text: one digit per unit."""
    return "".join("01"[on] for on in plan.int().tolist())


def plan_from_digits(text: str) -> Tensor:
    """Return the plan bool [K] that `plan_digits` wrote."""
    return torch.tensor([digit == "1" for digit in text])


@dataclass(frozen=True)
class StaticPlan:
    """The best plan with `units_on` units on: an entry of `plans.json`."""

    units_on: int
    tag: str | None  #: the type of question that it is for; None: all questions
    plan: str  #: `plan_digits`
    questions: int  #: of the calibration
    accuracy: float  #: on them
    evaluations: int  #: plans scored
    exhaustive: bool  #: whether all plans of the size were scored


@dataclass(frozen=True)
class PlansResult:
    """What a search for plans found."""

    plans: list[StaticPlan]  #: by size; of each, first for all questions, then by type
    evaluation: BudgetReport  #: on held-out questions


# --- Answers to the calibration questions ---


class PlanAnswers:
    """Answers of a model to the questions of `batches` by plan, each asked once and kept on disk.

    Attributes:
        tags: [Q], the type of each question or None.
    """

    def __init__(
        self,
        path: Path,
        model: AdaptiveVLM,
        batches: Sequence[Batch],
        origin: Mapping[str, Any],
        unknown: int | None = None,
    ) -> None:
        """Read the answers that the file `path` already has.

        Args:
            path: JSON lines: `origin`, then one line per batch and plan.
            origin: what the answers depend on (model, questions).
            unknown: see `score_answers`.

        Raises:
            ValueError: the file has another origin.
        """
        self._path, self._model, self._batches, self._unknown = path, model, batches, unknown
        self._starts = list(accumulate((len(batch.rows) for batch in batches[:-1]), initial=0))
        self.tags = np.array([tag for batch in batches for tag in batch.tags], dtype=object)
        # by `plan_digits`, [Q]
        self._correct: dict[str, np.ndarray] = {}
        self._loss: dict[str, np.ndarray] = {}  # NaN: not asked yet
        lines = complete_lines(path)
        if not lines:
            append_line(path, origin)
        for number, line in enumerate(lines, 1):
            values = json.loads(line)
            if number > 1:
                self._store(**values)
            elif values != origin:
                raise ValueError(
                    f"{path}: these are answers of {values}, not of {dict(origin)}; give another "
                    "--run-id"
                )

    def of(self, plans: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return which questions are answered correctly under each plan, and the losses.

        Asks only what is not known yet.

        Args:
            plans: bool [P, K], all with the same number of units on.

        Returns:
            bool [P, Q] and, in nats, float64 [P, Q].
        """
        keys = [plan_digits(plan) for plan in plans]
        open_questions = [
            (start, batch, missing)
            for start, batch in zip(self._starts, self._batches, strict=True)
            if (missing := [i for i, key in enumerate(keys) if not self._knows(key, start)])
        ]
        bar = {"transient": True, "disable": not sys.stdout.isatty()}
        for start, batch, missing in track(open_questions, f"asking {len(plans)} plans", **bar):
            parameter = next(self._model.parameters())
            inputs = model_inputs(batch, parameter.dtype, parameter.device)
            for index, logits in self._model.logits_under(plans[missing], **inputs):
                _, correct, _, loss = score_answers(logits, inputs["labels"], self._unknown)
                line = {"plan": keys[missing[index]], "first": start}
                line |= {"correct": correct.int().tolist(), "loss": loss.tolist()}
                append_line(self._path, line)
                self._store(**line)
        return (
            np.stack([self._correct[key] for key in keys]),
            np.stack([self._loss[key] for key in keys]),
        )

    def _knows(self, plan: str, question: int) -> bool:
        return plan in self._loss and not np.isnan(self._loss[plan][question])

    def _store(self, plan: str, first: int, correct: list[int], loss: list[float]) -> None:
        """Keep the answers to the questions from number `first` on; the arguments are the keys of a
        line of the file."""
        questions = slice(first, first + len(loss))
        if plan not in self._loss:
            self._correct[plan] = np.zeros(len(self.tags), dtype=bool)
            self._loss[plan] = np.full(len(self.tags), np.nan)
        self._correct[plan][questions], self._loss[plan][questions] = correct, loss


# --- The search ---


def search_plans(loaded: LoadedRecipe[PlansRecipe], run_id: str) -> PlansResult:
    """Search plans on questions of the training split; measure them on the validation split.

    Raises:
        ValueError: the recipe names no adaptive model or no data store, a budget is below the cost
            of the layers that always run, or an earlier run had another model or other questions.
    """
    recipe = loaded.recipe
    run_dir = recipe.cluster.storage / run_id

    # model, budgets, questions
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AdaptiveVLM.from_pretrained(recipe.model).to(device).eval()
    # every layer has the same number of tokens, so a plan's share does not depend on it
    sizes = {model.cost.max_units(budget, tokens=1) for budget in recipe.budgets}
    origin = {
        "model": sha256(recipe.model / WEIGHTS)[:12],
        "store": Manifest.read(recipe.store).fingerprint(recipe.store)[:12],
        "rows": recipe.calibration_rows,
    }
    processor = load_processor(recipe.store / "processor")
    calibration = list(
        evaluation_batches(recipe.store, "train", processor, recipe.batch, recipe.calibration_rows)
    )
    held_out = evaluation_batches(recipe.store, "validation", processor, recipe.batch, recipe.rows)
    asked = evaluation_samples(StoreSplit(recipe.store, "train"), recipe.calibration_rows)
    measured = evaluation_samples(StoreSplit(recipe.store, "validation"), recipe.rows)
    run_dir.mkdir(parents=True, exist_ok=True)
    unknown = unknown_token(processor)
    answers = PlanAnswers(run_dir / "answers.jsonl", model, calibration, origin, unknown)
    write_atomic(run_dir / "recipe.yaml", loaded.dump())
    say(changed_settings(loaded, run_dir / "recipe.yaml"))
    say(f"search on {asked}; evaluation on {measured}")

    with tracking.open_job_run(recipe, run_id, "plans") as run:
        # search: the importance of each unit for each question [K, Q], then plans by size
        importance = leave_one_out(
            lambda plans: torch.from_numpy(answers.of(plans)[1]), model.layout.num_units
        )
        plans: list[StaticPlan] = []
        for units_on in sorted(sizes):
            learned = _learned_plans(model, calibration, units_on)
            plans += _plans_of_size(recipe, answers, importance, learned, units_on)
        write_json(run_dir / "plans.json", [asdict(plan) for plan in plans])

        # measure on held-out questions
        sources = _plan_sources(plans, importance.mean(1))
        out = run_dir / "evaluation"
        names = row_ids(recipe.store)
        report = measure(model, model, sources, recipe.budgets, held_out, names, out, unknown)
        run.log(0, **{f"evaluate/{p.plans}/{p.budget:g}": p.accuracy for p in report.points})
        for path in (out, run_dir / "plans.json"):
            run.artifact(path)
    say(report.table())
    return PlansResult(plans, report)


@torch.no_grad()
def _learned_plans(model: AdaptiveVLM, calibration: list[Batch], units_on: int) -> list[str]:
    """Return the `plan_digits` that the model's own scheduler gives each of Q questions."""
    parameter, plans = next(model.parameters()), []
    for batch in calibration:
        inputs = model_inputs(batch, parameter.dtype, parameter.device)
        sizes = torch.full((len(batch.rows),), units_on, device=parameter.device)
        plans += [plan_digits(plan) for plan in model(**inputs, units_on=sizes).plan]
    return plans


def _plans_of_size(
    recipe: PlansRecipe,
    answers: PlanAnswers,
    importance: Tensor,
    learned: list[str],
    units_on: int,
) -> list[StaticPlan]:
    """Search the plan of one size for all questions, and for each type if there are several.

    A plan is asked of all questions at once, so the searches for single types need few new answers.

    Args:
        importance: [K, Q].
        learned: `plan_digits` of the scheduler for each of the Q questions.
    """
    types = sorted({tag for tag in answers.tags if tag is not None})
    plans: list[StaticPlan] = []
    for tag in [None, *(types if len(types) > 1 else ())]:
        chosen = np.array([tag in (None, other) for other in answers.tags])

        def evaluate(plans: Tensor, chosen: np.ndarray = chosen) -> Tensor:
            correct, loss = answers.of(plans)
            return torch.from_numpy(plan_score(correct[:, chosen], loss[:, chosen]))

        # start from the scheduler's most frequent plan, and from the plan for all questions
        most_frequent = Counter(np.array(learned)[chosen].tolist()).most_common(1)[0][0]
        starts = [most_frequent, *(plan.plan for plan in plans[:1])]
        best = search_plan(
            evaluate,
            importance[:, torch.from_numpy(chosen)].mean(1),
            units_on,
            population=recipe.population,
            generations=recipe.generations,
            seed=recipe.seed,
            # the deterministic scheduler may have fewer units on
            starts=[plan_from_digits(text) for text in starts if text.count("1") == units_on],
        )
        [correct] = answers.of(best.plan[None])[0]
        plan = StaticPlan(
            units_on=units_on,
            tag=tag,
            plan=plan_digits(best.plan),
            questions=int(chosen.sum()),
            accuracy=float(correct[chosen].mean()),
            evaluations=best.evaluations,
            exhaustive=best.exhaustive,
        )
        plans.append(plan)
        say(_line(plan))
    return plans


def _line(plan: StaticPlan) -> str:
    questions = "all questions" if plan.tag is None else plan.tag
    scored = f"all {plan.evaluations}" if plan.exhaustive else f"{plan.evaluations}"
    return (
        f"{plan.units_on} of {len(plan.plan)} units on, {questions}: {plan.plan} has accuracy"
        f" {plan.accuracy:.4f} on {plan.questions} (best of {scored} plans)"
    )


def _plan_sources(static: list[StaticPlan], importance: Tensor) -> dict[str, Plan]:
    """Return the sources of plans to compare on held-out questions, by name.

    Args:
        importance: [K], mean over the calibration questions.
    """
    plans = {(plan.units_on, plan.tag): plan_from_digits(plan.plan) for plan in static}

    def searched(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        rows = [plans[units, None] for units in units_on.tolist()]
        return torch.stack(rows).to(units_on.device)

    def per_type(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        # a type that the calibration did not have gets the plan for all questions
        keys = zip(units_on.tolist(), batch.tags, strict=True)
        rows = [plans.get((units, tag), plans[units, None]) for units, tag in keys]
        return torch.stack(rows).to(units_on.device)

    def important(model: AdaptiveVLM, batch: Batch, units_on: Tensor) -> Tensor:
        return best_plan(importance.to(units_on.device).expand(len(units_on), -1), units_on)

    sources: dict[str, Plan] = {
        "learned": lambda model, batch, units_on: None,
        "searched": searched,
    }
    if any(plan.tag is not None for plan in static):
        sources["per type"] = per_type
    return sources | {"importance": important, "random": random_plans}
