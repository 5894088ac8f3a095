"""The cost-to-time model: it recovers known times, follows a changing machine, is robust against
outliers, and reports its error.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_llava

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.engine import calibration
from fmray.engine.calibration import CostToTime, calibrate, calibrated
from fmray.engine.requests import StepTiming
from fmray.engine.simulation import SimulatedEngine, VirtualClock, reference_cost


def random_timings(
    truth: CostToTime, count: int, seed: int = 0, noise: float = 0.0, rows: int = 8
) -> list[StepTiming]:
    """Steps of all sizes with the times of `truth`, with log-normal noise."""
    random, timings = np.random.default_rng(seed), []
    layout = truth.layout
    for number in range(count):
        if number % 2:
            tokens = int(random.integers(4, 900))
            units = int(random.integers(layout.num_units + 1))
            seconds = truth.prefill(tokens, units)
            timing = StepTiming("prefill", 1, tokens, units, layout.first + units, tokens, seconds)
        else:
            size = int(random.integers(1, rows + 1))
            plans = random.random((size, layout.num_units)) < random.random((size, 1))
            layers = layout.first + int(plans.any(0).sum())
            context = int(random.integers(4, 900, size).sum())
            units = int(plans.sum())
            seconds = truth.decode(size, units, context, layers)
            timing = StepTiming("decode", size, 0, units, layers, context, seconds)
        factor = float(np.exp(noise * random.standard_normal()))
        timings.append(replace(timing, seconds=timing.seconds * factor))
    return timings


def relative_errors(model: CostToTime, truth: CostToTime, seed: int = 9) -> np.ndarray:
    """Errors on steps that are not in the fit."""
    errors = []
    for timing in random_timings(truth, 200, seed):
        if timing.kind == "prefill":
            predicted = model.prefill(timing.tokens, timing.units_on)
        else:
            predicted = model.decode(timing.rows, timing.units_on, timing.context, timing.layers)
        errors.append(abs(predicted / timing.seconds - 1))
    return np.array(errors)


def fitted(timings: list[StepTiming]) -> CostToTime:
    model = CostToTime(reference_cost().layout)
    model.fit(timings)
    return model


def test_a_fit_recovers_known_times() -> None:
    truth = reference_cost()
    model = fitted(random_timings(truth, 300))
    assert relative_errors(model, truth).max() < 1e-3
    assert model.error.prefill < 1e-3 and model.error.decode < 1e-3


def test_a_fit_is_robust_against_noise_and_stalls() -> None:
    """10 % noise, and every twentieth step takes 30 times as long."""
    truth = reference_cost()
    timings = [
        replace(timing, seconds=30 * timing.seconds) if number % 20 == 3 else timing
        for number, timing in enumerate(random_timings(truth, 600, noise=0.1))
    ]
    model = fitted(timings)
    assert np.median(relative_errors(model, truth)) < 0.03
    # The reported error is that of single noisy steps: median |N(0, 0.1)| = 0.067.
    assert 0.04 < model.error.prefill < 0.1 and 0.04 < model.error.decode < 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5))
def test_times_never_fall_with_more_work(seed: int, noise: float) -> None:
    """More units, tokens or rows never take less time, whatever the fit."""
    model = fitted(random_timings(reference_cost(), 30, seed, noise))
    units = np.arange(17)
    assert (np.diff(model.prefill(300, units)) >= 0).all()
    assert (np.diff(model.prefill(np.arange(1, 900), 8)) >= 0).all()
    assert (np.diff(model.decode(4, 4 * units, 2000)) >= 0).all()
    by_rows = [model.decode(rows, 8 * rows, 500 * rows) for rows in range(1, 9)]
    assert (np.diff(by_rows) >= -1e-15).all()


def test_live_steps_of_one_kind_correct_all_predictions() -> None:
    """All live steps have eight rows with all units on, on a machine that is twice as slow."""
    truth = reference_cost()
    model = fitted(random_timings(truth, 300, noise=0.05))
    random = np.random.default_rng(1)
    for _ in range(200):
        seconds = 2 * truth.decode(8, 128, 5000, 32) * float(np.exp(0.05 * random.normal()))
        model.update(StepTiming("decode", 8, 0, 128, 32, 5000, seconds))
    assert model.decode(8, 128, 5000, 32) == pytest.approx(
        2 * truth.decode(8, 128, 5000, 32), rel=0.03
    )
    assert model.decode(1, 4, 300) == pytest.approx(2 * truth.decode(1, 4, 300), rel=0.1)
    assert model.prefill(600, 16) == pytest.approx(truth.prefill(600, 16), rel=0.03)
    assert model.speed[1] == pytest.approx(2, rel=0.05)
    assert model.error.decode < 0.1  # of recent steps, each predicted before it was learned


def test_predictions_recover_with_the_machine() -> None:
    truth = reference_cost()
    model = fitted(random_timings(truth, 300))
    for factor in (3.0, 1.0):
        for timing in random_timings(truth, 1200, seed=int(factor)):
            model.update(replace(timing, seconds=factor * timing.seconds))
    assert np.median(relative_errors(model, truth)) < 0.05


def test_live_outliers_hardly_change_predictions() -> None:
    truth = reference_cost()
    model = fitted(random_timings(truth, 300, noise=0.05))
    before = model.prefill(600, 16)
    for number, timing in enumerate(random_timings(truth, 400, seed=2, noise=0.05)):
        stalled = number % 20 == 1
        model.update(replace(timing, seconds=timing.seconds * (100 if stalled else 1)))
    assert model.prefill(600, 16) == pytest.approx(before, rel=0.1)


def test_expected_layers_equals_the_mean_over_random_plans() -> None:
    """Designs L and H, against independent random plans."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=8
    )
    random = np.random.default_rng(0)
    for layout in (SwitchLayout.layers(config), SwitchLayout.heads(config, unit=2)):
        model = CostToTime(layout)
        per_layer, units = layout.units_per_layer, layout.num_units
        for rows, share in ((1, 0.5), (3, 0.25), (8, 0.75)):
            plans = random.random((4000, rows, units)) < share
            ran = plans.reshape(4000, rows, -1, per_layer).any((1, 3)).sum(1).mean()
            expected = model.expected_layers(rows, rows * share * units)
            assert expected == pytest.approx(layout.first + ran, rel=0.02)
        assert model.expected_layers(4, 0) == layout.first
        assert model.expected_layers(4, 4 * units) == layout.num_layers


