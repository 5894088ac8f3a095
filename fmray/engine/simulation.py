"""The policy and the controller under load, in virtual time: a discrete-event simulation.

In: an arrival rate over time (step, ramp, burst), the times that steps really take, a seed. Out:
what every request met, and the level of `auto` over time. It runs `Dispatcher` itself, the code
that serves, on an engine whose steps take time on a virtual clock and compute nothing.

    python -m fmray.engine.simulation        prints the table of loads and policies
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
from fmray.engine.requests import EngineStats, Event, Request, Sampling, StepTiming

Rate = Callable[[float], float]


class VirtualClock:
    """Seconds since the start; moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class _Answering:
    """A request in the simulated engine; length: tokens after which it ends."""

    request: Request
    length: int
    done: int = 0


class SimulatedEngine:
    """The doors of `Engine`; steps move the clock by what `cost` says times log-normal noise.

    lengths: request id -> tokens of its answer (default: all it may have). Prefill and decode take
    turns as in `Engine`.
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
        self.cost, self.clock, self.max_rows, self.noise = cost, clock, max_rows, noise
        self.lengths = {} if lengths is None else lengths
        self.timing: StepTiming | None = None
        self.slowdown = 1.0
        self._random = np.random.default_rng(seed)
        self._waiting: list[_Answering] = []
        self._rows: list[_Answering] = []
        self._cancelled: set[str] = set()
        self._prefill_next = True

    @property
    def active(self) -> int:
        return len(self._waiting) + len(self._rows)

    @property
    def stats(self) -> EngineStats:
        """Nothing is counted here."""
        return EngineStats(**dict.fromkeys((field.name for field in fields(EngineStats)), 0))

    def can_start(self, request: Request) -> bool:
        return self.active < self.max_rows

    def fits(self, request: Request) -> bool:
        return True

    def start(self, request: Request) -> None:
        length = self.lengths.get(request.id, request.sampling.max_new_tokens)
        self._waiting.append(
            _Answering(request, max(1, min(length, request.sampling.max_new_tokens)))
        )

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def step(self) -> list[Event]:
        events = [
            Event(one.request.id, (), "", "cancelled")
            for one in self._waiting + self._rows
            if one.request.id in self._cancelled
        ]
        for part in (self._waiting, self._rows):
            part[:] = [one for one in part if one.request.id not in self._cancelled]
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
        one = self._waiting.pop(0)
        tokens, units = one.request.prompt_tokens, one.request.units_on
        layers = round(float(self.cost.expected_layers(1, units)))
        seconds = self._take(self.cost.prefill(tokens, units))
        self.timing = StepTiming("prefill", 1, tokens, units, layers, tokens, seconds)
        self._rows.append(one)
        return [self._advance(one)]

    def _decode(self) -> list[Event]:
        rows, units = len(self._rows), sum(one.request.units_on for one in self._rows)
        context = sum(one.request.prompt_tokens + one.done for one in self._rows)
        layers = self.cost.expected_layers(rows, units)
        seconds = self._take(self.cost.decode(rows, units, context, layers))
        self.timing = StepTiming("decode", rows, 0, units, round(layers), context, seconds)
        return [self._advance(one) for one in list(self._rows)]

    def _take(self, seconds: float) -> float:
        seconds *= self.slowdown * float(np.exp(self.noise * self._random.standard_normal()))
        self.clock.now += seconds
        return seconds

    def _advance(self, one: _Answering) -> Event:
        one.done += 1
        if one.done < one.length:
            return Event(one.request.id, (5,), "")
        self._rows.remove(one)
        full = one.done == one.request.sampling.max_new_tokens
        return Event(one.request.id, (5,), "", "length" if full else "stop")


# -- loads ---------------------------------------------------------------------------------


def constant(rate: float) -> Rate:
    """Requests a second, always the same."""
    return lambda now: rate


def step(before: float, during: float, begin: float, end: float) -> Rate:
    """`before`, then `during` from `begin` to `end`, then `before` again."""
    return lambda now: during if begin <= now < end else before


def ramp(low: float, high: float, seconds: float) -> Rate:
    """From `low` up to `high` at half of `seconds`, and down again."""
    half = seconds / 2
    return lambda now: low + (high - low) * max(0.0, 1 - abs(now - half) / half)


def burst(rate: float, size: int, every: float) -> Rate:
    """`rate`, and `size` requests more within a tenth of a second, `every` so many seconds."""
    return lambda now: rate + (10.0 * size if (now % every) < 0.1 and now >= every else 0.0)


def arrivals(rate: Rate, seconds: float, most: float, random: np.random.Generator) -> list[float]:
    """Times of a Poisson process of that rate, by thinning; most: rate it never exceeds."""
    times, now = [], 0.0
    while (now := now + random.exponential(1 / most)) < seconds:
        if random.random() * most < rate(now):
            times.append(now)
    return times


# -- runs ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one request met; times in seconds from its submission, NaN if there was none."""

    at: float
    caller: str = "a"
    first_token: float = float("nan")
    answer: float = float("nan")
    units_on: int = -1
    refused: str | None = None
    decision: Decision | None = None


