"""Cost-to-time model: how long an engine's steps take, measured at start and updated live.

`CostToTime` predicts the seconds of a prefill and of a decode step. Both are linear in the amount
of work, with coefficients >= 0, so a time never falls with more units, tokens or rows; the searches
of the policy rely on that::

    prefill  1, new tokens, tokens x keys, units x keys, units x keys^2, pixel values
    decode   1, layers run, rows, units, keys, units x keys / rows

The upper layers of a prefill process every token, including cached prefixes ("keys"), the always-on
layers only new tokens. Layers and units are separate features because a layer that runs for one row
reads its weights for all rows. Where the plans are not known yet, the number of layers is its
expectation under independent plans.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from fmray.adallava.layout import SwitchLayout
from fmray.engine.requests import Request, Sampling, StepTiming
from fmray.runtime.files import atomic_path, dumps

# --- Regression -----------------------------------------------------------------------------

FOLDS = 5
ROUNDS = 4  # of reweighting
HUBER = 2.0  # in robust standard deviations
PRIOR = 50.0  # weight of the first fit, in live observations
REFRESH = 8  # live observations between two solutions
SPEED = 48  # live observations whose median is the current speed
RECENT = 256  # live observations whose median is the error


class TimeRegression:
    """Robust non-negative linear regression of times, updated by single observations.

    Minimizes relative errors. The fit is non-negative least squares (Lawson and Hanson 1974) on
    features / scale and seconds / scale. The scale is the seconds at first and the prediction
    after that (dividing by noisy seconds would favour the short ones), with Huber weights, so that
    a stall counts like a small error.

    Live updates use exponentially weighted normal equations, added to those of the first fit *at
    the current speed* (the median of recent measured / first predicted). Traffic excites few
    directions, and exponential weights alone would lose the others.
    """

    def __init__(self, names: tuple[str, ...], memory: float = 200.0) -> None:
        """Create an unfitted regression.

        Args:
            names: names of the p features.
            memory: time constant of the live updates, in observations.
        """
        if memory <= REFRESH:
            raise ValueError(f"memory must be above {REFRESH} observations, not {memory}")
        self.names = names
        self.memory = memory
        self.coefficients = np.zeros(len(names))
        self.fitted = False
        self.fit_error = math.nan
        self.live_errors: deque[float] = deque(maxlen=RECENT)
        self.live_count = 0
        self._clear_live()

    def _clear_live(self) -> None:
        size = len(self.names)
        self._first = self.coefficients.copy()
        self._products, self._targets = np.zeros((size, size)), np.zeros(size)
        self._speeds: deque[float] = deque(maxlen=SPEED)

    def fit(self, features: np.ndarray, seconds: np.ndarray) -> None:
        """Fit to features [m, p] >= 0 and seconds [m] > 0; drops all live observations.

        The error is cross-validated on rows whose features the fit has not seen.

        Raises:
            ValueError: there are no rows, or a value is out of range.
        """
        features, seconds = np.asarray(features, float), np.asarray(seconds, float)
        if features.ndim != 2 or features.shape != (len(seconds), len(self.names)):
            raise ValueError(
                f"features and seconds must be [m, {len(self.names)}] and [m], not "
                f"{list(features.shape)} and {list(seconds.shape)}"
            )
        finite = np.isfinite(features).all() and np.isfinite(seconds).all()
        if not len(seconds) or not finite or seconds.min() <= 0 or features.min() < 0:
            raise ValueError("a fit needs timings, all finite and with positive seconds")
        self.coefficients = _robust(features, seconds)
        self.fitted = True
        self.fit_error = _held_out_error(features, seconds, self.coefficients)
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        rows = features / np.maximum(features @ self.coefficients, 1e-12)[:, None]
        # A tiny ridge, so that rounding does not decide between two solutions that fit equally.
        products = rows.T @ rows / len(rows)
        products += np.diag(np.maximum(np.diag(products), 1e-30)) * 1e-8
        self._prior = PRIOR * products

    def update(self, features: np.ndarray, seconds: float) -> None:
        """Add one live observation with features [p].

        Raises:
            ValueError: seconds is not a positive number.
        """
        assert self.fitted, "call fit first"
        if not math.isfinite(seconds) or seconds <= 0:
            raise ValueError(f"the seconds of a step must be a positive number, not {seconds!r}")
        # Errors of the current and of the first fit, before this observation is learned.
        predicted = max(float(features @ self.coefficients), 1e-9)
        first = max(float(features @ self._first), 1e-9)
        self.live_errors.append(abs(predicted - seconds) / seconds)
        self._speeds.append(math.log(seconds / first))
        # Exponentially weighted normal equations, with a Huber weight against outliers.
        residual = seconds / predicted - 1
        limit = 3 * max(0.05, statistics.median(self.live_errors))
        weight = min(1.0, limit / abs(residual)) if residual else 1.0
        keep = 1 - 1 / self.memory
        row = features / predicted
        self._products = keep * self._products + weight * np.outer(row, row)
        self._targets = keep * self._targets + weight * row * (seconds / predicted)
        self.live_count += 1
        if self.live_count % REFRESH == 0:
            self._refresh()

    def _refresh(self) -> None:
        speed = math.exp(statistics.median(self._speeds))
        # The targets of the prior's rows are the first predictions x speed.
        products = self._prior + self._products
        targets = self._prior @ self._first * speed + self._targets
        scale = 1 / np.sqrt(np.maximum(np.diag(products), 1e-30))
        scaled = products * np.outer(scale, scale)
        lower = np.linalg.cholesky(scaled + 1e-9 * np.eye(len(scale)))
        solution, _ = nnls(lower.T, np.linalg.solve(lower, targets * scale))
        self.coefficients = solution * scale

    @property
    def speed(self) -> float:
        """Recent measured / first predicted; 1.5 means 1.5 times slower than at the fit."""
        return math.exp(statistics.median(self._speeds)) if self._speeds else 1.0

    @property
    def error(self) -> float:
        """Median relative error of live predictions, each before its observation was learned.

        The cross-validated error of the fit for fewer than 20 live observations.
        """
        if len(self.live_errors) >= 20:
            return statistics.median(self.live_errors)
        return self.fit_error

    def state(self) -> dict[str, Any]:
        """Return the current fit as values for JSON, without the live observations."""
        assert self.fitted, "call fit first"
        return {
            "names": list(self.names),
            "coefficients": self.coefficients.tolist(),
            "prior": self._prior.tolist(),
            "error": self.error,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load the values of `state`.

        Raises:
            ValueError: they are of other features, or out of range.
        """
        size = len(self.names)
        coefficients = np.asarray(state["coefficients"], float)
        prior = np.asarray(state["prior"], float)
        if tuple(state["names"]) != self.names or prior.shape != (size, size):
            raise ValueError(f"the stored fit has features {state['names']}, not {self.names}")
        if coefficients.shape != (size,) or not (coefficients >= 0).all():
            raise ValueError("the stored fit has negative or missing coefficients")
        self.coefficients, self.fit_error, self.fitted = coefficients, float(state["error"]), True
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        self._prior = prior


