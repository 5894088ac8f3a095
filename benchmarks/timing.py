"""Paired timing in one process: A B, B A, A B, ...

Ratios are taken pair by pair, so that drift and the order within a pair cancel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of one call, including work queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    name: str,
    measured: Callable[[], object],
    peer: Callable[[], object],
    runs: int,
    bar: float | None,
) -> float:
    """Time both alternately, `runs` times after a warm-up; print medians, return the median ratio.

    Args:
        bar: the ratio that should not be exceeded; printed as met or missed.
    """
    measured(), peer()
    pairs = []
    for run in range(runs):
        if run % 2 == 0:
            first = seconds(measured)
            pairs.append((first, seconds(peer)))
        else:
            first = seconds(peer)
            pairs.append((seconds(measured), first))
    ratios = sorted(a / b for a, b in pairs)
    ratio = statistics.median(ratios)
    verdict = "" if bar is None else f"   bar {bar:.2f}: {'met' if ratio <= bar else 'MISSED'}"
    print(
        f"{name:58s} {1e3 * statistics.median(a for a, _ in pairs):9.1f} ms"
        f" / {1e3 * statistics.median(b for _, b in pairs):9.1f} ms"
        f" = {ratio:.3f}  [{ratios[0]:.3f}, {ratios[-1]:.3f}]{verdict}",
        flush=True,
    )
    return ratio
