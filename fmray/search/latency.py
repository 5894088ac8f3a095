"""How long a trained adaptive model takes at each budget, measured where its trial was trained.

In: the recipe of a trial and the model it made. Out: `latency/BUDGET`, milliseconds to the first
token of one question alone (picture, prefill, one token), and `latency`, their mean. On a machine
that other trials train on at the same time, it contains what they take: for figures that are only
of the model, give a trial the whole machine (`cluster.cpus_per_worker` of the base recipe).
"""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import numpy as np
import ray
import torch

from fmray.adallava import AdaptiveVLM
from fmray.adallava.placement import prompt_ends
from fmray.config import Recipe
from fmray.data.loader import evaluation_batches
from fmray.data.processor import load_processor
from fmray.train.samples import model_inputs

QUESTIONS = 8
ROUNDS = 5  # each asks every question at every budget, in turns; the median counts


def latency_on_ray(recipe: Recipe, model_dir: Path) -> dict[str, float]:
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