def _robust(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return coefficients [p] >= 0 by reweighted non-negative least squares."""
    scale, weights = seconds, np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        rows = features * (weights / scale)[:, None]
        size = np.sqrt((rows**2).sum(0))
        size[size == 0] = 1.0  # a feature that is always 0 keeps the coefficient 0
        solution, _ = nnls(rows / size, weights * seconds / scale)
        coefficients = solution / size
        predicted = features @ coefficients
        if (predicted <= 0).any():
            break  # no feature explains some row, so relative residuals are undefined
        residual = np.abs(seconds / predicted - 1)
        limit = HUBER * max(1.4826 * float(np.median(residual)), 1e-6)
        # Weights multiply rows, so the square of a weight multiplies the squared error.
        scale, weights = predicted, np.sqrt(np.minimum(1.0, limit / np.maximum(residual, 1e-12)))
    return coefficients


def _held_out_error(features: np.ndarray, seconds: np.ndarray, coefficients: np.ndarray) -> float:
    """Return the median relative error over folds that split *distinct* feature rows.

    With too few distinct rows, the error of the fit itself.
    """
    _, group = np.unique(features, axis=0, return_inverse=True)
    group = group.reshape(-1)
    groups = int(group.max()) + 1
    if groups < 2 * FOLDS:
        return float(np.median(np.abs(features @ coefficients / seconds - 1)))
    fold = np.random.default_rng(0).permutation(groups)[group] % FOLDS
    errors = np.zeros(len(seconds))
    for number in range(FOLDS):
        out = fold == number
        fold_coefficients = _robust(features[~out], seconds[~out])
        errors[out] = np.abs(features[out] @ fold_coefficients / seconds[out] - 1)
    return float(np.median(errors))


# --- Cost-to-time model ---------------------------------------------------------------------

# Feature names; stored calibrations contain them.
PREFILL = ("step", "tokens", "tokens x keys", "units x keys", "units x keys^2", "picture values")
DECODE = ("step", "layers", "rows", "units", "keys", "units x keys / row")
VERSION = 1

#: a number, or an array: predictions are vectorized over the number of units
Amount = Any


@dataclass(frozen=True)
class CalibrationError:
    """Median relative errors of `TimeRegression.error`."""

    prefill: float
    decode: float


class CostToTime:
    """Predicted seconds of an engine's steps.

    Not thread-safe. Amounts may be numpy arrays that broadcast.
    """

    def __init__(self, layout: SwitchLayout, machine: str | None = None) -> None:
        """Create an unfitted model; machine: the machine of the timings, default this one."""
        self.layout = layout
        self.machine = machine_name() if machine is None else machine
        self._prefill = TimeRegression(PREFILL)
        self._decode = TimeRegression(DECODE)

    @classmethod
    def from_coefficients(
        cls, layout: SwitchLayout, prefill: Iterable[float], decode: Iterable[float]
    ) -> CostToTime:
        """Create a model with known coefficients, in the order of `PREFILL` and `DECODE`."""
        model = cls(layout, machine="simulated")
        for regression, values in ((model._prefill, prefill), (model._decode, decode)):
            size = len(regression.names)
            state = {"names": regression.names, "coefficients": list(values), "error": 0.0}
            regression.restore({**state, "prior": np.eye(size).tolist()})
        return model

    def prefill(
        self, tokens: Amount, units_on: Amount, keys: Amount = None, pixels: Amount = 0
    ) -> Amount:
        """Seconds of the prefill of one prompt.

        Args:
            tokens: tokens that the always-on layers compute.
            units_on: units on.
            keys: all tokens, cached prefixes included; default: `tokens`.
            pixels: values of `pixel_values` that the vision tower reads; 0 with cached features.
        """
        keys = tokens if keys is None else keys
        c = self._ready(self._prefill)
        return (
            c[0]
            + c[1] * tokens
            + c[2] * (tokens * keys)
            + c[3] * (units_on * keys)
            + c[4] * (units_on * keys * keys)
            + c[5] * pixels
        )

    def decode(self, rows: int, units_on: Amount, context: Amount, layers: Amount = None) -> Amount:
        """Seconds of one decode step.

        Args:
            rows: at least 1.
            units_on: sum over the rows.
            context: keys, sum over the rows.
            layers: decoder layers in which at least one row runs; default: the expected number.
        """
        layers = self.expected_layers(rows, units_on) if layers is None else layers
        c = self._ready(self._decode)
        return (
            c[0]
            + c[1] * layers
            + c[2] * rows
            + c[3] * units_on
            + c[4] * context
            + c[5] * (units_on * context / rows)
        )

    def answer(
        self, tokens: Amount, units_on: Amount, new_tokens: Amount, rows: int = 1, pixels: int = 0
    ) -> Amount:
        """Machine seconds of one complete answer: its prefill, and its part of the decode steps.

        Each decode step is shared by `rows` equal requests.
        """
        context = rows * (tokens + new_tokens / 2)
        step = self.decode(rows, rows * units_on, context)
        return self.prefill(tokens, units_on, pixels=pixels) + (new_tokens - 1) * step / rows

    def expected_layers(self, rows: int, units_on: Amount) -> Amount:
        """Expected layers in which at least one row runs; units_on: sum over the rows."""
        layout = self.layout
        off = 1 - units_on / (rows * layout.num_units)
        switchable = layout.num_layers - layout.first
        return layout.first + switchable * (1 - off ** (rows * layout.units_per_layer))

    @staticmethod
    def _ready(regression: TimeRegression) -> list[float]:
        if not regression.fitted:
            raise ValueError("the cost model has not been measured; call fit, load or calibrate")
        return regression.coefficients.tolist()

    def fit(self, timings: list[StepTiming], pixels: list[int] | None = None) -> None:
        """Fit to timings of prefills and decode steps.

        Args:
            pixels: values of `pixel_values` read in each step; default: 0.

        Raises:
            ValueError: there is no prefill or no decode step.
        """
        pixels = [0] * len(timings) if pixels is None else pixels
        for kind, regression in (("prefill", self._prefill), ("decode", self._decode)):
            pairs = [
                (self._features(timing, values), timing.seconds)
                for timing, values in zip(timings, pixels, strict=True)
                if timing.kind == kind
            ]
            if not pairs:
                raise ValueError(f"no {kind} step among {len(timings)} timings")
            regression.fit(*(np.array(column, float) for column in zip(*pairs, strict=True)))

    def update(self, timing: StepTiming, pixels: int = 0) -> None:
        """Update the model with one live step."""
        regression = self._prefill if timing.kind == "prefill" else self._decode
        self._ready(regression)
        regression.update(np.array(self._features(timing, pixels), float), timing.seconds)

    @staticmethod
    def _features(timing: StepTiming, pixels: int) -> tuple[float, ...]:
        units, keys, rows = timing.units_on, timing.context, timing.rows
        if timing.kind == "prefill":
            tokens = timing.tokens
            return (1, tokens, tokens * keys, units * keys, units * keys * keys, pixels)
        return (1, timing.layers, rows, units, keys, units * keys / rows)

    @property
    def coefficients(self) -> tuple[list[float], list[float]]:
        """Current coefficients, in the order of `PREFILL` and `DECODE`."""
        return self._ready(self._prefill), self._ready(self._decode)

    @property
    def error(self) -> CalibrationError:
        """Errors of both kinds of step."""
        return CalibrationError(self._prefill.error, self._decode.error)

    @property
    def speed(self) -> tuple[float, float]:
        """Speed of prefills and decode steps; 2 is twice as slow as calibrated."""
        return self._prefill.speed, self._decode.speed

    def save(self, path: str | Path) -> None:
        """Write the model to a JSON file, atomically."""
        path = Path(path)
        state = {
            "version": VERSION,
            "machine": self.machine,
            "layout": self.layout.to_dict(),
            "prefill": self._prefill.state(),
            "decode": self._decode.state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, unique=True) as temporary:  # several replicas may write it
            temporary.write_text(dumps(state, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CostToTime:
        """Read the file of `save`.

        Raises:
            ValueError: it is not a calibration of this version.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']} instead of {VERSION}")
            model = cls(SwitchLayout.from_dict(state["layout"]), state["machine"])
            model._prefill.restore(state["prefill"])
            model._decode.restore(state["decode"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a stored calibration: {error}") from error
        return model


def machine_name() -> str:
    """Describe the machine that times depend on: processor, cores, threads, accelerator."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return (
        f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {device}"
    )


# --- Measurement ----------------------------------------------------------------------------


class Measurable(Protocol):
    """The part of `fmray.engine.engine.Engine` that calibration uses."""

    max_rows: int

    @property
    def active(self) -> int: ...
    @property
    def timing(self) -> StepTiming | None: ...
    def can_start(self, request: Any) -> bool: ...
    def start(self, request: Any) -> None: ...
    def step(self) -> list[Any]: ...


def calibrate(
    engine: Measurable,
    model: Any,
    *,
    seconds: float = 20.0,
    longest: int = 512,
    new_tokens: int = 8,
    image: dict[str, Tensor] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CostToTime:
    """Measure an idle engine, with random prompts, batches of 1 to max_rows, and all budgets.

    Prompts are random tokens of log-uniform length and not cached.

    Args:
        model: the engine's `AdaptiveVLM`.
        seconds: approximate duration.
        longest: most prompt tokens.
        image: processor output for a prompt with any image; without it the time of the vision
            tower is learned from live traffic only.

    Raises:
        ValueError: the engine is busy.
    """
    if engine.active:
        raise ValueError(f"calibration needs an idle engine; this one has {engine.active} rows")
    cost = CostToTime(model.layout)
    random = np.random.default_rng(seed)
    timings: list[StepTiming] = []
    pixels: list[int] = []
    batches = _batch_sizes(engine.max_rows)
    prompts = RandomPrompts(model, longest, image, random)
    sampling = Sampling(new_tokens, temperature=8.0)  # so high that a trained model does not stop
    _run(engine, [prompts.request("warm-up", sampling)])
    # Each batch size at least twice, unless that takes more than four times `seconds`.
    start, number = clock(), 0
    while number < 2 * len(batches) or clock() - start < seconds:
        rows = batches[number % len(batches)]
        requests = [prompts.request(f"calibration-{number}-{row}", sampling)
                    for row in range(rows)]  # fmt: skip
        for timing, values in _run(engine, requests):
            timings.append(timing)
            pixels.append(values)
        number += 1
        if clock() - start > 4 * seconds and number >= len(batches):
            break
    cost.fit(timings, pixels)
    return cost


def calibrated(
    engine: Measurable, model: Any, path: str | Path | None = None, **options: Any
) -> CostToTime:
    """Load the calibration at `path`, or measure it (see `calibrate`) and store it there.

    Measures if the file is missing or damaged, or is of another machine or layout.
    """
    if path is not None and Path(path).exists():
        try:
            stored = CostToTime.load(path)
        except ValueError as error:
            warnings.warn(f"{error}; measuring again", stacklevel=2)
        else:
            if stored.machine == machine_name() and stored.layout == model.layout:
                return stored
    cost = calibrate(engine, model, **options)
    if path is not None:
        cost.save(path)
    return cost


def image_values(inputs: dict[str, Tensor]) -> int:
    """Number of values in a request's images, which the vision tower's time is proportional to."""
    values = inputs.get("pixel_values")
    return 0 if values is None else values.numel()


class RandomPrompts:
    """Random requests for calibration."""

    def __init__(
        self, model: Any, longest: int, image: dict[str, Tensor] | None, random: Any
    ) -> None:
        config = model.backbone.config
        positions = getattr(config, "max_position_embeddings", None) or longest
        # The latency token and the answer need positions too.
        available = positions - 64 if positions > 128 else positions // 2
        self.longest = max(2, min(longest, available))
        self.max_units = model.layout.num_units
        self.image, self.random = image, random
        special = {
            getattr(model.base.config, name, None)
            for name in ("image_token_id", "video_token_id", "image_token_index")
        }
        self.ids = np.array([i for i in range(config.vocab_size) if i not in special])
        self.device = next(model.parameters()).device

    def request(self, name: str, sampling: Sampling) -> Request:
        """Return a random request; every third one has the image, if there is one."""
        # A line is best determined by its ends, so they are frequent.
        most = self.max_units
        units = int(self.random.choice([0, most, self.random.integers(most + 1)]))
        if self.image is not None and self.random.random() < 1 / 3:
            return Request(name, self.image, None, units, sampling=sampling)
        length = round(float(np.exp(self.random.uniform(np.log(2), np.log(self.longest)))))
        ids = torch.from_numpy(self.random.choice(self.ids, (1, length))).to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Request(name, inputs, None, units, sampling=sampling)


def _batch_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, ... and max_rows."""
    return sorted({1 << power for power in range(max_rows.bit_length() - 1)} | {1, max_rows})


def _run(engine: Measurable, requests: list[Request]) -> list[tuple[StepTiming, int]]:
    """Run requests in one batch; returns each step's timing and the image values it read."""
    waiting = list(requests)
    pixels = {request.id: image_values(request.inputs) for request in requests}
    steps = []
    while waiting or engine.active:
        while waiting and engine.can_start(waiting[0]):
            engine.start(waiting.pop(0))
        if not engine.active:
            raise ValueError(
                "the KV memory is too small for one calibration request; raise kv_bytes"
            )
        events = engine.step()
        for event in events:
            if event.finished == "error":
                raise RuntimeError(f"calibration failed in the engine: {event.error}")
        timing = engine.timing
        if timing is None:
            continue
        values = 0
        if timing.kind == "prefill":
            values = sum(pixels.pop(event.request, 0) for event in events)
        steps.append((timing, values))
    return steps
