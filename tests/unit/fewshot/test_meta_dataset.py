"""Meta-Dataset's sampler: bounds and laws of ways, queries and support, with and without groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.fewshot import MetaDatasetSampler
from fmray.fewshot.specification import DatasetSpecification


def make_labels(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def check_episode(episode, labels, counts):
    ways = len(episode.classes)
    smallest = min(counts[c] for c in episode.classes)
    queries = min(10, smallest // 2)
    assert len(set(episode.classes)) == ways
    assert {len(rows) for rows in episode.query} == {queries}
    total = sum(len(rows) for rows in episode.support)
    # each class has one support image, and the rest of at most 500 is shared out
    assert ways <= total <= 500
    for label, support, query in zip(episode.classes, episode.support, episode.query, strict=True):
        assert 1 <= len(support) <= counts[label] - queries
        both = np.concatenate([support, query])
        assert len(np.unique(both)) == len(both) and (labels[both] == label).all()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 400), min_size=5, max_size=70),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**40),
)
def test_ways_queries_and_support_are_within_their_bounds(counts, seed, index):
    labels, large = make_labels(counts), sum(count >= 2 for count in counts)
    if large < 5:
        with pytest.raises(ValueError, match="no 5 classes of at least 2 images"):
            MetaDatasetSampler(labels, seed, "train")
        return
    sampler = MetaDatasetSampler(labels, seed, "train")
    episode = sampler[index]
    assert 5 <= len(episode.classes) <= min(50, large)
    assert sampler.left_out == len(counts) - large
    check_episode(episode, labels, counts)
    # row ids do not change the episode
    ids = np.random.default_rng(1).permutation(3 * len(labels))[: len(labels)]
    named = MetaDatasetSampler(labels, seed, "train", rows=ids)[index]
    for theirs, ours in zip(named.support, episode.support, strict=True):
        assert np.array_equal(theirs, ids[ours])


def test_ways_and_support_follow_their_laws():
    counts = [60] * 30
    labels = make_labels(counts)
    sampler = MetaDatasetSampler(labels, 0, "train")
    episodes = [sampler[i] for i in range(1500)]
    ways = np.array([len(episode.classes) for episode in episodes])
    assert set(ways) == set(range(5, 31))
    assert abs(ways.mean() - 17.5) < 4 * np.sqrt((26**2 - 1) / 12 / 1500)
    # with equal classes, shares differ by exp(U(-log 2, log 2)) / sum: up to fourfold
    shots = [np.array([len(rows) for rows in episode.support]) for episode in episodes]
    assert max(s.max() / s.min() for s in shots if s.min() >= 10) > 2.5
    assert all((s.max() + 1) / max(s.min() - 1, 1) < 4.5 for s in shots if s.min() >= 10)
    # |S| is floor(b * 50 + 1) a class before rounding down: some episodes are 1-shot, some large
    mean = np.array([s.mean() for s in shots])
    assert mean.min() < 2 and mean.max() > 30
    assert max(s.sum() for s in shots) > 480


def test_large_classes_get_more_support():
    counts = [20] * 5 + [200] * 5
    sampler = MetaDatasetSampler(make_labels(counts), 0, "train")
    small, large = [], []
    for i in range(300):
        episode = sampler[i]
        for label, support in zip(episode.classes, episode.support, strict=True):
            (small if label < 5 else large).append(len(support))
    assert np.mean(large) > 5 * np.mean(small)


def test_episodes_draw_classes_from_one_group():
    labels = make_labels([20] * 100)
    alphabets = [np.arange(0, 14), np.arange(14, 20), np.arange(20, 23), np.arange(23, 100)]
    sampler = MetaDatasetSampler(labels, 0, "train", groups=alphabets)
    assert len(sampler.groups) == 3  # three classes are too few
    drawn = np.zeros(4)
    for i in range(600):
        classes = sampler[i].classes
        [group] = [g for g, members in enumerate(alphabets) if np.isin(classes, members).all()]
        assert 5 <= len(classes) <= min(50, len(alphabets[group]))
        drawn[group] += 1
    # uniform over groups, whatever their size
    assert drawn[2] == 0 and (np.abs(drawn[[0, 1, 3]] - 200) < 4 * np.sqrt(600 * 2 / 9)).all()
    nodes = MetaDatasetSampler(labels, 0, "train", groups=alphabets, whole_groups=True)
    assert {len(nodes[i].classes) for i in range(50)} == {14, 6, 50}
    with pytest.raises(ValueError, match="no 5 classes in any group of at least 2 images"):
        MetaDatasetSampler(labels, 0, "train", groups=[np.arange(4)])


@pytest.mark.parametrize("split, nodes", [("train", 113), ("val", 18), ("test", 15)])
def test_groups_of_ilsvrc_are_its_eligible_nodes(real_data, split, nodes):
    specification = DatasetSpecification.read(
        real_data / "meta_dataset" / "dataset_specs" / "ilsvrc_2012_dataset_spec.json"
    )
    classes = specification.classes(split)
    sampler = MetaDatasetSampler(
        np.repeat(classes, 30), 0, split, specification.groups(split), whole_groups=True
    )
    assert len(sampler.groups) == nodes
    spans = {frozenset(group) for group in specification.groups(split)}
    for i in range(20):
        episode = sampler[i]
        check_episode(episode, np.repeat(classes, 30), dict.fromkeys(classes, 30))
        drawn = set(episode.classes)
        assert drawn in spans if len(drawn) < 50 else any(drawn <= span for span in spans)
