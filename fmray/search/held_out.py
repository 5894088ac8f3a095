"""The verdict on a search for tasks: encoders on tasks of the target that no trial was judged by.

In: the base recipe and folders of encoders that trials made. Out: accuracies over the test tasks of
`target.split` (`evaluate` of the recipe), and what the first encoder gains over each other, paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fmray.data.image_store import ImageStore
from fmray.fewshot import paired_interval
from fmray.fewshot_config import FewshotRecipe
from fmray.train.fewshot.encoder import load_encoder
from fmray.train.fewshot.evaluate import measure, percent, shots_name, task_samplers
from fmray.train.fewshot.pictures import Pictures


def held_out_gains(base: FewshotRecipe, models: Mapping[str, Path]) -> list[str]:
    """A line for each encoder but the first, and number of shots.

    Args:
        models: what an encoder is called -> its folder; the same folder is measured once.
    """
    store = ImageStore.open(base.images.store, base.images.cache)
    rows = store.select(base.target.collection, base.target.split)
    samplers = task_samplers(store, rows, base.target, base.evaluate, base.seed)
    accuracies = {}
    for folder in set(models.values()):
        encoder = load_encoder(base.encoder.model_copy(update={"checkpoint": folder}))
        pictures = Pictures(store, encoder.preprocess)
        accuracies[folder] = measure(encoder, pictures, rows, samplers, base.evaluate)
    where = f"{base.target.collection}, split {base.target.split}"
    if (base.train.eval_split or base.target.split) == base.target.split:
        where += " (other tasks of the classes that trials were judged by)"
    (first, folder), *others = models.items()
    lines = []
    for name, other in others:
        for shots, best in accuracies[folder].items():
            peer = accuracies[other][shots]
            gain = percent(paired_interval(best, peer), sign="+")
            lines.append(
                f"{first} against {name} on {len(best)} {shots_name(shots)} tasks of {where}:"
                f" {100 * best.mean():.2f} % against {100 * peer.mean():.2f} %, {gain} paired"
            )
    return lines
