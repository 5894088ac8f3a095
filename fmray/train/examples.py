"""Example plans as pictures: a few held-out questions, answered at several budgets.

In: an adaptive model's directory, a data store. Out: one PNG with each picture, its question, and
for every budget the answer and which layers ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fmray import plots
from fmray.adallava import AdaptiveVLM
from fmray.data.loader import Batch, evaluation_batches
from fmray.data.processor import load_processor
from fmray.train.samples import model_inputs

TOKENS = 16  # of an answer; the pictures have no room for more


def draw_examples(
    model_dir: Path, store: Path, budgets: Sequence[float], path: Path, count: int = 6
) -> None:
    """Answer the first question of each kind (at most `count`) at each budget, and draw them.

    Answers are generated, not teacher-forced.
    """
    processor = load_processor(store / "processor")
    model = AdaptiveVLM.from_pretrained(model_dir)
    dtype = next(model.parameters()).dtype
    examples: list[plots.PlanExample] = []
    seen: set[str | None] = set()
    for batch in evaluation_batches(store, "validation", processor, batch=1, rows=50 * count):
        [tag] = batch.tags
        if (tag is not None and tag in seen) or batch.pixel_values is None:
            continue
        seen.add(tag)
        inputs = model_inputs(batch, dtype, torch.device("cpu"))
        labels = inputs.pop("labels")[0]
        end = int((labels >= 0).nonzero()[0])
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :end]
        tokenizer = processor.tokenizer
        for budget in budgets:
            ids, plan = model.generate(
                **inputs, budget=budget, max_new_tokens=TOKENS, return_plan=True
            )
            examples.append(
                plots.PlanExample(
                    _picture(batch, processor),
                    _question(tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)),
                    tokenizer.decode(ids[0, end:], skip_special_tokens=True).strip(),
                    tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip(),
                    budget,
                    plan[0].tolist(),
                    model.layout.first * model.layout.units_per_layer,
                )
            )
        if len(seen) == count:
            break
    plots.plan_pictures(examples, path)


def _question(prompt: str) -> str:
    """The last thing asked in a prompt, without the mark that asks for an answer."""
    return prompt.strip().removesuffix("ASSISTANT:").split("\n")[-1].strip()


def _picture(batch: Batch, processor: object) -> np.ndarray:
    """The picture as the model sees it: uint8 [height, width, 3]."""
    steps = processor.image_processor
    pixels = batch.pixel_values.reshape(-1, *batch.pixel_values.shape[-3:])[0].float().numpy()
    mean, deviation = (np.array(v)[:, None, None] for v in (steps.image_mean, steps.image_std))
    return (255 * (pixels * deviation + mean)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
