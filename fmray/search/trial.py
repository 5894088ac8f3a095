"""One trial of a search: the driver of a Ray Train run, in an actor of Ray Tune.

A trial trains the base recipe with its own values set on top, as `fmray.train.launch` would for a
user. It reports to Tune the metrics of each evaluation, and at the end what the training cost. The
metrics it can report are those of `metrics_of`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from fmray.config import AdaLlavaRecipe, BaseRecipe, LoadedRecipe, TrackingConfig, load
from fmray.config.fewshot import FewshotRecipe
from fmray.train.launch import Result, check_trainable, train

#: metrics of a trial; those that depend on a budget are means over the budgets
METRICS = ("accuracy", "seconds", "tasks", "operations", "share", "latency")
#: prefixes of the metrics at one operating point, such as `accuracy/0.5` and `accuracy/5-shot`
POINT_PREFIXES = ("accuracy/", "loss/", "operations/", "share/", "latency/")

LATENCY_QUESTIONS = 8
LATENCY_ROUNDS = 5  # each answers every question at every budget, in turns


@dataclass(frozen=True)
class Assignment:
    """What a trial has to do. Its repr is short, because Tune writes it in many places."""

    number: int
    run_id: str = field(repr=False)
    loaded: LoadedRecipe[Any] | None = field(repr=False)  #: None: see `mistake`
    mistake: str | None = field(repr=False)  #: why the trial's values make no valid recipe
    parent: str | None = field(repr=False)  #: MLflow run id of the search
    latency: bool = field(repr=False)  #: whether to measure it


# --- Recipes and metrics of trials ---


def metrics_of(base: BaseRecipe) -> list[str]:
    """Return the metrics that trials of a base recipe report.

    - `accuracy`: mean over budgets or shots; `seconds`: duration of the trial's job
    - few-shot: `tasks`, the number of tasks finetuned on
    - adallava, means over the budgets: `operations` of a prefill, its `share` of the full model's,
      `latency` in ms to the first token (measured only in a search for it)
    """
    if isinstance(base, FewshotRecipe):
        variable = base.evaluate.sampler == "meta_dataset_v1"
        shots = ["variable"] if variable else base.evaluate.shots
        return ["accuracy", "seconds", "tasks", *(f"accuracy/{n}-shot" for n in shots)]
    if base.adaptive is None:
        return ["accuracy", "seconds", "accuracy/base", "loss/base"]
    by_budget = [
        f"{prefix}{budget:g}" for prefix in POINT_PREFIXES for budget in base.train.eval_budgets
    ]
    return ["accuracy", "seconds", "operations", "share", "latency", *by_budget]


def is_metric(name: str) -> bool:
    """Whether a value that Tune reports is a metric of the trial, rather than one of Tune's own."""
    return name in METRICS or name.startswith(POINT_PREFIXES)


def load_base(
    path: Path, overrides: tuple[str, ...], storage: Path, tracking: TrackingConfig, count: int
) -> LoadedRecipe[Any]:
    """Return the recipe of a trial, with absolute paths so that any machine can run it.

    Args:
        storage: folder of the trials.
        tracking: of the search.
        count: evaluations per trial, evenly over its steps.

    Raises:
        ValueError: the recipe is invalid, or cannot be that of a trial.
    """
    loaded = load(path, overrides, kinds=(AdaLlavaRecipe, FewshotRecipe))
    recipe = loaded.recipe
    if recipe.cluster.workers == 0:
        raise ValueError(
            f"{path}: cluster.workers: 0 trains in the driver itself, and a trial is a driver with"
            " workers: set cluster.workers to 1 or more"
        )
    if recipe.train.steps is None:
        raise ValueError(
            f"{path}: train.steps: a search spreads its evaluations over the steps: set a number"
        )
    if isinstance(recipe, FewshotRecipe):
        if recipe.target is None:
            raise ValueError(f"{path}: target: a search needs a target: set target.collection")
        check_trainable(recipe)
    every = math.ceil(recipe.train.steps / count)
    recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"eval_every": every}),
            "cluster": recipe.cluster.model_copy(update={"storage": storage}),
            "tracking": tracking,
        }
    )
    origins = {"train.eval_every": "search", "cluster.storage": "search"}
    return LoadedRecipe(recipe.with_absolute_paths(), loaded.origins | origins)


# --- Training ---


