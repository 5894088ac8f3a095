"""One trial: the driver of a real Ray Train run, in an actor of Ray Tune.

In: an `Assignment`, the base recipe with the values of the trial set on top. Out: to Tune, the
metrics of each evaluation (`metrics_of`), the last with what the whole training cost; on disk what
the job leaves.
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

from fmray.adallava import AdaptiveVLM
from fmray.adallava.passes import prompt_ends
from fmray.config import AdaLlavaRecipe, BaseRecipe, LoadedRecipe, TrackingConfig, load
from fmray.config.fewshot import FewshotRecipe
from fmray.data.loader import evaluation_batches
from fmray.data.processor import load_processor
from fmray.train.adallava.batches import model_inputs
from fmray.train.launch import check_trainable, train

METRICS = ("accuracy", "seconds", "tasks", "operations", "share", "latency")
FAMILIES = ("accuracy/", "loss/", "operations/", "share/", "latency/")


@dataclass(frozen=True)
class Assignment:
    """What a trial has to do. mistake: why it cannot (its values make no recipe).

    parent: MLflow run id of the search. latency: whether it is to be measured. Its text is short:
    Tune writes it in many places.
    """

    number: int
    run_id: str = field(repr=False)
    loaded: LoadedRecipe[Any] | None = field(repr=False)
    mistake: str | None = field(repr=False)
    parent: str | None = field(repr=False)
    latency: bool = field(repr=False)


def is_metric(name: str) -> bool:
    """Whether it is a metric of trials, of one kind or another."""
    return name in METRICS or name.startswith(FAMILIES)


def metrics_of(base: BaseRecipe) -> list[str]:
    """What trials of a base recipe can be judged by.

    accuracy: mean over budgets or shots; seconds: of the whole job; tasks: finetuned on (few-shot);
    means over the budgets (adallava): operations of a prefill, share of the full model's, latency
    in ms to the first token, which is measured in a search for it.
    """
    if isinstance(base, FewshotRecipe):
        variable = base.evaluate.sampler == "meta_dataset_v1"
        shots = ["variable"] if variable else base.evaluate.shots
        return ["accuracy", "seconds", "tasks", *(f"accuracy/{n}-shot" for n in shots)]
    if base.adaptive is None:
        return ["accuracy", "seconds", "accuracy/base", "loss/base"]
    each = [f"{family}{b:g}" for family in FAMILIES for b in base.train.eval_budgets]
    return ["accuracy", "seconds", "operations", "share", "latency", *each]


def load_base(
    path: Path, overrides: tuple[str, ...], storage: Path, tracking: TrackingConfig, count: int
) -> LoadedRecipe[Any]:
    """The recipe of a trial, ready for another machine.

    Args:
        storage: where trials lie.
        tracking: of the search.
        count: evaluations, evenly over the steps.

    Raises ValueError for a recipe that is wrong, or cannot be a trial.
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
            f"{path}: train.steps: a search needs a number, to spread the evaluations over"
        )
    if isinstance(recipe, FewshotRecipe):
        if recipe.target is None:
            raise ValueError(f"{path}: target: a search needs one: set target.collection")
        check_trainable(recipe)
    every = math.ceil(recipe.train.steps / count)
    recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"eval_every": every}),
            "cluster": recipe.cluster.model_copy(update={"storage": storage}),
            "tracking": tracking,
        }
    )
    changed = {"train.eval_every": "search", "cluster.storage": "search"}
    return LoadedRecipe(recipe.with_absolute_paths(), loaded.origins | changed)


def run_trial(config: Mapping[str, Any]) -> None:
    """The function that Tune runs; `config["trial"]` is an `Assignment`.

    Raises whatever the training does, and ValueError for an assignment that is a mistake.
    """
    trial: Assignment = config["trial"]
    if trial.mistake is not None:
        raise ValueError(trial.mistake)
    began = time.monotonic()
    recipe = trial.loaded.recipe
    watch = [_Evaluations(recipe.train.steps)]
    costs: dict[str, float] = {}
    result = train(trial.loaded, trial.run_id, watch, trial.parent)
    if isinstance(recipe, FewshotRecipe):
        costs["tasks"] = len(result.tasks)
    costs["seconds"] = time.monotonic() - began
    if trial.latency:
        # imports a model's library, which a trial's driver has no other use for

        costs |= latency_on_ray(recipe, result.model_dir)
    tune.report(judged(result.metrics) | costs)


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """The step, the evaluation and its mean accuracy, without what is of the step alone."""
    found = {name: value for name, value in metrics.items() if name.startswith(FAMILIES)}
    accuracies = [value for name, value in found.items() if name.startswith("accuracy/")]
    costs = {name: metrics[name] for name in ("operations", "share") if name in metrics}
    return {"step": metrics["step"], "accuracy": sum(accuracies) / len(accuracies)} | costs | found


class _Evaluations(TuneReportCallback):
    """Tells Tune of each evaluation but the last, which the trial reports with its costs."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray's controller after each report of all workers; the first's counts."""
        evaluated = any(name.startswith("accuracy/") for name in metrics[0])
        if evaluated and metrics[0]["step"] < self._steps:
            super().after_report(run_context, [judged(metrics[0])], None)


# How long a trained adaptive model takes at each budget, measured where its trial was trained.
#
# In: the recipe of a trial and the model it made. Out: `latency/BUDGET`, milliseconds to the first
# token of one question alone (picture, prefill, one token), and `latency`, their mean. On a machine
# that other trials train on at the same time, it contains what they take: for figures that are only
# of the model, give a trial the whole machine (`cluster.cpus_per_worker` of the base recipe).

QUESTIONS = 8
ROUNDS = 5  # each asks every question at every budget, in turns; the median counts


def latency_on_ray(recipe: AdaLlavaRecipe, model_dir: Path) -> dict[str, float]:
    """`measure_latency` in a task that has what a worker of the trial had."""
    cluster = recipe.cluster
    task = ray.remote(measure_latency).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
        max_retries=0,
        scheduling_strategy="DEFAULT",  # not the trial's own place, which holds its driver alone
    )
    threads = max(1, int(cluster.cpus_per_worker))
    return ray.get(task.remote(model_dir, recipe.data.store, recipe.train.eval_budgets, threads))


def measure_latency(
    model_dir: Path, store: Path, budgets: tuple[float, ...], threads: int
) -> dict[str, float]:
    """Milliseconds to the first token, the median over questions of the validation split.

    Args:
        threads: of torch, on a CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    model = AdaptiveVLM.from_pretrained(model_dir).to(device).eval()
    dtype = next(model.parameters()).dtype
    batches = evaluation_batches(store, "validation", load_processor(store / "processor"), 1)
    prompts = []
    for batch in islice(batches, QUESTIONS):
        inputs = model_inputs(batch, dtype, device)
        labels = inputs.pop("labels")
        end = int(prompt_ends(inputs["input_ids"], inputs["attention_mask"], labels))
        length = labels.shape[1]  # what is given a token ends where the prompt does
        prompts.append(
            {
                name: value[:, :end] if value.shape[:2] == (1, length) else value
                for name, value in inputs.items()
            }
        )
    seconds = {budget: [] for budget in budgets}
    for round_ in range(ROUNDS + 1):
        for prompt in prompts:
            for budget in budgets:
                began = time.perf_counter()
                model.generate(**prompt, budget=budget, max_new_tokens=1)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_:  # the first one warms up
                    seconds[budget].append(time.perf_counter() - began)
    found = {f"latency/{budget:g}": 1000 * float(np.median(seconds[budget])) for budget in budgets}
    return found | {"latency": sum(found.values()) / len(found)}
