"""The load controller: full budget while it is quiet, the most that is in time under load, slow to
rise, and nobody is refused before the floor.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.engine.controller import AIM, LoadController, LoadTarget, Queued
from fmray.engine.forecast import Forecast, Row, Waiting
from fmray.engine.simulation import reference_cost

K = 16
FORECAST = Forecast(reference_cost(), max_rows=4)


def controller(seconds: float = 2.0, floor: int = 0, of: str = "first_token") -> LoadController:
    return LoadController(LoadTarget(seconds, of), FORECAST, floor, K)


def queue(length: int, age: float = 0.0, tokens: int = 600, new_tokens: int = 32) -> list[Queued]:
    return [Queued(age, Waiting(tokens, new_tokens)) for _ in range(length)]


def rows(count: int) -> list[Row]:
    return [Row(K, 600, 20.0) for _ in range(count)]


def test_quiet_is_full() -> None:
    one = controller()
    for now in np.arange(0, 60, 1.0):
        one.arrived(now, Waiting(600, 32))
        assert one.update(now, rows(1), queue(1)) == K
        assert one.shed(rows(1), queue(1), 0) == 0


queues = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(10, 900), st.integers(1, 40), st.none() | st.integers(0, K),
        st.none() | st.integers(0, K),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    queues,
    st.integers(0, 4),
    st.floats(0.1, 5),
    st.integers(0, K),
    st.sampled_from(["first_token", "answer"]),
)
def test_it_falls_to_the_most_that_is_in_time(
    waiting: list[tuple], running: int, seconds: float, floor: int, of: str
) -> None:
    """Against trying every level, one play each."""
    one = controller(seconds, floor, of)
    line = [
        Queued(age, Waiting(tokens, new, units, cap=cap))
        for age, tokens, new, units, cap in waiting
    ]
    fitting = []
    for level in range(floor, K + 1):
        times = FORECAST.play(
            rows(running), [queued.request for queued in line], np.array([level]), of
        )[:, 0]
        in_time = [
            queued.age + time <= AIM * seconds for queued, time in zip(line, times, strict=True)
        ]
        if all(in_time):
            fitting.append(level)
    assert one.update(0.0, rows(running), line) == max(fitting, default=floor)


def test_it_rises_slowly_and_in_steps() -> None:
    one = controller(seconds=2.0)
    assert one.update(0.0, rows(4), queue(40)) == 0
    levels = [one.update(0.1 * turn, [], []) for turn in range(1, 200)]
    assert levels[4] == 0  # a quarter of the target has to pass first
    rises = np.diff([0, *levels])
    assert rises.min() == 0 and rises.max() == 2
    assert levels[-1] == K
    assert levels.index(K) * 0.1 == pytest.approx(8 * 0.5, abs=1.0)


def test_a_busy_moment_starts_the_wait_again() -> None:
    one = controller(seconds=2.0)
    one.update(0.0, rows(4), queue(40))
    for turn in range(1, 100):
        now = 0.6 * turn
        one.update(now, [], [])
        assert one.update(now + 0.3, rows(4), queue(20)) == 0


def test_standing_work_keeps_it_where_it_fits() -> None:
    """The queue is empty, but as much arrives as the machine does at 8 switches: it does not climb
    past what carries that."""
    one = controller(seconds=2.0)
    work = reference_cost().answer(600, 8, 32, 4)
    now = 0.0
    for number in range(2000):
        now += float(work)
        one.arrived(now, Waiting(600, 32))
        one.update(now, rows(3), queue(40 if number == 1000 else 0))
    assert 6 <= one.level <= 8
    for turn in range(100):  # when it ends, the way is free
        one.update(now + turn, [], [])
    assert one.level == K


def test_a_lasting_overload_is_met_at_once() -> None:
    """Where the wait alone would ask for one step down, the work that arrives asks for more."""
    one = controller(seconds=6.0)
    patient = controller(seconds=6.0)
    work = float(reference_cost().answer(600, 4, 32, 4))
    now = 0.0
    for _ in range(1000):
        now += work
        one.arrived(now, Waiting(600, 32))
    line = next(
        queue(length) for length in range(1, 100)
        if patient.update(0.0, rows(4), queue(length)) < K
    )  # fmt: skip
    assert patient.level > 4
    assert 2 <= one.update(now, rows(4), line) <= 4


def test_misses_tighten_the_aim() -> None:
    one = controller(seconds=1.0)
    assert one.aim == AIM
    for _ in range(3):
        one.measured(1.5)
    assert 0.7 < one.aim < AIM - 0.1
    for _ in range(1000):
        one.measured(0.5)
    assert one.aim == AIM
    for _ in range(100):
        one.measured(1.5)
    assert one.aim == pytest.approx(0.4)  # at least


@settings(max_examples=30, deadline=None)
@given(st.floats(0.6, 1.8), st.integers(0, 100))
def test_feedback_makes_up_for_a_wrong_forecast(factor: float, seed: int) -> None:
    """If what is aimed at takes `factor` times as long, give or take, misses become as rare as
    asked, as far as the aim's range reaches (Gibbs and Candes 2021, proposition 4.1)."""
    random, one, missed = np.random.default_rng(seed), controller(seconds=1.0), 0
    for turn in range(3000):
        seconds = one.aim * factor * float(np.exp(0.1 * random.standard_normal()))
        missed += turn >= 500 and seconds > 1.0
        one.measured(seconds)
    assert missed / 2500 < 0.04


def test_nobody_is_shed_before_the_floor() -> None:
    """Whoever is shed would have been late with every level; whoever is not, is in time at the
    floor."""
    for length in range(1, 60):
        one, line = controller(seconds=2.0, floor=3), queue(length)
        late = one.shed(rows(4), line, length - 1)
        times = FORECAST.play(
            rows(4), [queued.request for queued in line], np.arange(3, K + 1), "first_token"
        )[-1]
        assert (late > 0) == (times[0] > one.aim) == bool((times > one.aim).all())
        if late > 0:
            assert late == pytest.approx(times[0] - one.aim)
            assert one.level == 3


def test_a_long_request_is_not_shed_for_its_length() -> None:
    one = controller(seconds=0.05)
    alone = [Queued(0.0, Waiting(5000, 32))]
    assert one.shed([], alone, 0) == 0
    assert one.shed(rows(4), alone, 0) > 0  # but for a wait it is
    assert one.shed(rows(4), alone, 0, limit=60.0) == 0  # unless it has the time


def test_targets_that_are_none() -> None:
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive"):
            LoadTarget(seconds)
    with pytest.raises(ValueError, match="first_token"):
        LoadTarget(1.0, "never")
    with pytest.raises(ValueError, match="floor"):
        controller(floor=K + 1)
