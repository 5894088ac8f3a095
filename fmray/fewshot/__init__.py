"""Few-shot method: episodes, centroid classifier, encoders, finetuning methods, evaluation. Knows
torch, timm and transformers, and no platform.
"""

from fmray.fewshot.centroid import centroid_logits
from fmray.fewshot.episodes import Episode, EpisodeSampler
from fmray.fewshot.intervals import Interval, confidence_interval, paired_interval

__all__ = [
    "Episode",
    "EpisodeSampler",
    "Interval",
    "centroid_logits",
    "confidence_interval",
    "paired_interval",
]
