"""Task selection against recomputation at every step, and the memory of streamed moments.

    python benchmarks/selection.py [--tasks 1000] [--dimension 768] [--rows 64] [--every 50]
    python benchmarks/selection.py --stream 1000000 [--tasks 1000] [--dimension 768]

Selection: our side is `TaskMoments.of` for each task and `select_tasks` with the complete coverage
curve. The peers run the same algorithm but recompute the statistics and the inverse of the mixture
at each step: from the features of all tasks so far (scikit-learn's OAS), or from the stored mean
and scatter of each. Only every 50th step of a peer is timed and the sum over all steps estimated
from these (they lie in the middle of their intervals, and the time grows evenly); `--every 1` times
all steps and also compares the selected tasks. Coverage must agree at each timed step.

`--stream` passes that many features, shuffled over all tasks; it prints the resident memory
meanwhile, and the time without that of drawing the features.

Times are CPU times of this process, so that other programs do not count; with OMP_NUM_THREADS=1
they equal wall time on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.covariance import OAS

from fmray.selection import MomentStream, Selection, TaskMoments, select_tasks

THRESHOLD = 0.0005  # coverage grows slowly over many tasks
BAR = 20.0
BLOCK = 8192  # features a call, `--stream`


def draw_tasks(tasks: int, rows: int, dimension: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Features of a target and of tasks around it, [rows, d] each."""
    generator = np.random.default_rng(0)
    scales = 1 / np.sqrt(1 + np.arange(dimension))
    center = 4 * scales * generator.normal(size=dimension)

    def draw(shift: float) -> np.ndarray:
        mean = center + shift * generator.normal(size=dimension) * scales
        values = mean + generator.normal(size=(rows, dimension)) * scales
        return values.astype(np.float32)

    return draw(0.0), [draw(0.3) for _ in range(tasks)]


def from_features(target: np.ndarray, tasks: list[np.ndarray]) -> float:
    """Coverage of the mixture of tasks (all have as many rows), from their features."""
    pooled = np.concatenate(tasks).astype(np.float64)
    difference = pooled.mean(axis=0) - target.astype(np.float64).mean(axis=0)
    return 1 / (difference @ np.linalg.inv(OAS().fit(pooled).covariance_) @ difference)


def from_statistics(target: TaskMoments, tasks: list[TaskMoments]) -> float:
    """The same from the mean and scatter of each task: a new mixture, and its inverse."""
    count, d = sum(task.count for task in tasks), len(target.mean)
    means = np.array([task.mean for task in tasks])
    apart = means - means.mean(axis=0)
    covariance = np.zeros((d, d))
    for task in tasks:
        covariance += task.scatter / task.count
    covariance = (covariance + apart.T @ apart) / len(tasks)
    variance, square = np.trace(covariance) / d, (covariance**2).sum()
    shrinkage = (square + (d * variance) ** 2) / ((count + 1) * (square - d * variance**2))
    shrunk = (1 - min(1, shrinkage)) * covariance + min(1, shrinkage) * variance * np.eye(d)
    difference = means.mean(axis=0) - target.mean
    return 1 / (difference @ np.linalg.inv(shrunk) @ difference)


