"""Intervals: against scipy's t distribution and paired t test, and on hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fmray.fewshot.evaluation import confidence_interval, paired_interval

ACCURACIES = st.lists(st.floats(0, 1), min_size=2, max_size=50)


@settings(max_examples=50, deadline=None)
@given(values=ACCURACIES, level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_t_interval_matches_scipy(values, level):
    interval = confidence_interval(values, level)
    expected = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert interval.half_width == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_meta_dataset_interval_uses_the_population_variance():
    # mean 2, population variance 2/3
    interval = confidence_interval([1.0, 2.0, 3.0], kind="meta_dataset")
    assert interval.half_width == pytest.approx(1.96 * math.sqrt(2 / 3) / math.sqrt(3))


def test_single_value_has_no_interval():
    for kind in ("t", "meta_dataset"):
        interval = confidence_interval([0.5], kind=kind)
        assert interval.mean == 0.5 and math.isnan(interval.half_width)


def test_paired_interval_matches_the_paired_test_of_scipy():
    generator = np.random.default_rng(0)
    difficulty = generator.uniform(0.2, 0.8, 200)
    a, b = (difficulty + generator.normal(shift, 0.02, 200) for shift in (0.01, 0.0))
    paired, test = paired_interval(a, b), stats.ttest_rel(a, b)
    expected = test.confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.low > 0  # unpaired, the difference is lost in the tasks' spread
    assert confidence_interval(a).low < confidence_interval(b).high


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: confidence_interval([]), "n >= 1"),
        (lambda: confidence_interval([[0.1, 0.2]]), r"must be \[n\]"),
        (lambda: confidence_interval([0.1, math.nan]), "value 1 is nan"),
        (lambda: confidence_interval([0.1, 0.2], level=95), "between 0 and 1"),
        (lambda: confidence_interval([0.1, 0.2], 0.9, "meta_dataset"), "95 % interval"),
        (lambda: confidence_interval([0.1, 0.2], kind="normal"), "'t' or 'meta_dataset'"),
        (lambda: paired_interval([0.1, 0.2], [0.1]), "same tasks"),
    ],
)
def test_invalid_values_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