def run_trial(config: Mapping[str, Any]) -> None:
    """Train one trial; this is the function that Tune runs.

    Args:
        config: `config["trial"]` is an `Assignment`.

    Raises:
        ValueError: the assignment has no valid recipe. Errors of the training are passed on.
    """
    trial: Assignment = config["trial"]
    if trial.loaded is None:
        raise ValueError(trial.mistake)
    began = time.monotonic()
    recipe = trial.loaded.recipe
    reporter = _EvaluationReporter(recipe.train.steps)
    result = train(trial.loaded, trial.run_id, [reporter], trial.parent)
    costs = {"seconds": time.monotonic() - began}
    if isinstance(recipe, FewshotRecipe):
        costs["tasks"] = len(result.tasks)
    if trial.latency:
        costs |= latency_on_ray(recipe, result.model_dir)
    tune.report(trial_metrics(result) | costs)


def trial_metrics(result: Result) -> dict[str, float]:
    """Return `step`, the last evaluation and its mean accuracy, and the model's operations."""
    evaluation = result.evaluation
    assert evaluation is not None  # `load_base` sets `eval_every`
    costs = ("operations", "share")
    model = {
        name: value
        for name, value in result.metrics.items()
        if name in costs or name.partition("/")[0] in costs
    }
    metrics = {"step": result.metrics["step"], "accuracy": evaluation.accuracy}
    return metrics | evaluation.metrics() | model


class _EvaluationReporter(TuneReportCallback):
    """Reports each evaluation to Tune but the last, which the trial reports with its costs."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray's controller after each report of all workers; rank 0's is used."""
        report = metrics[0]  # as `fmray.train.loop` reports: step, score, metrics by logged name
        if report["step"] < self._steps:
            scores = {n: value for n, value in report.items() if n.startswith(POINT_PREFIXES)}
            evaluation = {"step": report["step"], "accuracy": report["score"]} | scores
            super().after_report(run_context, [evaluation], None)


# --- Latency of the trained model ---


def latency_on_ray(recipe: AdaLlavaRecipe, model_dir: Path) -> dict[str, float]:
    """Run `measure_latency` in a Ray task with the resources of one worker of the trial.

    Other trials on the same machine slow it down. To measure the model alone, give each trial a
    machine of its own (`cluster.cpus_per_worker` of the base recipe).
    """
    cluster = recipe.cluster
    task = ray.remote(measure_latency).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
        max_retries=0,
        scheduling_strategy="DEFAULT",  # the trial's placement group has room for its driver only
    )
    threads = max(1, int(cluster.cpus_per_worker))
    return ray.get(task.remote(model_dir, recipe.data.store, recipe.train.eval_budgets, threads))


def measure_latency(
    model_dir: Path, store: Path, budgets: tuple[float, ...], threads: int
) -> dict[str, float]:
    """Return `latency/BUDGET` in ms to the first token (encoder, prefill, one token), and their
    mean `latency`.

    Each is the median over single questions of the validation split, in several rounds.

    Args:
        threads: CPU threads of torch.
    """
    # slow to import, and every trial imports this module, also those that need no latency
    from fmray.adallava import AdaptiveVLM
    from fmray.adallava.passes import prompt_ends
    from fmray.data.loader import evaluation_batches
    from fmray.data.processor import load_processor
    from fmray.train.adallava.batches import model_inputs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    model = AdaptiveVLM.from_pretrained(model_dir).to(device).eval()
    dtype = next(model.parameters()).dtype

    # prompts: the questions without their answers
    batches = evaluation_batches(store, "validation", load_processor(store / "processor"), 1)
    prompts = []
    for batch in islice(batches, LATENCY_QUESTIONS):
        inputs = model_inputs(batch, dtype, device)
        labels = inputs.pop("labels")
        end = int(prompt_ends(inputs["input_ids"], inputs["attention_mask"], labels))
        length = labels.shape[1]  # inputs with one entry per token are cut with the prompt
        prompts.append(
            {
                name: value[:, :end] if value.shape[:2] == (1, length) else value
                for name, value in inputs.items()
            }
        )

    # budgets in turns, so that a busy moment of the machine hits them all; round 0 warms up
    seconds: dict[float, list[float]] = {budget: [] for budget in budgets}
    for round_number in range(LATENCY_ROUNDS + 1):
        for prompt in prompts:
            for budget in budgets:
                began = time.perf_counter()
                model.generate(**prompt, budget=budget, max_new_tokens=1)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number:
                    seconds[budget].append(time.perf_counter() - began)
    latency = {f"latency/{b:g}": 1000 * float(np.median(seconds[b])) for b in budgets}
    return latency | {"latency": sum(latency.values()) / len(latency)}