@dataclass
class Report:
    """All outcomes in the order of arrival; levels: (time, switches) whenever it changed."""

    seconds: float
    num_units: int
    target: float
    of: str
    outcomes: list[Outcome]
    levels: list[tuple[float, int]] = field(default_factory=list)

    def _times(self) -> np.ndarray:
        return np.array([getattr(one, self.of) for one in self.outcomes])

    @property
    def attained(self) -> float:
        """Share of all requests, those refused included, that were within the target."""
        return float((self._times() <= self.target).mean())

    @property
    def attained_admitted(self) -> float:
        """The same share of those not refused."""
        times = self._times()[[one.refused is None for one in self.outcomes]]
        return float((times <= self.target).mean())

    @property
    def goodput(self) -> float:
        """Requests a second that were within the target."""
        return float((self._times() <= self.target).sum()) / self.seconds

    @property
    def p95(self) -> float:
        """Of those that were not refused (infinite if some never came)."""
        times = self._times()[[one.refused is None for one in self.outcomes]]
        return float(np.quantile(np.nan_to_num(times, nan=np.inf), 0.95, method="higher"))

    @property
    def shed(self) -> float:
        """Share refused."""
        return float(np.mean([one.refused is not None for one in self.outcomes]))

    @property
    def mean_units(self) -> float:
        """Of the admitted."""
        return float(np.mean([one.units_on for one in self.outcomes if one.units_on >= 0]))

    @property
    def direction_changes(self) -> int:
        """How often the level turned from falling to rising or back."""
        moves = np.sign(np.diff([level for _, level in self.levels]))
        return int((moves[1:] != moves[:-1]).sum()) if len(moves) else 0


@dataclass(frozen=True)
class Traffic:
    """What requests are like: prompts of about `tokens` (uniform within a quarter), answers of
    about `new_tokens` (uniform within a half) of at most `max_new_tokens`. budget: of all of them;
    None: `auto`. callers: shares of the traffic by name."""

    tokens: int = 600
    new_tokens: int = 32
    max_new_tokens: int = 64
    budget: str | None = None
    callers: dict[str, float] = field(default_factory=lambda: {"a": 1.0})


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
    """Requests arrive at `times` (open loop), are served, and the run ends when all are done.

    truth: times that steps take (default: `reference_cost()`), noise: their log-normal spread;
    slowdown: a factor on them over time; believed: what the policy starts from (default: the
    truth).
    """
    budgets = reference_budgets() if budgets is None else budgets
    truth = reference_cost() if truth is None else truth
    believed = copy_of(truth) if believed is None else believed
    random = np.random.default_rng(seed)
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
        times[-1] if times else 0.0, budgets.num_units, settings.p95_seconds, settings.p95_of,
        outcomes, [(0.0, dispatcher.controller.level)],
    )  # fmt: skip
    while coming or dispatcher.busy:
        if not dispatcher.busy:
            rest = dispatcher.rest
            clock.now = max(clock.now, min(coming[0][0], clock.now + (rest or np.inf)))
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
            _note(outcomes[int(name)], delivery, clock.now)
        if dispatcher.controller.level != report.levels[-1][1]:
            report.levels.append((clock.now, dispatcher.controller.level))
    return report


def _ask(number: int, caller: str, traffic: Traffic, random: np.random.Generator) -> Ask:
    tokens = max(1, round(traffic.tokens * random.uniform(0.75, 1.25)))
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long).expand(1, tokens)}
    sampling = Sampling(traffic.max_new_tokens)
    return Ask(str(number), caller, inputs, sampling=sampling, budget=traffic.budget)


def _note(outcome: Outcome, delivery: Decision | Event | Refused, now: float) -> None:
    if isinstance(delivery, Refused):
        outcome.refused = delivery.code
    elif isinstance(delivery, Decision):
        outcome.units_on, outcome.decision = delivery.units_on, delivery
    else:
        if delivery.tokens and np.isnan(outcome.first_token):
            outcome.first_token = now - outcome.at
        if delivery.finished in ("stop", "length"):
            outcome.answer = now - outcome.at


def reference_budgets() -> Budgets:
    """Of a decoder of 32 layers, the upper 16 switchable (LLaVA-1.5-7B, design L)."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return Budgets(CostModel(config, SwitchLayout.layers(config)), extra=1)


def reference_cost() -> CostToTime:
    """Times of the size of a 7B model on one data-centre GPU (for simulations; not a measurement):
    a prefill of 600 tokens 84 ms, a decode step 22 ms for one row and 24 ms for eight, all on."""
    layout = reference_budgets().cost.layout
    layer = 4.0e-6  # seconds per token and layer of a prefill
    prefill = (3e-3, 16 * layer, 3e-9, layer, 2e-10, 0.0)
    decode = (1.5e-3, 6.2e-4, 8e-5, 6e-6, 1.2e-8, 0.0)
    return CostToTime.from_coefficients(layout, prefill, decode)


def copy_of(cost: CostToTime, factor: float = 1.0) -> CostToTime:
    """The same times, times `factor`, to be learnt on."""
    prefill, decode = cost.coefficients
    return CostToTime.from_coefficients(
        cost.layout, [factor * c for c in prefill], [factor * c for c in decode]
    )


def capacity(traffic: Traffic, *, seed: int = 0, requests: int = 400, **options: object) -> float:
    """Requests a second at saturation: all of them there at once."""
    settings = WorkerSettings(3600.0, max_queue=requests, shed=False, controller=False)
    report = simulate([0.0] * requests, traffic, settings, seed=seed, **options)
    return requests / max(one.answer for one in report.outcomes)


def main() -> None:
    """Print attainment, goodput and levels for constant loads and for step, ramp and burst."""
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
    for name, (rate, most) in loads.items():
        times = arrivals(rate, seconds, most * full, np.random.default_rng(1))
        for policy, (traffic, settings) in policies.items():
            report = simulate(times, traffic, settings)
            print(
                f"{name:20} {policy:8} {report.attained:6.3f} {report.p95:6.2f} "
                f"{report.goodput:8.2f} {report.shed:5.3f} {report.mean_units:6.2f} "
                f"{report.direction_changes:8d}"
            )


if __name__ == "__main__":
    main()
