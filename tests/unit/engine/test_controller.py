"""The load controller: all units without load, the most that are in time under load, slow to rise,
and no refusal before the minimum.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.engine.controller import AIM, LoadController, LoadTarget
from fmray.engine.forecast import Forecast, Work
from fmray.engine.simulation import reference_cost

K = 16
FORECAST = Forecast(reference_cost(), max_rows=4)


def make_controller(
    seconds: float = 2.0, min_units: int = 0, of: str = "first_token"
) -> LoadController:
    return LoadController(LoadTarget(seconds, of), FORECAST, min_units, K)


def queue(length: int) -> list[Work]:
    return [Work(600, 32) for _ in range(length)]


def rows(count: int) -> list[Work]:
    return [Work(600, 20.0, K, prefilled=True) for _ in range(count)]


def test_without_load_all_units_are_on() -> None:
    controller = make_controller()
    for now in np.arange(0, 60, 1.0):
        controller.arrived(now, Work(600, 32))
        assert controller.update(now, rows(1), queue(1)) == K
        assert controller.shed(rows(1), queue(1), 0) == 0


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
def test_it_falls_to_the_largest_number_in_time(
    waiting: list[tuple], running: int, seconds: float, min_units: int, of: str
) -> None:
    """Against one forecast per number of units."""
    controller = make_controller(seconds, min_units, of)
    line = [
        Work(tokens, new_tokens, units_on, max_units=max_units, age=age)
        for age, tokens, new_tokens, units_on, max_units in waiting
    ]
    fitting = []
    for units_on in range(min_units, K + 1):
        times = FORECAST.play(rows(running), line, np.array([units_on]), of)[:, 0]
        if all(work.age + time <= AIM * seconds for work, time in zip(line, times, strict=True)):
            fitting.append(units_on)
    assert controller.update(0.0, rows(running), line) == max(fitting, default=min_units)


def test_it_rises_slowly_and_in_steps() -> None:
    controller = make_controller(seconds=2.0)
    assert controller.update(0.0, rows(4), queue(40)) == 0
    units = [controller.update(0.1 * turn, [], []) for turn in range(1, 200)]
    assert units[4] == 0  # it waits for a quarter of the target first
    rises = np.diff([0, *units])
    assert rises.min() == 0 and rises.max() == 2
    assert units[-1] == K
    assert units.index(K) * 0.1 == pytest.approx(8 * 0.5, abs=1.0)


def test_a_busy_moment_restarts_the_wait_before_a_rise() -> None:
    controller = make_controller(seconds=2.0)
    controller.update(0.0, rows(4), queue(40))
    for turn in range(1, 100):
        now = 0.6 * turn
        controller.update(now, [], [])
        assert controller.update(now + 0.3, rows(4), queue(20)) == 0


def test_constant_work_keeps_it_at_the_number_that_carries_the_work() -> None:
    """The queue is empty, but the arriving work fills the machine at 8 units."""
    controller = make_controller(seconds=2.0)
    work = reference_cost().answer(600, 8, 32, 4)
    now = 0.0
    for number in range(2000):
        now += float(work)
        controller.arrived(now, Work(600, 32))
        controller.update(now, rows(3), queue(40 if number == 1000 else 0))
    assert 6 <= controller.units_on <= 8
    for turn in range(100):  # when the work ends, it rises
        controller.update(now + turn, [], [])
    assert controller.units_on == K


def test_it_falls_at_once_in_a_lasting_overload() -> None:
    """The wait alone would require one step down, the arriving work requires more."""
    controller = make_controller(seconds=6.0)
    patient = make_controller(seconds=6.0)
    work = float(reference_cost().answer(600, 4, 32, 4))
    now = 0.0
    for _ in range(1000):
        now += work
        controller.arrived(now, Work(600, 32))
    line = next(
        queue(length) for length in range(1, 100)
        if patient.update(0.0, rows(4), queue(length)) < K
    )  # fmt: skip
    assert patient.units_on > 4
    assert 2 <= controller.update(now, rows(4), line) <= 4


def test_misses_lower_the_aim() -> None:
    controller = make_controller(seconds=1.0)
    assert controller.aim == AIM
    for _ in range(3):
        controller.measured(1.5)
    assert 0.7 < controller.aim < AIM - 0.1
    for _ in range(1000):
        controller.measured(0.5)
    assert controller.aim == AIM
    for _ in range(100):
        controller.measured(1.5)
    assert controller.aim == pytest.approx(0.4)  # the smallest aim


@settings(max_examples=30, deadline=None)
@given(st.floats(0.6, 1.8), st.integers(0, 100))
def test_feedback_corrects_a_wrong_forecast(factor: float, seed: int) -> None:
    """Times are `factor` x the aim with noise: the miss rate still converges to the requested one,
    within the range of the aim (Gibbs and Candes 2021, proposition 4.1)."""
    random, controller, missed = np.random.default_rng(seed), make_controller(seconds=1.0), 0
    for turn in range(3000):
        seconds = controller.aim * factor * float(np.exp(0.1 * random.standard_normal()))
        missed += turn >= 500 and seconds > 1.0
        controller.measured(seconds)
    assert missed / 2500 < 0.04


def test_no_request_is_shed_before_the_minimum() -> None:
    """A shed request is late with every number of units, others are in time at the minimum."""
    for length in range(1, 60):
        controller, line = make_controller(seconds=2.0, min_units=3), queue(length)
        late = controller.shed(rows(4), line, length - 1)
        times = FORECAST.play(rows(4), line, np.arange(3, K + 1), "first_token")[-1]
        assert (late > 0) == (times[0] > controller.aim) == bool((times > controller.aim).all())
        if late > 0:
            assert late == pytest.approx(times[0] - controller.aim)
            assert controller.units_on == 3


def test_a_long_request_is_not_shed_for_its_length() -> None:
    controller = make_controller(seconds=0.05)
    alone = [Work(5000, 32)]
    assert controller.shed([], alone, 0) == 0
    assert controller.shed(rows(4), alone, 0) > 0  # but for its wait
    assert controller.shed(rows(4), alone, 0, limit=60.0) == 0  # unless its own deadline allows it


def test_invalid_targets_are_an_error() -> None:
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive"):
            LoadTarget(seconds)
    with pytest.raises(ValueError, match="first_token"):
        LoadTarget(1.0, "never")
    with pytest.raises(ValueError, match="min_units"):
        make_controller(min_units=K + 1)
