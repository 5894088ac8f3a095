"""Task moments: merged and streamed against a single pass, and against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.selection import MomentStream, TaskMoments


def assert_same(a: TaskMoments, b: TaskMoments, relative: float = 1e-12) -> None:
    """Assert equality up to rounding, relative to the size of each statistic."""
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=relative)
    diagonal = np.sqrt(np.diagonal(b.scatter))
    assert (np.abs(a.scatter - b.scatter) <= relative * np.outer(diagonal, diagonal)).all()
    assert np.linalg.norm(a.cubic - b.cubic) <= relative * b.quartic / np.sqrt(b.scatter.max())
    assert a.quartic == pytest.approx(b.quartic, rel=relative)


def features(n: int, d: int = 7, offset: float = 1e3, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) + offset


def test_moments_match_numpy():
    x = features(50, offset=0.3)
    moments = TaskMoments.of("a", torch.from_numpy(x))
    y = x - x.mean(axis=0)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.scatter / 49, np.cov(x.T), rtol=1e-12)
    lengths = np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(moments.cubic, (lengths[:, None] ** 2 * y).sum(axis=0), rtol=1e-9)
    assert moments.quartic == pytest.approx((lengths**4).sum(), rel=1e-12)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64


def test_scatter_at_a_large_offset_matches_exact_arithmetic():
    x = features(40, d=3)
    exact = [[Fraction(float(value)) for value in row] for row in x]
    mean = [sum(column) / 40 for column in zip(*exact, strict=True)]
    scatter = [
        [float(sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in exact)) for j in range(3)]
        for i in range(3)
    ]
    parts = [TaskMoments.of("a", x[i : i + 8]) for i in range(0, 40, 8)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    np.testing.assert_allclose(merged.scatter, scatter, rtol=1e-12)
    np.testing.assert_allclose(merged.mean, [float(value) for value in mean], rtol=3e-16)


def test_streamed_moments_match_a_single_pass_at_a_large_offset():
    x, tasks = features(5000), np.random.default_rng(1).integers(0, 3, 5000)
    stream = MomentStream(["a", "b", "c"], 7)
    for start in range(0, 5000, 37):
        stream.add(tasks[start : start + 37], x[start : start + 37])
    for task, moments in enumerate(stream.moments()):
        assert moments.name == "abc"[task]
        assert_same(moments, TaskMoments.of("", x[tasks == task]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([0.0, 1e3]))
def test_parts_merged_in_any_order_match_a_single_pass(sizes, offset):
    x = features(sum(sizes), d=4, offset=offset, seed=len(sizes))
    cuts = np.cumsum(sizes)[:-1]
    parts = [TaskMoments.of("part", part) for part in np.split(x, cuts)]
    while len(parts) > 1:
        parts.insert(0, parts.pop().merge(parts.pop(0)))
    whole = TaskMoments.of("whole", x)
    np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(parts[0].scatter, whole.scatter, rtol=1e-10, atol=1e-10)
    assert parts[0].quartic == pytest.approx(whole.quartic, rel=1e-10, abs=1e-10)


def test_float32_features_are_summed_in_float64():
    x = features(3000).astype(np.float32)
    stream = MomentStream(["a"], 7)
    stream.add(np.zeros(3000, dtype=int), x)
    assert_same(stream.moments()[0], TaskMoments.of("", x.astype(np.float64)))


def test_a_stream_may_add_into_a_memory_map(tmp_path):
    x, tasks = features(300), np.arange(300) % 2
    shape = (2, 7, 7)
    scatters = np.lib.format.open_memmap(tmp_path / "scatter.npy", "w+", np.float64, shape)
    stream = MomentStream(["a", "b"], 7, scatters)
    stream.add(tasks, x)
    moments = stream.moments()
    scatters.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "scatter.npy")[1], moments[1].scatter)
    assert_same(moments[1], TaskMoments.of("", x[1::2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskMoments.of("birds", np.empty((0, 3))), "'birds': features .0, 3. should be"),
        (lambda: TaskMoments.of("birds", np.ones(3)), "should be .n, d."),
        (
            lambda: TaskMoments.of("birds", [[0, 1], [0, np.nan], [np.inf, 0]]),
            "'birds': the features of row 1 are not finite .and of 1 more",
        ),
        (lambda: TaskMoments("birds", 0, np.ones(2), np.ones((2, 2))), "'birds' has no features"),
        (lambda: TaskMoments("birds", 3, np.ones(2), np.ones(2)), "should be .d. and .d, d."),
        (
            lambda: TaskMoments("birds", 3, np.array([np.nan]), np.ones((1, 1))),
            "'birds': its mean is not finite",
        ),
        (
            lambda: TaskMoments.of("a", np.ones((2, 3))).merge(
                TaskMoments.of("b", np.ones((2, 4)))
            ),
            "'b' has 4 features, the tasks before it have 3",
        ),
        (lambda: MomentStream(["a", "b", "a"], 3), "two tasks are called 'a'"),
        (lambda: MomentStream(["a", "b"], 3).moments(), "'a' has no features"),
        (
            lambda: MomentStream(["a"], 3).add(np.zeros(2, dtype=int), np.ones((2, 4))),
            r"\[2, 4\] should be \[2, 3\]",
        ),
        (
            lambda: MomentStream(["a", "b"], 3).add(np.array([0, -1]), np.ones((2, 3))),
            "tasks -1 to 0 should be positions in the names, 0 to 1",
        ),
    ],
)
def test_invalid_tasks_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
