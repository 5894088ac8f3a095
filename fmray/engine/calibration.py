"""How long steps take on this machine: a cost-to-time model, measured at start-up, kept fresh.

In: an engine to measure, or `StepTiming`s. Out: `CostToTime`, seconds of a prefill and of a decode
step by tokens, rows, switches on, layers and context; its own error; JSON.

Both are linear in what a step does, with coefficients >= 0, so a time never falls with more
switches, tokens or rows: the policy's searches rest on that.

    prefill  1, new tokens, tokens x keys, switches x keys, switches x keys^2, picture values
    decode   1, layers run, rows, switches, keys, switches x keys / rows

A prefill's upper layers see every token, reused prefixes included ("keys"); the lower ones only new
tokens. Layers are apart from switches because a layer that runs for one row reads its weights for
all. Where the plans are not known yet, the number of layers is its expectation under independent
plans.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
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

# A non-negative, robust, forgetting least-squares fit of times.
#
# In: rows of features and seconds. Out: `TimeRegression`, seconds = sum of coefficient x feature
# with coefficients >= 0, fitted for small *relative* errors and refreshed one observation at a
# time.
#
# Fit: non-negative least squares (Lawson and Hanson 1974) on features / scale and seconds / scale;
# the scale is the seconds themselves at first and the prediction after (dividing by noisy seconds
# favours the short ones), with Huber weights so that a stall counts like a small error. Refresh:
# exponentially forgotten normal equations, joined to those of the first fit *at today's speed* (the
# median of recent measured / first predicted). Traffic excites few directions, and forgetting alone
# would lose the others.

FOLDS = 5
ROUNDS = 4  # of reweighting
HUBER = 2.0  # in robust standard deviations
PRIOR = 50.0  # observations that the first fit counts as, beside the live ones
REFRESH = 8  # live observations between two solutions
SPEED = 48  # live observations that today's speed is the median of
RECENT = 256  # live observations that the error is the median of


class TimeRegression:
    """names: of the features, p of them. memory: live observations remembered (time constant)."""

    def __init__(self, names: tuple[str, ...], memory: float = 200.0) -> None:
        if memory <= REFRESH:
            raise ValueError(f"memory is {memory}; more than {REFRESH} observations are needed")
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
        """features [m, p], seconds [m] > 0. Forgets what was live. ValueError for no or bad rows.

        Its error is cross-validated: measured on rows whose features the fit has not seen.
        """
        features, seconds = np.asarray(features, float), np.asarray(seconds, float)
        if features.ndim != 2 or features.shape != (len(seconds), len(self.names)):
            raise ValueError(
                f"features are {list(features.shape)}, seconds {list(seconds.shape)}; "
                f"[m, {len(self.names)}] and [m] are needed"
            )
        sound = np.isfinite(features).all() and np.isfinite(seconds).all()
        if not len(seconds) or not sound or seconds.min() <= 0 or features.min() < 0:
            raise ValueError("timings must be finite, seconds positive, and there must be some")
        self.coefficients = _robust(features, seconds)
        self.fitted = True
        self.fit_error = _held_out_error(features, seconds, self.coefficients)
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        rows = features / np.maximum(features @ self.coefficients, 1e-12)[:, None]
        # Two solutions that fit alike must not be told apart by rounding: a whiff of ridge.
        products = rows.T @ rows / len(rows)
        products += np.diag(np.maximum(np.diag(products), 1e-30)) * 1e-8
        self._prior = PRIOR * products

    def update(self, features: np.ndarray, seconds: float) -> None:
        """One live observation: features [p]. One that is no positive time is a ValueError."""
        assert self.fitted, "fit comes first"
        if not math.isfinite(seconds) or seconds <= 0:
            raise ValueError(f"a step took {seconds!r} seconds; a positive time is needed")
        predicted = max(float(features @ self.coefficients), 1e-9)
        first = max(float(features @ self._first), 1e-9)
        self.live_errors.append(abs(predicted - seconds) / seconds)
        self._speeds.append(math.log(seconds / first))
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
        # The prior's rows say: first prediction x speed. Its targets follow from its coefficients.
        products = self._prior + self._products
        targets = self._prior @ self._first * speed + self._targets
        scale = 1 / np.sqrt(np.maximum(np.diag(products), 1e-30))
        scaled = products * np.outer(scale, scale)
        lower = np.linalg.cholesky(scaled + 1e-9 * np.eye(len(scale)))
        solution, _ = nnls(lower.T, np.linalg.solve(lower, targets * scale))
        self.coefficients = solution * scale

    @property
    def speed(self) -> float:
        """Recent measured / first predicted: 1.5 says the machine is now 1.5 times slower."""
        return math.exp(statistics.median(self._speeds)) if self._speeds else 1.0

    @property
    def error(self) -> float:
        """Median relative error: of live predictions made before they were learnt from (20 or
        more), else the fit's, cross-validated."""
        if len(self.live_errors) >= 20:
            return statistics.median(self.live_errors)
        return self.fit_error

    def state(self) -> dict[str, Any]:
        """Plain values for JSON: the fit as it stands now. Live figures are not kept."""
        assert self.fitted, "fit comes first"
        return {
            "names": list(self.names),
            "coefficients": self.coefficients.tolist(),
            "prior": self._prior.tolist(),
            "error": self.error,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; ValueError if it is of other features or no numbers."""
        size = len(self.names)
        coefficients = np.asarray(state["coefficients"], float)
        prior = np.asarray(state["prior"], float)
        if tuple(state["names"]) != self.names or prior.shape != (size, size):
            raise ValueError(f"the stored fit has features {state['names']}, not {self.names}")
        if coefficients.shape != (size,) or not (coefficients >= 0).all():
            raise ValueError("the stored fit has coefficients that are no times")
        self.coefficients, self.fit_error, self.fitted = coefficients, float(state["error"]), True
        self.live_errors.clear()
        self.live_count = 0
        self._clear_live()
        self._prior = prior


def _robust(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients [p] >= 0 by reweighted non-negative least squares."""
    scale, weights = seconds, np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        rows = features * (weights / scale)[:, None]
        size = np.sqrt((rows**2).sum(0))
        size[size == 0] = 1.0  # a feature nobody showed: its coefficient stays 0
        solution, _ = nnls(rows / size, weights * seconds / scale)
        coefficients = solution / size
        predicted = features @ coefficients
        if (predicted <= 0).any():
            break  # nothing explains some row: relative residuals make no sense
        residual = np.abs(seconds / predicted - 1)
        limit = HUBER * max(1.4826 * float(np.median(residual)), 1e-6)
        # weights multiply rows, so their square weighs the squared error
        scale, weights = predicted, np.sqrt(np.minimum(1.0, limit / np.maximum(residual, 1e-12)))
    return coefficients


def _held_out_error(features: np.ndarray, seconds: np.ndarray, coefficients: np.ndarray) -> float:
    """Median relative error over folds that split *distinct* feature rows; with too few of them,
    the error of the fit itself."""
    _, group = np.unique(features, axis=0, return_inverse=True)
    group = group.reshape(-1)
    groups = int(group.max()) + 1
    if groups < 2 * FOLDS:
        return float(np.median(np.abs(features @ coefficients / seconds - 1)))
    fold = np.random.default_rng(0).permutation(groups)[group] % FOLDS
    errors = np.zeros(len(seconds))
    for number in range(FOLDS):
        out = fold == number
        found = _robust(features[~out], seconds[~out])
        errors[out] = np.abs(features[out] @ found / seconds[out] - 1)
    return float(np.median(errors))


PREFILL = ("step", "tokens", "tokens x keys", "units x keys", "units x keys^2", "picture values")
DECODE = ("step", "layers", "rows", "units", "keys", "units x keys / row")
VERSION = 1

#: a float, or an array of them: predictions are made for many numbers of switches at once
Amount = Any


@dataclass(frozen=True)
class CalibrationError:
    """Median relative errors: of live predictions, or cross-validated before there are any."""

    prefill: float
    decode: float


class CostToTime:
    """Seconds of an engine's steps. `layout`: of its model's switches; `machine`: where measured.

    Not thread-safe. Amounts may be numpy arrays that broadcast.
    """

    def __init__(self, layout: SwitchLayout, machine: str | None = None) -> None:
        self.layout = layout
        self.machine = machine_name() if machine is None else machine
        self._prefill = TimeRegression(PREFILL)
        self._decode = TimeRegression(DECODE)

    @classmethod
    def from_coefficients(
        cls, layout: SwitchLayout, prefill: Iterable[float], decode: Iterable[float]
    ) -> CostToTime:
        """A model of known coefficients (`PREFILL` and `DECODE` say which), for simulations."""
        made = cls(layout, machine="simulated")
        for regression, values in ((made._prefill, prefill), (made._decode, decode)):
            size = len(regression.names)
            state = {"names": regression.names, "coefficients": list(values), "error": 0.0}
            regression.restore({**state, "prior": np.eye(size).tolist()})
        return made

    # -- predictions -----------------------------------------------------------------------

    def prefill(
        self, tokens: Amount, units_on: Amount, keys: Amount = None, pixels: Amount = 0
    ) -> Amount:
        """Seconds of the prefill of one prompt.

        tokens: to be computed in the lower layers. units_on: switches. keys: tokens in all, reused
        ones included (default: `tokens`). pixels: picture values (numbers in `pixel_values`) that
        the vision tower has to read; 0 where its features are at hand.
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
        """Seconds of one decode step. rows >= 1; units_on and context: sums over the rows; layers:
        decoder layers in which any row runs (default: expected, see the module's text)."""
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
        """Seconds of the machine that one whole answer takes: its prefill and its part of the
        decode steps of `rows` alike."""
        context = rows * (tokens + new_tokens / 2)
        step = self.decode(rows, rows * units_on, context)
        return self.prefill(tokens, units_on, pixels=pixels) + (new_tokens - 1) * step / rows

    def expected_layers(self, rows: int, units_on: Amount) -> Amount:
        """Layers in which any of `rows` runs, when they have `units_on` switches in sum."""
        layout = self.layout
        off = 1 - units_on / (rows * layout.num_units)
        switchable = layout.num_layers - layout.first
        return layout.first + switchable * (1 - off ** (rows * layout.units_per_layer))

    @staticmethod
    def _ready(regression: TimeRegression) -> list[float]:
        if not regression.fitted:
            raise ValueError("nothing is measured yet; fit, load or calibrate comes first")
        return regression.coefficients.tolist()

    # -- learning --------------------------------------------------------------------------

    def fit(self, timings: list[StepTiming], pixels: list[int] | None = None) -> None:
        """Fit to a list of steps, prefills and decodes both; pixels: picture values read in each
        (default none). ValueError where a kind is missing."""
        pixels = [0] * len(timings) if pixels is None else pixels
        for kind, regression in (("prefill", self._prefill), ("decode", self._decode)):
            pairs = [
                (self._features(timing, read), timing.seconds)
                for timing, read in zip(timings, pixels, strict=True)
                if timing.kind == kind
            ]
            if not pairs:
                raise ValueError(f"no {kind} step among {len(timings)} timings")
            regression.fit(*(np.array(column, float) for column in zip(*pairs, strict=True)))

    def update(self, timing: StepTiming, pixels: int = 0) -> None:
        """Learn from one live step."""
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
        """As they stand now, in the order of `PREFILL` and `DECODE`."""
        return self._ready(self._prefill), self._ready(self._decode)

    @property
    def error(self) -> CalibrationError:
        """Of both kinds of step."""
        return CalibrationError(self._prefill.error, self._decode.error)

    @property
    def speed(self) -> tuple[float, float]:
        """Prefill, decode: recent measured / first fitted; 2 says twice as slow as calibrated."""
        return self._prefill.speed, self._decode.speed

    # -- storing ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        path = Path(path)
        state = {
            "version": VERSION,
            "machine": self.machine,
            "layout": self.layout.to_dict(),
            "prefill": self._prefill.state(),
            "decode": self._decode.state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(state, file, indent=1)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: str | Path) -> CostToTime:
        """What `save` wrote; ValueError if it is not that."""
        try:
            state = json.loads(Path(path).read_text())
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']} is not {VERSION}")
            made = cls(SwitchLayout.from_dict(state["layout"]), state["machine"])
            made._prefill.restore(state["prefill"])
            made._decode.restore(state["decode"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no stored calibration: {error}") from error
        return made


def machine_name() -> str:
    """What times depend on, beside the model: processor, cores, threads, accelerator."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return (
        f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {device}"
    )


# -- measuring -----------------------------------------------------------------------------


class Measurable(Protocol):
    """The engine's doors that calibration uses (`fmray.engine.engine.Engine`)."""

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
    picture: dict[str, Tensor] | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CostToTime:
    """Measure an idle engine for about `seconds`: random prompts of log-uniform lengths up to
    `longest` tokens, batches of 1 to max_rows, switches from none to all.

    model: its `AdaptiveVLM`. picture: inputs of one question about a picture, as the processor
    gives them (any picture); without, the vision tower's time is learnt from live traffic only.
    Prompts are random tokens and are not reused. ValueError if the engine is busy.
    """
    if engine.active:
        raise ValueError(f"the engine has {engine.active} rows; calibration needs it idle")
    cost = CostToTime(model.layout)
    random = np.random.default_rng(seed)
    timings: list[StepTiming] = []
    pixels: list[int] = []
    batches = _batch_sizes(engine.max_rows)
    drawn = _PromptDraw(model, longest, picture, random)
    sampling = Sampling(new_tokens, temperature=8.0)  # hot: a trained model must not just stop
    _run(engine, [drawn.request("warm-up", sampling)])
    start, number = clock(), 0
    while number < 2 * len(batches) or clock() - start < seconds:
        rows = batches[number % len(batches)]
        requests = [drawn.request(f"calibration-{number}-{row}", sampling)
                    for row in range(rows)]  # fmt: skip
        for timing, read in _run(engine, requests):
            timings.append(timing)
            pixels.append(read)
        number += 1
        if clock() - start > 4 * seconds and number >= len(batches):
            break
    cost.fit(timings, pixels)
    return cost


def calibrated(
    engine: Measurable, model: Any, path: str | Path | None = None, **options: Any
) -> CostToTime:
    """The calibration stored at `path` if it is of this machine and layout; else measured now (see
    `calibrate`) and stored there. A damaged file is measured anew."""
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


def picture_values(inputs: dict[str, Tensor]) -> int:
    """Numbers in the pictures of a request's inputs: what the vision tower's time grows with."""
    values = inputs.get("pixel_values")
    return 0 if values is None else values.numel()


class _PromptDraw:
    """Random questions for calibration."""

    def __init__(
        self, model: Any, longest: int, picture: dict[str, Tensor] | None, random: Any
    ) -> None:
        config = model.backbone.config
        room = getattr(config, "max_position_embeddings", None) or longest
        # The latency token and the answer need positions too.
        self.longest = max(2, min(longest, room - 64 if room > 128 else room // 2))
        self.units = model.layout.num_units
        self.picture, self.random = picture, random
        whole = model.base.config
        special = {
            getattr(whole, name, None)
            for name in ("image_token_id", "video_token_id", "image_token_index")
        }
        self.ids = np.array([i for i in range(config.vocab_size) if i not in special])
        self.device = next(model.parameters()).device

    def request(self, name: str, sampling: Sampling) -> Request:
        """One question; with a picture, every third one is about it."""
        # The grid's ends are drawn often: a line is best known from its ends.
        units = int(self.random.choice([0, self.units, self.random.integers(self.units + 1)]))
        if self.picture is not None and self.random.random() < 1 / 3:
            return Request(name, self.picture, None, units, sampling=sampling)
        length = round(float(np.exp(self.random.uniform(np.log(2), np.log(self.longest)))))
        ids = torch.from_numpy(self.random.choice(self.ids, (1, length))).to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Request(name, inputs, None, units, sampling=sampling)


def _batch_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, ... and max_rows itself."""
    return sorted({1 << power for power in range(max_rows.bit_length() - 1)} | {1, max_rows})


def _run(engine: Measurable, requests: list[Request]) -> list[tuple[StepTiming, int]]:
    """Answer requests together; each step's timing with the picture values it read."""
    waiting = list(requests)
    pixels = {request.id: picture_values(request.inputs) for request in requests}
    steps = []
    while waiting or engine.active:
        while waiting and engine.can_start(waiting[0]):
            engine.start(waiting.pop(0))
        if not engine.active:
            raise ValueError("the engine cannot hold one row of calibration; give it more KV bytes")
        events = engine.step()
        for event in events:
            if event.finished == "error":
                raise RuntimeError(f"calibration failed in the engine: {event.error}")
        timing = engine.timing
        if timing is None:
            continue
        read = 0
        if timing.kind == "prefill":
            read = sum(pixels.pop(event.request, 0) for event in events)
        steps.append((timing, read))
    return steps