def run_peer(
    name: str, cover: Callable[[int], float], ours: Selection, seconds: float, every: int
) -> None:
    """Time `cover` (coverage of the first k tasks) at every `every`-th k; print the ratio to ours.

    seconds: that ours took over all steps.
    """
    steps = range(1 + every // 2, len(ours.order) + 1, every)
    times, curve = [], []
    for count in steps:
        begun = time.process_time()
        curve.append(cover(count))
        times.append(time.process_time() - begun)
    whole = float(np.mean(times)) * len(ours.order)
    expected = [ours.coverage[count - 1] for count in steps]
    error = np.max(np.abs(np.array(curve) / expected - 1))
    assert error < 1e-8, f"{name}: coverage differs by {error:.1e}"
    same = ""
    if every == 1:
        chosen = 1
        while chosen < len(curve) and curve[chosen] >= (1 + THRESHOLD) * curve[chosen - 1]:
            chosen += 1
        assert chosen == len(ours.names), f"{name}: selects {chosen} tasks"
        same = f", the same {chosen} tasks"
    ratio = whole / seconds
    about = "" if every == 1 else f" (estimated from {len(times)} steps)"
    print(
        f"{name:40s} {whole:8.1f} s{about} / ours {seconds:.1f} s = {ratio:.1f}"
        f"   bar {BAR:g}: {'met' if ratio >= BAR else 'MISSED'}"
        f"   coverage within {error:.1e}{same}",
        flush=True,
    )


def compare_selection(options: argparse.Namespace) -> None:
    """Print our time and both ratios."""
    target, tasks = draw_tasks(options.tasks, options.rows, options.dimension)
    begun = time.process_time()
    zero = TaskMoments.of("target", target)
    moments = [TaskMoments.of(f"{number:05d}", task) for number, task in enumerate(tasks)]
    measuring = time.process_time() - begun
    begun = time.process_time()
    ours = select_tasks(zero, moments, THRESHOLD)
    selecting = time.process_time() - begun
    print(
        f"{options.tasks} tasks x {options.rows} rows x {options.dimension}: moments"
        f" {measuring:.1f} s, selection {selecting:.1f} s"
        f" ({1e3 * selecting / options.tasks:.1f} ms a step), {len(ours.names)} tasks selected",
        flush=True,
    )
    ordered = [int(name) for name in ours.order]
    run_peer(
        "recomputed from mean and scatter",
        lambda count: from_statistics(zero, [moments[i] for i in ordered[:count]]),
        ours,
        selecting,
        options.every,
    )
    run_peer(
        "recomputed from features",
        lambda count: from_features(target, [tasks[i] for i in ordered[:count]]),
        ours,
        measuring + selecting,
        options.every,
    )


def resident() -> float:
    """Resident memory of this process, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def stream_moments(options: argparse.Namespace) -> None:
    """Print memory and time as the features pass."""
    generator = np.random.default_rng(0)
    before = resident()
    stream = MomentStream([f"{i:05d}" for i in range(options.tasks)], options.dimension)
    passed, seconds = 0, 0.0
    parts = [options.stream * part // 10 for part in range(1, 11)]
    while passed < options.stream:
        rows = min(BLOCK, options.stream - passed)
        features = generator.standard_normal((rows, options.dimension), dtype=np.float32) + 1
        tasks = generator.integers(0, options.tasks, rows)
        begun = time.process_time()
        stream.add(tasks, features)
        seconds += time.process_time() - begun
        passed += rows
        if passed >= parts[0]:
            parts = [part for part in parts if part > passed]
            print(
                f"{passed:9d} features: {resident() - before:6.2f} GiB more than before,"
                f" {seconds:6.1f} s",
                flush=True,
            )
    begun = time.process_time()
    counts = [task.count for task in stream.moments()]
    seconds += time.process_time() - begun
    assert sum(counts) == options.stream
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    print(
        f"all {options.stream} features of {options.dimension} in {options.tasks} tasks:"
        f" {seconds:.1f} s, at most {peak:.2f} GiB; the scatters alone are"
        f" {8 * options.tasks * options.dimension**2 / 2**30:.2f} GiB, the features (float32)"
        f" would be {4 * options.stream * options.dimension / 2**30:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--rows", type=int, default=64, help="features of a task")
    parser.add_argument("--every", type=int, default=50, help="steps between those timed")
    parser.add_argument("--stream", type=int, metavar="FEATURES", help="measure memory instead")
    options = parser.parse_args()
    if options.stream:
        stream_moments(options)
    else:
        compare_selection(options)


if __name__ == "__main__":
    main()
