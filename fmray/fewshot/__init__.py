"""Few-shot method: episodes, centroid classifier, encoders, finetuning methods, evaluation. Knows
torch, timm and transformers, and no platform.
"""

from fmray.fewshot.centroid import centroid_logits
from fmray.fewshot.encoders import Encoder, create_encoder
from fmray.fewshot.episodes import Episode, EpisodeSampler
from fmray.fewshot.intervals import Interval, confidence_interval, paired_interval
from fmray.fewshot.preprocess import Preprocess

__all__ = [
    "Encoder",
    "Episode",
    "EpisodeSampler",
    "Interval",
    "Preprocess",
    "centroid_logits",
    "confidence_interval",
    "create_encoder",
    "paired_interval",
]
