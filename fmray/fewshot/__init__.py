"""Few-shot learning: episodes, centroid classifier, encoders, finetuning losses, evaluation."""

from fmray.fewshot.encoders import Encoder, Preprocess, create_encoder
from fmray.fewshot.episodes import Episode, EpisodeSampler, MetaDatasetSampler, VariableEpisode
from fmray.fewshot.evaluation import Interval, confidence_interval, evaluate_tasks, paired_interval
from fmray.fewshot.methods import (
    centroid_logits,
    classification_loss,
    finetuning_mode,
    linear_head,
    linear_probe,
    log_temperature,
    maml_loss,
    multitask_loss,
)

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
