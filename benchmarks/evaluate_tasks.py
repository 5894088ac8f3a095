"""Few-shot evaluation on cached embeddings against encoding every episode.

    python benchmarks/evaluate_tasks.py [--encoder small/conv] [--measured 40]

The images are random and decoded, as many as miniImageNet has for testing (20 classes of 600). The
cached side encodes each image once and runs 1500 tasks (15-way, 15 queries per class) on the
features. The peer encodes the images of each task; `--measured` of its 1500 tasks are timed and
scaled up, since each task encodes the same number of images. Both sides are checked to give the
same accuracies. Prints seconds and ratios for 1 and for 5 shots. Without a GPU these are seconds of
CPU time, which other programs on the machine do not change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from timing import seconds as wall_seconds

from fmray.fewshot import (
    Encoder,
    EpisodeSampler,
    centroid_logits,
    create_encoder,
    evaluate_tasks,
)

CLASSES, IMAGES, WAYS, QUERIES, TASKS = 20, 600, 15, 15, 1500
BATCH = 256  # images per encoder call of the cached side; the peer's call is a task, 240 or 300
BAR = 20


def seconds(function: Callable[[], object]) -> float:
    """Return the time of one call: wall time with a GPU, CPU time without."""
    if torch.cuda.is_available():
        return wall_seconds(function)
    start = time.process_time()
    function()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--encoder", default="small/conv")
    parser.add_argument("--measured", type=int, default=40, help="tasks of the peer that are timed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = create_encoder(options.encoder, pretrained=False).to(device)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(IMAGES)
    size = encoder.preprocess.size
    tint = torch.randint(0, 128, (CLASSES, 3, 1, 1), dtype=torch.uint8, generator=generator)
    noise = torch.randint(
        0, 128, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator
    )
    pixels = noise + tint[labels]
    for shots in (1, 5):
        sampler = EpisodeSampler(labels.numpy(), WAYS, shots, QUERIES, seed=0, split="test")
        compare(encoder, pixels, sampler, options.measured, device)


def compare(
    encoder: Encoder,
    pixels: torch.Tensor,
    sampler: EpisodeSampler,
    measured: int,
    device: torch.device,
) -> None:
    """Time both sides on the tasks of one sampler; print seconds and their ratio."""
    truth = torch.arange(WAYS, device=device).repeat_interleave(QUERIES)
    cached_accuracies: list[np.ndarray] = []
    peer_accuracies: list[float] = []

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return encoder(encoder.preprocess.normalise(pixels[rows].to(device)))

    def cached() -> None:
        features = torch.cat([encode(rows) for rows in torch.arange(len(pixels)).split(BATCH)])
        cached_accuracies.append(evaluate_tasks(features, sampler, TASKS))

    def peer() -> None:
        task = sampler[len(peer_accuracies)]
        rows = torch.from_numpy(np.concatenate([task.support.ravel(), task.query.ravel()]))
        support, query = encode(rows).split([task.support.size, task.query.size])
        logits = centroid_logits(support.unflatten(0, task.support.shape), query)
        peer_accuracies.append((logits.argmax(1) == truth).double().mean().item())

    encode(torch.arange(BATCH))  # the first call is slower
    # the peer before and after the cached side, so that drift cancels
    times = [seconds(peer) for _ in range(measured // 2)]
    once = seconds(cached)
    times += [seconds(peer) for _ in range(measured - measured // 2)]
    every = float(np.mean(times)) * TASKS
    # the last digits of a feature depend on the batch that it was encoded in
    differing = np.abs(cached_accuracies[0][:measured] - peer_accuracies).max()
    assert differing <= 2 / len(truth), f"accuracies differ by {differing}"
    ratio = every / once
    print(
        f"{sampler.shots}-shot, {TASKS} tasks: encoding every episode {every:7.1f} s"
        f" / cached {once:6.2f} s = {ratio:.1f}x   bar {BAR}: "
        f"{'met' if ratio >= BAR else 'MISSED'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