def test_expected_layers_is_exact_for_one_row_of_design_l() -> None:
    model = reference_cost()
    assert [model.expected_layers(1, k) for k in (0, 5, 16)] == [16, 21, 32]


def test_save_and_load(tmp_path: Path) -> None:
    truth = reference_cost()
    model = fitted(random_timings(truth, 100, noise=0.1))
    model.save(tmp_path / "deep" / "times.json")
    loaded = CostToTime.load(tmp_path / "deep" / "times.json")
    assert loaded.prefill(321, 7) == model.prefill(321, 7)
    assert loaded.decode(3, 20, 999) == model.decode(3, 20, 999)
    assert (loaded.error, loaded.machine, loaded.layout) == (
        model.error, model.machine, model.layout,
    )  # fmt: skip
    timing = random_timings(truth, 2)[1]
    for _ in range(40):  # the loaded model learns
        loaded.update(replace(timing, seconds=3 * timing.seconds))
    assert loaded.prefill(timing.tokens, timing.units_on) > 2 * timing.seconds
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["times.json"]


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"version": 2}', "negative"])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "times.json"
    if damage == "negative":
        fitted(random_timings(reference_cost(), 60)).save(path)
        state = json.loads(path.read_text())
        state["decode"]["coefficients"][2] = -1.0
        damage = json.dumps(state)
    path.write_text(damage)
    with pytest.raises(ValueError, match="not a stored calibration"):
        CostToTime.load(path)


def test_invalid_timings_are_an_error() -> None:
    model = CostToTime(reference_cost().layout)
    with pytest.raises(ValueError, match="measured"):
        model.prefill(10, 3)
    timings = random_timings(reference_cost(), 20)
    with pytest.raises(ValueError, match="no decode step"):
        model.fit([timing for timing in timings if timing.kind == "prefill"])
    with pytest.raises(ValueError, match="positive"):
        model.fit([replace(timings[0], seconds=0.0), *timings[1:]])
    model.fit(timings)
    with pytest.raises(ValueError, match="positive"):
        model.update(replace(timings[0], seconds=float("nan")))


# --- Measuring an engine --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> AdaptiveVLM:
    base = tiny_llava(layers=6)
    torch.manual_seed(1)
    return AdaptiveVLM.from_base(base, SwitchLayout.layers(base.config))


def simulated(model: AdaptiveVLM, noise: float = 0.05) -> tuple[SimulatedEngine, CostToTime]:
    prefill, decode = reference_cost().coefficients
    truth = CostToTime.from_coefficients(model.layout, prefill, decode)
    return SimulatedEngine(truth, VirtualClock(), max_rows=4, noise=noise), truth


def test_calibrate_recovers_the_times_of_an_engine(model: AdaptiveVLM) -> None:
    engine, truth = simulated(model)
    cost = calibrate(engine, model, seconds=60, longest=200, clock=engine.clock)
    assert engine.clock.now < 90
    for tokens, units in ((5, 0), (60, 3), (190, 3), (190, 0)):
        assert cost.prefill(tokens, units) == pytest.approx(truth.prefill(tokens, units), rel=0.05)
    for rows in (1, 2, 4):
        for units in (0, 3):
            assert cost.decode(rows, units * rows, 100 * rows) == pytest.approx(
                truth.decode(rows, units * rows, 100 * rows), rel=0.05
            )
    assert cost.error.prefill < 0.08 and cost.error.decode < 0.08


def test_calibrating_a_busy_engine_is_an_error(model: AdaptiveVLM) -> None:
    engine, _ = simulated(model)
    prompts = calibration.RandomPrompts(model, 20, None, np.random.default_rng(0))
    engine.start(prompts.request("one", calibration.Sampling(4)))
    with pytest.raises(ValueError, match="idle"):
        calibrate(engine, model)


def test_calibrated_measures_once_per_machine(
    model: AdaptiveVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "times.json"
    engine, _ = simulated(model)
    options = {"seconds": 5.0, "longest": 100, "clock": engine.clock}
    first = calibrated(engine, model, path, **options)
    measured = engine.clock.now
    again = calibrated(engine, model, path, **options)
    assert engine.clock.now == measured
    assert again.prefill(50, 2) == first.prefill(50, 2)
    path.write_text("{")
    with pytest.warns(UserWarning, match="measuring again"):
        calibrated(engine, model, path, **options)
    assert engine.clock.now > measured
    measured = engine.clock.now
    monkeypatch.setattr(calibration, "machine_name", lambda: "another")
    assert calibrated(engine, model, path, **options).machine == "another"
    assert engine.clock.now > measured
