"""Few-shot method: episodes, centroid classifier, encoders, finetuning methods, evaluation. Knows
torch, timm and transformers, and no platform.
"""

from fmray.fewshot.centroid import centroid_logits
from fmray.fewshot.encoders import Encoder, create_encoder
from fmray.fewshot.episodes import Episode, EpisodeSampler
from fmray.fewshot.evaluation import evaluate_tasks
from fmray.fewshot.finetune import (
    classification_loss,
    finetuning_mode,
    linear_head,
    linear_probe,
    log_temperature,
    multitask_loss,
)
from fmray.fewshot.intervals import Interval, confidence_interval, paired_interval
from fmray.fewshot.maml import maml_loss
from fmray.fewshot.meta_dataset import MetaDatasetSampler, VariableEpisode
from fmray.fewshot.preprocess import Preprocess

__all__ = [
    "Encoder",
    "Episode",
    "EpisodeSampler",
    "Interval",
    "MetaDatasetSampler",
    "Preprocess",
    "VariableEpisode",
    "centroid_logits",
    "classification_loss",
    "confidence_interval",
    "create_encoder",
    "evaluate_tasks",
    "finetuning_mode",
    "linear_head",
    "linear_probe",
    "log_temperature",
    "maml_loss",
    "multitask_loss",
    "paired_interval",
]
