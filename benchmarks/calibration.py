"""Accuracy of predicted times on this machine: steps, first tokens, complete answers, deadlines.

    python benchmarks/calibration.py [--seconds 20] [--requests 60] [--load 0.7]

Calibrates the engine on a decoder of over 100 M parameters, then sends requests through the worker
at a Poisson load, given as a share of the full-budget capacity that the calibration predicts. A
third of the requests have a deadline for the first token, a third a deadline for the complete
answer, a third a budget. Prints the cross-validated error of the calibration, the error of
predicted first tokens and answers against the measured ones (bar: a median of 15 %), and how many
deadlines were promised, met and missed.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import numpy as np
import torch
from skip import stock_model

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.engine.calibration import CostToTime, calibrate
from fmray.engine.engine import Engine
from fmray.engine.policy import Ask, Budgets, Decision, Refused
from fmray.engine.requests import Event, Sampling
from fmray.engine.worker import EngineWorker, WorkerSettings

BAR = 0.15


class Listener:
    """Records the decision and the events of one request, with their times."""

    def __init__(self) -> None:
        self.submitted = time.monotonic()
        self.decision: Decision | None = None
        self.first = self.end = float("nan")
        self.refused: Refused | None = None
        self.over = threading.Event()

    def __call__(self, delivery: Decision | Event | Refused) -> None:
        now = time.monotonic() - self.submitted
        if isinstance(delivery, Decision):
            self.decision = delivery
        elif isinstance(delivery, Refused):
            self.refused = delivery
            self.over.set()
        else:
            if np.isnan(self.first):
                self.first = now
            if delivery.finished is not None:
                self.end = now
                self.over.set()


def ask(number: int, cost: CostToTime, random: np.random.Generator) -> Ask:
    """Return request `number`: one in three each has a deadline for the first token, a deadline for
    the answer, or a budget."""
    tokens, new_tokens = int(random.integers(20, 300)), int(random.integers(4, 24))
    inputs = {"input_ids": torch.from_numpy(random.integers(4, 1000, (1, tokens)))}
    options: dict[str, object] = {}
    if number % 3 == 0:
        alone = float(cost.prefill(tokens, cost.layout.num_units))
        options = {"deadline_ms": 1000 * alone * float(random.uniform(0.8, 4))}
    elif number % 3 == 1:
        alone = float(cost.answer(tokens, cost.layout.num_units, new_tokens))
        options = {"deadline_ms": 1000 * alone * float(random.uniform(0.8, 4))}
        options["deadline_of"] = "answer"
    else:
        options = {"budget": str(random.choice(["0.5", "0.6", "0.75", "0.9", "1"]))}
        options["deadline_of"] = "answer" if number % 2 else "first_token"
    return Ask(str(number), "bench", inputs, sampling=Sampling(new_tokens), **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the calibration")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity at b = 1")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = stock_model(device, torch.bfloat16 if device == "cuda" else torch.float32)
    model = AdaptiveVLM.from_base(base, SwitchLayout.layers(base.config))
    engine = Engine(model, None, max_rows=options.rows, eos=())
    begin = time.monotonic()
    cost = calibrate(engine, model, seconds=options.seconds, longest=320)
    error = cost.error
    print(f"calibrated in {time.monotonic() - begin:.0f} s on {cost.machine}")
    print(f"  error, cross-validated: prefill {error.prefill:.1%}, decode step {error.decode:.1%}")
    for tokens in (64, 300):
        prefill = [1000 * float(cost.prefill(tokens, units)) for units in (0, 8)]
        print(f"  prefill of {tokens}: {prefill[0]:.0f} ms with no unit on, {prefill[1]:.0f} all")
    for rows in (1, options.rows):
        step = [1000 * float(cost.decode(rows, units * rows, 150 * rows)) for units in (0, 8)]
        print(f"  decode step of {rows}: {step[0]:.1f} ms with no unit on, {step[1]:.1f} all")

    random = np.random.default_rng(options.seed)
    rate = options.load / float(cost.answer(160, model.layout.num_units, 14, options.rows))
    requests: list[tuple[Ask, Listener]] = []
    settings = WorkerSettings(3600.0, shed=False, controller=False)
    with EngineWorker(engine, cost, Budgets.of(model), settings) as worker:
        for number in range(options.requests):
            request, listener = ask(number, cost, random), Listener()
            requests.append((request, listener))
            worker.submit(request, listener)
            time.sleep(float(random.exponential(1 / rate)))
        for _, listener in requests:
            listener.over.wait()
        stats = worker.stats()
    report(requests)
    print(
        f"live error of single steps: prefill {stats.calibration_error[0]:.1%}, "
        f"decode {stats.calibration_error[1]:.1%}; speed against calibration "
        f"{stats.speed[0]:.2f}, {stats.speed[1]:.2f}; mean budget {stats.mean_budget:.2f}"
    )


def report(requests: list[tuple[Ask, Listener]]) -> None:
    """Print predicted against measured times, and how many deadlines were met."""
    all_errors = []
    for of, name in (("first_token", "first token"), ("answer", "answer"), ("", "both")):
        pairs = [
            (
                heard.decision.predicted_ms,
                1000 * (heard.first if of == "first_token" else heard.end),
            )
            for request, heard in requests
            if heard.decision is not None and request.deadline_of == of
        ]
        errors = [abs(predicted - measured) / measured for predicted, measured in pairs]
        all_errors += errors
        errors = errors if of else all_errors
        if not errors:
            continue
        median = statistics.median(errors)
        print(
            f"{name}: median error {median:.1%} over {len(errors)} "
            f"({'met' if median <= BAR else 'MISSED'}: bar {BAR:.0%}), "
            f"90th percentile {float(np.quantile(errors, 0.9)):.1%}"
        )
    promised = met = missed = unpromised = 0
    for request, heard in requests:
        if request.deadline_ms is None or heard.decision is None:
            continue
        measured = 1000 * (heard.first if request.deadline_of == "first_token" else heard.end)
        in_time = measured <= request.deadline_ms
        promised += bool(heard.decision.deadline_met)
        met += bool(heard.decision.deadline_met) and in_time
        missed += bool(heard.decision.deadline_met) and not in_time
        unpromised += not heard.decision.deadline_met
    print(
        f"deadlines: {promised} promised, of which {met} met and {missed} missed; "
        f"{unpromised} predicted to be missed"
    )


if __name__ == "__main__":
    main()
