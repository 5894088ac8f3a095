"""Discrete-event simulation of the policy and the load controller, in virtual time.

Runs `Dispatcher`, the code that serves, on an engine whose steps advance a virtual clock and
compute nothing. The input is an arrival rate over time (constant, step, ramp, burst), the true step
times and a seed; the output is the outcome of every request, and the units of `auto` over time.

    python -m fmray.engine.simulation        prints a table of loads and policies
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from transformers import LlamaConfig

from fmray.adallava.cost import CostModel
from fmray.adallava.layout import SwitchLayout
from fmray.engine.admission import WorkerSettings
from fmray.engine.calibration import CostToTime
from fmray.engine.dispatcher import Dispatcher
from fmray.engine.fairness import CallerLimits, Limits
from fmray.engine.policy import Ask, Budgets, Decision, Refused
from fmray.engine.requests import EngineStats, Event, Milestone, Request, Sampling, StepTiming

Rate = Callable[[float], float]


class VirtualClock:
    """A clock that the simulation sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class _SimulatedRow:
    """A request in the simulated engine."""

    request: Request
    length: int  #: tokens of its answer
    tokens: int = 0  #: generated so far

    @property
    def context(self) -> int:
        return self.request.prompt_tokens + self.tokens


class SimulatedEngine:
    """Stands in for `Engine`; steps advance the clock by the time of `cost` x log-normal noise.

    Prefills and decode steps alternate as in `Engine`.
    """

    def __init__(
        self,
        cost: CostToTime,
        clock: VirtualClock,
        *,
        max_rows: int = 8,
        noise: float = 0.0,
        seed: int = 0,
        lengths: dict[str, int] | None = None,
    ) -> None:
        """lengths: tokens of each answer by request id; default: max_new_tokens."""
        self.cost, self.clock, self.max_rows, self.noise = cost, clock, max_rows, noise
        self.lengths = {} if lengths is None else lengths
        self.timing: StepTiming | None = None
        self.slowdown = 1.0
        self._random = np.random.default_rng(seed)
        self._waiting: list[_SimulatedRow] = []
        self._rows: list[_SimulatedRow] = []
        self._cancelled: set[str] = set()
        self._prefill_next = True

    @property
    def active(self) -> int:
        """As `Engine.active`."""
        return len(self._waiting) + len(self._rows)

    @property
    def stats(self) -> EngineStats:
        """All zero: the simulation counts nothing."""
        return EngineStats(**dict.fromkeys((field.name for field in fields(EngineStats)), 0))

    def can_start(self, request: Request) -> bool:
        """Whether there is a free row."""
        return self.active < self.max_rows

    def fits(self, request: Request) -> bool:
        """Always: the simulated memory is unbounded."""
        return True

    def start(self, request: Request) -> None:
        """As `Engine.start`."""
        length = self.lengths.get(request.id, request.sampling.max_new_tokens)
        self._waiting.append(
            _SimulatedRow(request, max(1, min(length, request.sampling.max_new_tokens)))
        )

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`."""
        self._cancelled.add(request_id)

    def step(self) -> list[Event]:
        """As `Engine.step`, in virtual time."""
        events = [
            Event(row.request.id, (), "", "cancelled")
            for row in self._waiting + self._rows
            if row.request.id in self._cancelled
        ]
        for rows in (self._waiting, self._rows):
            rows[:] = [row for row in rows if row.request.id not in self._cancelled]
        self._cancelled.clear()
        self.timing = None
        if self._waiting and (self._prefill_next or not self._rows):
            self._prefill_next = False
            return events + self._prefill()
        if self._rows:
            self._prefill_next = True
            return events + self._decode()
        return events

    def _prefill(self) -> list[Event]:
        row = self._waiting.pop(0)
        tokens, units = row.request.prompt_tokens, row.request.units_on
        layers = round(float(self.cost.expected_layers(1, units)))
        seconds = self._take(self.cost.prefill(tokens, units))
        self.timing = StepTiming("prefill", 1, tokens, units, layers, tokens, seconds)
        self._rows.append(row)
        return [self._advance(row)]

    def _decode(self) -> list[Event]:
        rows, units = len(self._rows), sum(row.request.units_on for row in self._rows)
        context = sum(row.context for row in self._rows)
        layers = self.cost.expected_layers(rows, units)
        seconds = self._take(self.cost.decode(rows, units, context, layers))
        self.timing = StepTiming("decode", rows, 0, units, round(layers), context, seconds)
        return [self._advance(row) for row in list(self._rows)]

    def _take(self, seconds: float) -> float:
        """Advance the clock by a noisy time; returns it."""
        seconds *= self.slowdown * float(np.exp(self.noise * self._random.standard_normal()))
        self.clock.now += seconds
        return seconds

    def _advance(self, row: _SimulatedRow) -> Event:
        row.tokens += 1
        if row.tokens < row.length:
            return Event(row.request.id, (5,), "")
        self._rows.remove(row)
        full = row.tokens == row.request.sampling.max_new_tokens
        return Event(row.request.id, (5,), "", "length" if full else "stop")


# --- Loads ----------------------------------------------------------------------------------


def constant(rate: float) -> Rate:
    """A constant rate in requests per second."""
    return lambda now: rate


def step(before: float, during: float, begin: float, end: float) -> Rate:
    """The rate `during` from `begin` to `end`, and `before` at other times."""
    return lambda now: during if begin <= now < end else before


def ramp(low: float, high: float, seconds: float) -> Rate:
    """A rate that rises from `low` to `high` at half of `seconds`, and falls again."""
    half = seconds / 2
    return lambda now: low + (high - low) * max(0.0, 1 - abs(now - half) / half)


def burst(rate: float, size: int, every: float) -> Rate:
    """`rate`, plus `size` requests within a tenth of a second, every `every` seconds."""
    return lambda now: rate + (10.0 * size if (now % every) < 0.1 and now >= every else 0.0)


def arrivals(
    rate: Rate, seconds: float, max_rate: float, random: np.random.Generator
) -> list[float]:
    """Times of a Poisson process, by thinning; max_rate: an upper bound of the rate."""
    times, now = [], 0.0
    while (now := now + random.exponential(1 / max_rate)) < seconds:
        if random.random() * max_rate < rate(now):
            times.append(now)
    return times


# --- Runs -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Outcome of one request; times in seconds from its arrival, NaN if it has none."""

    arrived_at: float
    caller: str = "a"
    first_token: float = float("nan")
    answer: float = float("nan")
    units_on: int = -1
    refused: str | None = None
    decision: Decision | None = None


@dataclass
class Report:
    """Outcomes of a simulation."""

    seconds: float
    target: float  #: p95 target in seconds
    of: Milestone  #: of the target
    outcomes: list[Outcome]  #: in the order of arrival
    #: (time, units of `auto`) at the start and whenever they change
    auto_units: list[tuple[float, int]] = field(default_factory=list)

    @property
    def times(self) -> np.ndarray:
        """Seconds to the target's milestone of every request; NaN if refused."""
        return np.array([getattr(outcome, self.of) for outcome in self.outcomes])

    @property
    def attained(self) -> float:
        """Share of all requests, refused ones included, within the target."""
        return float((self.times <= self.target).mean())

    @property
    def goodput(self) -> float:
        """Requests per second within the target."""
        return float((self.times <= self.target).sum()) / self.seconds

    @property
    def p95(self) -> float:
        """95th percentile of the requests not refused; infinite with too many unanswered ones."""
        times = self.times[[outcome.refused is None for outcome in self.outcomes]]
        return float(np.quantile(np.nan_to_num(times, nan=np.inf), 0.95, method="higher"))

    @property
    def shed(self) -> float:
        """Share of refused requests."""
        return float(np.mean([outcome.refused is not None for outcome in self.outcomes]))

    @property
    def mean_units(self) -> float:
        """Mean units of the admitted requests."""
        units = [outcome.units_on for outcome in self.outcomes if outcome.units_on >= 0]
        return float(np.mean(units))

    @property
    def direction_changes(self) -> int:
        """How often the units of `auto` change from falling to rising or back."""
        moves = np.sign(np.diff([units for _, units in self.auto_units]))
        return int((moves[1:] != moves[:-1]).sum()) if len(moves) else 0


@dataclass(frozen=True)
class Traffic:
    """Distribution of requests."""

    tokens: int = 600  #: mean prompt length; uniform within a quarter of it
    new_tokens: int = 32  #: mean answer length; uniform within a half of it
    max_new_tokens: int = 64
    budget: str | None = None  #: of all requests; None: `auto`
    callers: dict[str, float] = field(default_factory=lambda: {"a": 1.0})  #: shares by name


def simulate(
    times: list[float],
    traffic: Traffic,
    settings: WorkerSettings,
    *,
    truth: CostToTime | None = None,
    believed: CostToTime | None = None,
    budgets: Budgets | None = None,
    max_rows: int = 8,
    noise: float = 0.1,
    seed: int = 0,
    limits: dict[str, CallerLimits] | None = None,
    slowdown: Rate | None = None,
) -> Report:
    """Serve requests that arrive at `times` (open loop), until all of them are finished.

    Args:
        truth: true step times; default: `reference_cost()`.
        believed: cost model that the policy starts with; default: the truth.
        noise: standard deviation of the log of the step times.
        slowdown: factor on the step times over time.
    """
    budgets = reference_budgets() if budgets is None else budgets
    truth = reference_cost() if truth is None else truth
    believed = copy_of(truth) if believed is None else believed
    random = np.random.default_rng(seed)

    # The engine, the dispatcher, and the arrivals.
    clock, lengths = VirtualClock(), {}
    engine = SimulatedEngine(
        truth, clock, max_rows=max_rows, noise=noise, seed=seed, lengths=lengths
    )
    dispatcher = Dispatcher(engine, believed, budgets, settings, Limits(limits or {}), clock)
    coming = [(at, number) for number, at in enumerate(times)]
    heapq.heapify(coming)
    names = list(traffic.callers)
    shares = np.array(list(traffic.callers.values())) / sum(traffic.callers.values())
    outcomes = [Outcome(at, str(random.choice(names, p=shares))) for at in times]
    report = Report(
        times[-1] if times else 0.0, settings.p95_seconds, settings.p95_of,
        outcomes, [(0.0, dispatcher.controller.units_on)],
    )  # fmt: skip

    while coming or dispatcher.busy:
        # Skip idle time, submit what has arrived, and run one turn.
        if not dispatcher.busy:
            wake_at = clock.now + (dispatcher.wake_after or np.inf)
            clock.now = max(clock.now, min(coming[0][0], wake_at))
        while coming and coming[0][0] <= clock.now:
            at, number = heapq.heappop(coming)
            lengths[str(number)] = round(traffic.new_tokens * random.uniform(0.5, 1.5))
            ask = _ask(number, outcomes[number].caller, traffic, random)
            try:
                dispatcher.submit(ask, at)
            except Refused as refusal:
                outcomes[number].refused = refusal.code
        if slowdown is not None:
            engine.slowdown = slowdown(clock.now)
        for name, delivery in dispatcher.turn():
            _record(outcomes[int(name)], delivery, clock.now)
        if dispatcher.controller.units_on != report.auto_units[-1][1]:
            report.auto_units.append((clock.now, dispatcher.controller.units_on))
    return report


def _ask(number: int, caller: str, traffic: Traffic, random: np.random.Generator) -> Ask:
    tokens = max(1, round(traffic.tokens * random.uniform(0.75, 1.25)))
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long).expand(1, tokens)}
    sampling = Sampling(traffic.max_new_tokens)
    return Ask(str(number), caller, inputs, sampling=sampling, budget=traffic.budget)


def _record(outcome: Outcome, delivery: Decision | Event | Refused, now: float) -> None:
    if isinstance(delivery, Refused):
        outcome.refused = delivery.code
    elif isinstance(delivery, Decision):
        outcome.units_on, outcome.decision = delivery.units_on, delivery
    else:
        if delivery.tokens and np.isnan(outcome.first_token):
            outcome.first_token = now - outcome.arrived_at
        if delivery.finished in ("stop", "length"):
            outcome.answer = now - outcome.arrived_at


def reference_budgets() -> Budgets:
    """Budgets of a decoder of 32 layers, the upper 16 switchable (LLaVA-1.5-7B, design L)."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return Budgets(CostModel(config, SwitchLayout.layers(config)), extra=1)


def reference_cost() -> CostToTime:
    """Step times typical of a 7B model on one data-centre GPU (for simulations, not measured).

    With all units on, a prefill of 600 tokens takes 84 ms, a decode step 22 ms for one row and 24
    ms for eight.
    """
    layout = reference_budgets().cost.layout
    layer = 4.0e-6  # seconds per token and layer of a prefill
    prefill = (3e-3, 16 * layer, 3e-9, layer, 2e-10, 0.0)
    decode = (1.5e-3, 6.2e-4, 8e-5, 6e-6, 1.2e-8, 0.0)
    return CostToTime.from_coefficients(layout, prefill, decode)


def copy_of(cost: CostToTime, factor: float = 1.0) -> CostToTime:
    """Return a copy of a cost model with all times multiplied by `factor`."""
    prefill, decode = cost.coefficients
    return CostToTime.from_coefficients(
        cost.layout, [factor * c for c in prefill], [factor * c for c in decode]
    )


def capacity(traffic: Traffic, *, seed: int = 0, requests: int = 400, **options: object) -> float:
    """Requests per second at saturation, when all of them arrive at once."""
    settings = WorkerSettings(3600.0, max_queue=requests, shed=False, controller=False)
    report = simulate([0.0] * requests, traffic, settings, seed=seed, **options)
    return requests / max(outcome.answer for outcome in report.outcomes)


def main() -> None:
    """Print attainment, goodput and units for constant loads and for step, ramp and burst."""
    full = capacity(replace(Traffic(), budget="1"))
    target, seconds = 3.0, 300.0
    print(f"capacity at b = 1: {full:.2f} requests/s; p95 target of the first token {target} s")
    loads: dict[str, tuple[Rate, float]] = {
        f"{x:g} x": (constant(x * full), x) for x in (0.5, 0.9, 1.2, 1.5, 2, 3)
    }
    loads["step 0.6-1.5-0.6"] = (step(0.6 * full, 1.5 * full, 100, 200), 1.5)
    loads["ramp 0.3-1.5-0.3"] = (ramp(0.3 * full, 1.5 * full, seconds), 1.5)
    loads["bursts of 24 on 0.6"] = (burst(0.6 * full, 24, 20.0), 0.6 + 240 / full)
    fixed = WorkerSettings(target, shed=False, controller=False, max_queue=100_000)
    policies = {
        "b = 1": (Traffic(budget="1"), fixed),
        "b = 0.6": (Traffic(budget="0.6"), fixed),
        "auto": (Traffic(), WorkerSettings(target)),
    }
    print(f"{'load':20} {'policy':8} within  p95 s  goodput  shed  units  changes")
    for name, (rate, max_load) in loads.items():
        times = arrivals(rate, seconds, max_load * full, np.random.default_rng(1))
        for policy, (traffic, settings) in policies.items():
            report = simulate(times, traffic, settings)
            print(
                f"{name:20} {policy:8} {report.attained:6.3f} {report.p95:6.2f} "
                f"{report.goodput:8.2f} {report.shed:5.3f} {report.mean_units:6.2f} "
                f"{report.direction_changes:8d}"
            )


if __name__ == "__main__":
    main()
