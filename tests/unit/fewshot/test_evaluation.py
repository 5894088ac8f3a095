"""Evaluation on cached embeddings, against scikit-learn task by task, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fmray.fewshot import EpisodeSampler, MetaDatasetSampler, confidence_interval, evaluate_tasks
from fmray.fewshot import evaluation as evaluation_module


def make_embeddings(classes=20, images=30, dimensions=16, spread=2.0, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), images))
    centres = generator.normal(size=(classes, dimensions))
    features = centres[labels] + spread * generator.normal(size=(len(labels), dimensions))
    return features.astype(np.float32), labels


def sklearn_accuracy(features, support, query):
    """Return the accuracy on one task by scikit-learn's nearest neighbour."""
    centroids = np.stack([features[rows].mean(0) for rows in support])
    neighbours = KNeighborsClassifier(n_neighbors=1, metric="cosine", algorithm="brute")
    neighbours.fit(centroids, np.arange(len(centroids)))
    right = [neighbours.predict(features[rows]) == n for n, rows in enumerate(query)]
    return np.concatenate(right).mean()


@pytest.mark.parametrize("shots", [1, 5])
def test_accuracies_match_scikit_learn_task_by_task(shots, monkeypatch):
    features, labels = make_embeddings()
    ids = np.random.default_rng(1).permutation(10_000)[: len(labels)]
    sampler = EpisodeSampler(labels, 15, shots, 15, seed=3, split="test", rows=ids)
    accuracies = evaluate_tasks(features, sampler, 40)
    by_id = np.zeros((10_000, features.shape[1]), dtype=np.float32)
    by_id[ids] = features
    tasks = [sampler[i] for i in range(40)]
    np.testing.assert_allclose(
        accuracies, [sklearn_accuracy(by_id, t.support, t.query) for t in tasks], atol=1e-9
    )
    # the number of tasks gathered at a time does not matter
    monkeypatch.setattr(evaluation_module, "GATHERED", 7 * 15 * (shots + 15) * features.shape[1])
    assert np.array_equal(evaluate_tasks(torch.from_numpy(features), sampler, 40), accuracies)
    assert np.array_equal(evaluate_tasks(features, sampler, 9), accuracies[:9])


def test_accuracies_of_variable_tasks_match_scikit_learn():
    features, labels = make_embeddings()
    sampler = MetaDatasetSampler(labels, seed=3, split="test")
    tasks = [sampler[i] for i in range(20)]
    np.testing.assert_allclose(
        evaluate_tasks(features, sampler, 20),
        [sklearn_accuracy(features, t.support, t.query) for t in tasks],
        atol=1e-9,
    )


def test_interval_of_noise_covers_chance():
    features, labels = make_embeddings(spread=1e6)
    sampler = EpisodeSampler(labels, 10, 1, 10, seed=0, split="test")
    interval = confidence_interval(evaluate_tasks(features, sampler, 400), level=0.999)
    assert interval.low < 0.1 < interval.high
    assert interval.half_width < 0.02


def test_unusable_embeddings_are_errors():
    features, labels = make_embeddings(classes=5)
    sampler = EpisodeSampler(labels, 5, 1, 10, seed=0, split="test")
    with pytest.raises(ValueError, match=r"n = 150 as the sampler's labels, not \[149, 16\]"):
        evaluate_tasks(features[1:], sampler, 3)
    with pytest.raises(ValueError, match="tasks must be at least 1"):
        evaluate_tasks(features, sampler, 0)
    features[77, 2] = np.nan
    with pytest.raises(ValueError, match="row 77 is not"):
        evaluate_tasks(features, sampler, 3)
