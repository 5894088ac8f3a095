"""Prometheus metrics of one replica and of all replicas.

The proxy sends a scrape to one replica only. With several replicas, each publishes its metric
families to a `MetricsBoard` every few seconds, and the one that is scraped responds for all of
them. Every sample has the label `replica`.
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
    from fmray.engine.requests import EngineStats, Result
    from fmray.engine.stats import WorkerStats
    from fmray.engine.worker import EngineWorker
    from fmray.serve.openai import ApiError, Fmray

_BUDGETS = tuple(tenths / 20 for tenths in range(1, 21))
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)
STALE_SECONDS = 30.0  # a replica that has not published for this long is dropped


class Metrics:
    """The metrics of one replica."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, worker: EngineWorker, replica: str, units: int) -> None:
        """Create the metrics of a model with `units` (K) units.

        `fmray_units_on` has a bucket for each number of units, up to about 32 buckets.
        """
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        step = max(1, math.ceil(units / 32))
        histogram = functools.partial(Histogram, registry=registry)
        counter = functools.partial(Counter, registry=registry)
        self._budget = histogram("fmray_budget", "Budget of answered requests", buckets=_BUDGETS)
        self._units = histogram(
            "fmray_units_on",
            "Units on in answered requests",
            buckets=[*range(0, units, step), units],
        )
        self._first_token_seconds = histogram(
            "fmray_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
        )
        self._answer_seconds = histogram(
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
            "Answers by whether their image features came from the cache",
            ["hit"],
        )
        registry.register(_WorkerFamilies(worker))

    def record_answer(self, cost: Fmray, result: Result) -> None:
        """Count one answer."""
        self._budget.observe(cost.budget)
        self._units.observe(cost.units_on)
        if cost.first_token_ms is not None:
            self._first_token_seconds.observe(cost.first_token_ms / 1e3)
        seconds = cost.answer_ms / 1e3
        self._answer_seconds.observe(seconds)
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

    def record_error(self, error: ApiError) -> None:
        """Count one error response."""
        self._errors.labels(str(error.status), error.code or "other").inc()

    def families(self) -> list[Metric]:
        """Return all metric families, each sample labelled with this replica's name."""
        families = []
        for metric in self._registry.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self._replica})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            families.append(metric)
        return families

    def exposition(self) -> bytes:
        """Return this replica's metrics in Prometheus' text format."""
        return render([self.families()])


class _WorkerFamilies(Collector):
    """Families of the worker's statistics, read at each scrape."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Yield the families of load, waiting times, predictions, memory and caches."""
        stats = self._worker.stats()
        yield from _load_families(stats)
        yield from _time_families(stats)
        if stats.engine is not None:
            yield from _engine_families(stats.engine)


def _load_families(stats: WorkerStats) -> Iterator[Metric]:
    """Yield the families of queue, batch, load control and results."""
    yield _gauge("fmray_queue_requests", "Requests waiting for the engine", stats.queued)
    yield _gauge("fmray_active_rows", "Requests in the engine", stats.active)
    yield _gauge("fmray_auto_budget", "Budget that `auto` requests get now", stats.auto_budget)
    yield _gauge("fmray_auto_units", "Units on that `auto` requests get now", stats.auto_units)
    yield _gauge("fmray_draining", "1 while the replica finishes its last answers", stats.draining)
    for name, text, label, counts in (
        ("fmray_refused", "Requests that the policy refused", "code", stats.refused),
        (
            "fmray_finished",
            "Requests by how they ended, health checks included",
            "reason",
            stats.finished,
        ),
    ):
        family = CounterMetricFamily(name, text, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        yield family
    text = "Tokens generated, health checks included"
    yield CounterMetricFamily("fmray_engine_tokens", text, value=stats.tokens_out)


def _time_families(stats: WorkerStats) -> Iterator[Metric]:
    """Yield the waiting time and the errors of predicted times."""
    queue = stats.queue_seconds
    total, buckets = 0, []
    for bound, count in zip((*queue.bounds, math.inf), queue.counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(bound) else str(bound), total))
    yield HistogramMetricFamily(
        "fmray_queue_seconds", "Wait before the engine", buckets=buckets, sum_value=queue.sum
    )
    errors = GaugeMetricFamily(
        "fmray_prediction_error", "Median relative error of predicted times", labels=["of"]
    )
    errors.add_metric(["first_token"], stats.first_token_error)
    errors.add_metric(["answer"], stats.answer_error)
    errors.add_metric(["prefill_step"], stats.calibration_error[0])
    errors.add_metric(["decode_step"], stats.calibration_error[1])
    yield errors


def _engine_families(stats: EngineStats) -> Iterator[Metric]:
    """Yield the families of memory, caches and steps of the engine."""
    for name, text, value in (
        ("kv_bytes", "Keys and values in memory", stats.kv_bytes),
        ("kv_reserved_bytes", "Keys and values reserved for rows", stats.kv_reserved),
        ("kv_bound_bytes", "Upper bound on keys and values", stats.kv_bound),
        ("vision_cache_bytes", "Cached image features", stats.vision_bytes),
        ("prefix_cache_bytes", "Cached prompt prefixes", stats.prefix_bytes),
    ):
        yield _gauge(f"fmray_{name}", text, value)
    for name, text, value in (
        ("vision_cache_hits", "Images whose features came from the cache", stats.vision_hits),
        ("vision_cache_misses", "Images whose features were computed", stats.vision_misses),
        ("prefix_cache_hits", "Prompts with a cached prefix", stats.prefix_hits),
        ("prefix_cache_misses", "Prompts without a cached prefix", stats.prefix_misses),
        ("decode_steps", "Decode steps", stats.decode_steps),
        ("prefill_steps", "Prefill steps", stats.prefill_steps),
    ):
        yield CounterMetricFamily(f"fmray_{name}", text, value=value)


class MetricsBoard:
    """The latest metric families of every replica. Runs as a deployment of its own."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, list[Metric]]] = {}

    def publish(self, replica: str, families: list[Metric]) -> list[list[Metric]]:
        """Store one replica's families and return those of all live replicas."""
        now = time.monotonic()
        self._latest[replica] = (now, families)
        self._latest = {
            name: entry for name, entry in self._latest.items() if now - entry[0] <= STALE_SECONDS
        }
        return [entry[1] for entry in self._latest.values()]


def render(replicas: Iterable[list[Metric]]) -> bytes:
    """Merge the families of several replicas and return them in Prometheus' text format."""
    merged: dict[str, Metric] = {}
    for families in replicas:
        for metric in families:
            family = merged.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type)
            )
            family.samples.extend(metric.samples)
    return generate_latest(_MergedFamilies(merged))


class _MergedFamilies:
    """The part of a registry that `generate_latest` uses."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families.values()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
