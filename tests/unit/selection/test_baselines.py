"""Baselines of Algorithm 1: their choices, and LEEP and LogME against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from fmray.selection import Selection, choose_baseline
from fmray.selection.baselines import class_responses, leep, logme

CURVES = Selection(["d", "a"], ["d", "a", "c", "b"], [0.9, 0.8, 0.1, 0.0], [1.0, 2.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("baseline", "settings", "names"),
    [
        ("all", {}, ["d", "a", "c", "b"]),
        ("no_consistency", {}, ["d", "a", "c", "b"]),
        ("no_diversity", {}, ["d"]),
        ("top_k", {}, ["d", "a"]),
        ("top_k", {"k": 3}, ["d", "a", "c"]),
        ("leep", {"k": 2, "scores": {"a": -3, "b": -1, "c": -2, "d": -9}}, ["b", "c"]),
        ("logme", {"k": 3, "scores": {"a": 1, "b": 0, "c": 1, "d": 1}}, ["d", "a", "c"]),
    ],
)
def test_each_baseline_chooses_by_its_rule_and_keeps_the_curves(baseline, settings, names):
    chosen = choose_baseline(CURVES, baseline, **settings)
    assert chosen.names == names
    assert (chosen.order, chosen.coverage) == (CURVES.order, CURVES.coverage)


def test_random_choices_depend_on_the_seed_and_not_on_the_target():
    drawn = {seed: choose_baseline(CURVES, "random", k=2, seed=seed).names for seed in range(60)}
    assert drawn[3] == choose_baseline(CURVES, "random", k=2, seed=3).names
    assert len({tuple(names) for names in drawn.values()}) == 6  # all pairs occur
    turned = Selection(["b"], CURVES.order[::-1], CURVES.similarity, CURVES.coverage)
    assert set(choose_baseline(turned, "random", k=2, seed=3).names) == set(drawn[3])


@pytest.mark.parametrize(
    ("baseline", "settings", "message"),
    [
        ("best", {}, "baseline: one of all, .* not 'best'"),
        ("top_k", {"k": 5}, "k: 1 to 4, .* not 5"),
        ("random", {"k": 0}, "k: 1 to 4, .* not 0"),
        ("leep", {"scores": {"a": 1.0}}, "'leep': candidate 'd' has no score"),
    ],
)
def test_impossible_choices_are_errors(baseline, settings, message):
    with pytest.raises(ValueError, match=message):
        choose_baseline(CURVES, baseline, **settings)


def test_leep_matches_the_formula_of_the_paper():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), size=30)
    labels = generator.integers(5, 8, size=30)
    joint = {
        (y, z): np.mean(
            [p[z] * (label == y) for p, label in zip(probabilities, labels, strict=True)]
        )
        for y in set(labels.tolist())
        for z in range(4)
    }
    total = 0.0
    for p, label in zip(probabilities, labels, strict=True):
        marginals = [sum(joint[y, z] for y in set(labels.tolist())) for z in range(4)]
        total += np.log(sum(p[z] * joint[label, z] / marginals[z] for z in range(4)))
    assert leep(probabilities, labels) == pytest.approx(total / 30, rel=1e-12)
    # the best possible score: a classifier that separates the classes
    assert leep(np.eye(4)[labels - 5], labels) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(40, 3), (12, 30)])
def test_logme_matches_the_highest_evidence_found_by_an_optimizer(n, d):
    generator = np.random.default_rng(n)
    x = generator.normal(size=(n, d))
    labels = (x[:, 0] + 0.3 * generator.normal(size=n) > 0).astype(int)
    labels[x[:, 1] > 1] = 2
    expected = []
    for label in np.unique(labels):
        y = (labels == label).astype(float)

        def negative(logs: np.ndarray, y: np.ndarray = y) -> float:
            alpha, beta = np.exp(logs)
            covariance = np.eye(n) / beta + x @ x.T / alpha
            return -multivariate_normal(np.zeros(n), covariance).logpdf(y) / n

        starts = [(0.0, 0.0), (2.0, 2.0), (-2.0, 2.0)]
        results = [
            minimize(negative, s, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
            for s in starts
        ]
        expected.append(-min(result.fun for result in results))
    assert logme(x, labels) == pytest.approx(np.mean(expected), abs=1e-6)


def test_scorers_prefer_the_candidate_whose_classes_separate_those_of_the_target():
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(5, 16)) * 3
    labels = np.repeat(np.arange(5), 6)
    x = centers[labels] + generator.normal(size=(30, 16))
    near, far = class_responses(x, centers), class_responses(x, generator.normal(size=(5, 16)))
    np.testing.assert_allclose(
        near[0, 0], x[0] @ centers[0] / np.linalg.norm(x[0]) / np.linalg.norm(centers[0])
    )
    softmax = [np.exp(10 * r) / np.exp(10 * r).sum(axis=1, keepdims=True) for r in (near, far)]
    assert leep(softmax[0], labels) > leep(softmax[1], labels) + 0.2
    assert logme(near, labels) > logme(far, labels) + 0.2
