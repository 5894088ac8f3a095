"""Prometheus metrics of one replica, and those of all replicas on one page.

In: answers, refusals and the worker's own counters. Out: families in Prometheus' text format. A
scrape goes through the proxy to one replica only; with several, each hands its families to a
`Board` every few seconds, and whichever is asked answers for all. Every sample has the label
`replica`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from fmray.engine.requests import Result
    from fmray.engine.worker import EngineWorker
    from fmray.serve.openai import ApiError, Fmray

_BUDGETS = tuple(tenths / 20 for tenths in range(1, 21))
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)
STALE_SECONDS = 30.0  # a replica that has not published for so long is gone


class Metrics:
    """What one replica counts."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, worker: EngineWorker, replica: str, units: int) -> None:
        """units: K; `fmray_units_on` has a bucket for each number where there are few."""
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        step = max(1, math.ceil(units / 32))
        histogram = functools.partial(Histogram, registry=registry)
        counter = functools.partial(Counter, registry=registry)
        self._budget = histogram("fmray_budget", "Budget of answered requests", buckets=_BUDGETS)
        self._units = histogram(
            "fmray_units_on",
            "Switches on in answered requests",
            buckets=[*range(0, units, step), units],
        )
        self._first = histogram(
            "fmray_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
        )
        self._whole = histogram(
            "fmray_answer_seconds",
            "From a request's arrival to the end of its answer",
            buckets=_SECONDS,
        )
        self._rate = histogram(
            "fmray_tokens_per_second",
            "Tokens of an answer after its first, per second",
            buckets=_RATES,
        )
        self._tokens = counter("fmray_tokens", "Tokens of answered requests", ["kind"])
        self._deadlines = counter("fmray_deadlines", "Answers that had a deadline", ["met"])
        self._errors = counter(
            "fmray_errors", "Requests answered with an error", ["status", "code"]
        )
        self._vision = counter(
            "fmray_vision_cache_answers",
            "Answers by whether their pictures' features were at hand",
            ["hit"],
        )
        registry.register(_WorkerFamilies(worker))

    def answered(self, cost: Fmray, result: Result) -> None:
        """Count one answer."""
        self._budget.observe(cost.budget)
        self._units.observe(cost.units_on)
        if cost.first_token_ms is not None:
            self._first.observe(cost.first_token_ms / 1e3)
        seconds = cost.answer_ms / 1e3
        self._whole.observe(seconds)
        if cost.first_token_ms is not None and result.completion_tokens > 1:
            later = seconds - cost.first_token_ms / 1e3
            if later > 0:
                self._rate.observe((result.completion_tokens - 1) / later)
        self._tokens.labels("prompt").inc(result.prompt_tokens)
        self._tokens.labels("reused").inc(result.prefix_tokens)
        self._tokens.labels("completion").inc(result.completion_tokens)
        self._vision.labels(str(result.vision_hit).lower()).inc()
        if cost.deadline_met is not None:
            self._deadlines.labels(str(cost.deadline_met).lower()).inc()

    def refused(self, error: ApiError) -> None:
        """Count one error."""
        self._errors.labels(str(error.status), error.code or "other").inc()

    def families(self) -> list[Metric]:
        """All families as they are now, each sample with this replica's name."""
        found = []
        for metric in self._registry.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self._replica})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            found.append(metric)
        return found

    def exposition(self) -> bytes:
        """This replica's metrics in Prometheus' text format."""
        return render([self.families()])


class _WorkerFamilies(Collector):
    """The worker's snapshot, taken at each scrape."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Queue, batch, load control, caches, memory, calibration."""
        stats = self._worker.stats()
        yield _gauge("fmray_queue_requests", "Requests waiting for the engine", stats.queued)
        yield _gauge("fmray_active_rows", "Requests in the engine", stats.active)
        yield _gauge("fmray_auto_budget", "Share that `auto` gets now", stats.level_budget)
        yield _gauge("fmray_auto_units", "Switches that `auto` gets now", stats.level)
        yield _gauge(
            "fmray_draining", "1 while the replica lets its last answers finish", stats.draining
        )
        refused = CounterMetricFamily(
            "fmray_refused", "Requests that the policy refused", labels=["code"]
        )
        for code, count in stats.refused.items():
            refused.add_metric([code], count)
        yield refused
        finished = CounterMetricFamily(
            "fmray_finished", "Requests by how they ended, health checks too", labels=["reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield CounterMetricFamily(
            "fmray_engine_tokens", "Tokens generated, health checks too", value=stats.tokens_out
        )
        queue = stats.queue_seconds
        running, buckets = 0, []
        for bound, count in zip((*queue.bounds, math.inf), queue.counts, strict=True):
            running += count
            buckets.append(("+Inf" if math.isinf(bound) else str(bound), running))
        yield HistogramMetricFamily(
            "fmray_queue_seconds", "Wait before the engine", buckets=buckets, sum_value=queue.sum
        )
        errors = GaugeMetricFamily(
            "fmray_prediction_error",
            "Median relative error of predicted times",
            labels=["of"],
        )
        for name, value in (
            ("first_token", stats.first_token_error),
            ("answer", stats.answer_error),
            ("prefill_step", stats.calibration_error[0]),
            ("decode_step", stats.calibration_error[1]),
        ):
            errors.add_metric([name], value)
        yield errors
        engine = stats.engine
        if engine is None:
            return
        for name, text, value in (
            ("fmray_kv_bytes", "Keys and values held", engine.kv_bytes),
            ("fmray_kv_reserved_bytes", "Keys and values promised to rows", engine.kv_reserved),
            ("fmray_kv_bound_bytes", "The most that keys and values may take", engine.kv_bound),
            ("fmray_vision_cache_bytes", "Picture features held", engine.vision_bytes),
            ("fmray_prefix_cache_bytes", "Prompt beginnings held", engine.prefix_bytes),
        ):
            yield _gauge(name, text, value)
        for name, text, value in (
            ("fmray_vision_cache_hits", "Pictures whose features were at hand", engine.vision_hits),
            ("fmray_vision_cache_misses", "Pictures computed", engine.vision_misses),
            ("fmray_prefix_cache_hits", "Prompts with a known beginning", engine.prefix_hits),
            ("fmray_prefix_cache_misses", "Prompts without one", engine.prefix_misses),
            ("fmray_decode_steps", "Decode steps", engine.decode_steps),
            ("fmray_prefill_steps", "Prefill steps", engine.prefill_steps),
        ):
            yield CounterMetricFamily(name, text, value=value)


class Board:
    """The latest families of every replica; one actor beside them."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, list[Metric]]] = {}

    def publish(self, replica: str, families: list[Metric]) -> list[list[Metric]]:
        """Keep one replica's families; returns those of all replicas that are there."""
        now = time.monotonic()
        self._latest[replica] = (now, families)
        self._latest = {
            name: entry for name, entry in self._latest.items() if now - entry[0] <= STALE_SECONDS
        }
        return [entry[1] for entry in self._latest.values()]


def render(replicas: Iterable[list[Metric]]) -> bytes:
    """Families of several replicas, each family once, in Prometheus' text format."""
    merged: dict[str, Metric] = {}
    for families in replicas:
        for metric in families:
            kept = merged.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type)
            )
            kept.samples.extend(metric.samples)
    return generate_latest(_Collected(merged))


class _Collected:
    """What `generate_latest` takes for a registry."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families.values()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
