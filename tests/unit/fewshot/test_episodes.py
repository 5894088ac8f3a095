"""Episodes: disjoint, balanced, and a pure function of (seed, split, index)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.fewshot import EpisodeSampler


def make_labels(counts: list[int], seed: int = 0) -> np.ndarray:
    """Labels of `counts[c]` images of class 3c, in random order."""
    labels = np.repeat(3 * np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=3, max_size=20),
    ways=st.integers(2, 8),
    shots=st.integers(1, 4),
    queries=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**40),
)
def test_episodes_are_disjoint_and_balanced(counts, ways, shots, queries, seed, index):
    labels = make_labels(counts)
    eligible = 3 * np.flatnonzero(np.array(counts) >= shots + queries)
    if ways > len(eligible):
        with pytest.raises(ValueError, match=f"{ways} ways, but the train split has"):
            EpisodeSampler(labels, ways, shots, queries, seed, "train")
        return
    sampler = EpisodeSampler(labels, ways, shots, queries, seed, "train")
    assert sampler.left_out == len(counts) - len(eligible)
    episode = sampler[index]
    assert episode.support.shape == (ways, shots) and episode.query.shape == (ways, queries)
    assert len(set(episode.classes)) == ways and set(episode.classes) <= set(eligible)
    both = np.concatenate([episode.support, episode.query], axis=1)
    assert len(np.unique(both)) == both.size
    assert (labels[both] == episode.classes[:, None]).all()
    ids = np.random.default_rng(1).permutation(10 * len(labels))[: len(labels)]
    named = EpisodeSampler(labels, ways, shots, queries, seed, "train", rows=ids)
    assert (named[index].support == ids[episode.support]).all()
    assert (named[index].query == ids[episode.query]).all()
    assert (named.positions(index).query == episode.query).all()


def take(world_size: int, rank: int, total: int, start: int = 0) -> dict[int, bytes]:
    """What one worker gathers, with a sampler of its own."""
    sampler = EpisodeSampler(make_labels([12] * 9), 5, 2, 3, seed=7, split="train")
    return {
        i: pickle.dumps((sampler[i].classes, sampler[i].support, sampler[i].query))
        for i in range(start, total)
        if i % world_size == rank
    }


@pytest.mark.parametrize("world_size", [2, 8])
def test_episodes_are_equal_for_any_number_of_workers_and_after_a_resume(world_size):
    alone = take(1, 0, 40)
    shared: dict[int, bytes] = {}
    for rank in reversed(range(world_size)):
        shared |= take(world_size, rank, 25)
    for rank in range(world_size):  # stopped after 25, started again with fresh samplers
        shared |= take(world_size, rank, 40, start=25)
    assert shared == alone
    assert len(set(alone.values())) == 40


def test_episodes_are_equal_in_another_process():
    code = (
        "from fmray.fewshot import EpisodeSampler as S\n"
        "import numpy as np\n"
        "e = S(np.repeat(np.arange(9), 12), 5, 2, 3, 7, 'val')[11]\n"
        "print(e.classes.tolist(), e.support.tolist(), e.query.tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    episode = EpisodeSampler(np.repeat(np.arange(9), 12), 5, 2, 3, 7, "val")[11]
    here = f"{episode.classes.tolist()} {episode.support.tolist()} {episode.query.tolist()}"
    assert printed.strip() == here


def test_split_and_seed_change_the_episodes():
    labels = make_labels([20] * 10)
    drawn = {
        sampler[3].support.tobytes()
        for sampler in (
            EpisodeSampler(labels, 5, 1, 5, seed, split)
            for seed in (0, 1)
            for split in ("train", "val", "test", "all")
        )
    }
    assert len(drawn) == 8


def test_every_class_and_image_is_drawn_equally_often():
    labels = make_labels([6] * 8)
    sampler = EpisodeSampler(labels, 4, 1, 2, seed=0, split="train")
    times = np.zeros(len(labels))
    for i in range(2000):
        times[sampler[i].support.ravel()] += 1
    # binomial: 2000 episodes, each image is a support image with probability 4/8 * 1/6
    mean, deviation = 2000 / 12, np.sqrt(2000 / 12 * (1 - 1 / 12))
    assert np.abs(times - mean).max() < 4.5 * deviation


def test_skipped_classes_are_counted_in_a_warning(caplog):
    sampler = EpisodeSampler(make_labels([11, 11, 11, 10]), 3, 1, 10, 0, "test")
    assert sampler.left_out == 1
    assert "1 of 4 classes of the test split: they have fewer than 11 images" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ways": 5}, r"5 ways, but the test split has 4 classes of at least 11 images \(1 sup"),
        ({"shots": 2}, "has 3 classes of at least 12 images.*; 1 have fewer"),
        ({"ways": 1}, "ways must be at least 2"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"split": "valid"}, "split must be one of train, val, test, all"),
        ({"labels": np.ones(5)}, "labels must be .n. integers, not float64"),
        ({"rows": np.arange(3)}, "rows must be 47 integers"),
        ({"rows": np.arange(47) // 2}, "rows must be distinct, but 0 occurs"),
    ],
)
def test_invalid_arguments_are_errors(changes, message):
    arguments = {"labels": make_labels([12, 12, 12, 11]), "ways": 4, "shots": 1, "queries": 10}
    arguments |= {"seed": 0, "split": "test"} | changes
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(**arguments)


def test_negative_episode_is_an_error():
    with pytest.raises(IndexError, match="numbered from 0"):
        EpisodeSampler(make_labels([12] * 4), 4, 1, 10, 0, "test")[-1]
