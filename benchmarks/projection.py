"""Projected time of a training step of the large recipes on 8, 64 and 512 GPUs. Uses no GPU.

    python benchmarks/projection.py [--gpus 8 64 512] [--node-gigabits 400] ...

The hardware is described by options; the defaults are nodes of eight A100 GPUs of 80 GB, with
NVLink and a network of 400 Gbit/s per node. Prints a table of memory, bytes sent, and the time of a
step between two bounds: communication completely overlapped with computation, and not at all. The
assumptions are printed above the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from communication import least, volume

from fmray.config import AdaLlavaRecipe, load
from fmray.config.arguments import job_path
from fmray.runtime.gpu_memory import GIB, Sizes, estimate
from fmray.train.adallava.model import model_config, sizes_of

RECIPES = ("llava15_7b_zero3.yaml", "llava15_13b_zero3.yaml")
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Hardware:
    """Speeds of a GPU, of the links inside a node, and of the network between nodes."""

    gpu_teraflops: float = 312.0  #: dense bfloat16 peak
    utilisation: float = 0.45  #: share of the peak that computation reaches
    gpus_per_node: int = 8
    nvlink_gigabytes: float = 300.0  #: per second and GPU, one way
    node_gigabits: float = 400.0  #: per second and node, one way
    link_efficiency: float = 0.8  #: share of both bandwidths that collectives reach

    def bandwidth(self, gpus: int) -> float:
        """Return the bytes per second that each rank can send around the ring.

        All rings of a node share its network, and each leaves the node once, so that together they
        carry what one rank sends.
        """
        link = self.nvlink_gigabytes * 1e9
        if gpus > self.gpus_per_node:
            link = min(link, self.node_gigabits * 1e9 / 8)
        return link * self.link_efficiency


def step_flops(sizes: Sizes, recipe: AdaLlavaRecipe, rows: int) -> float:
    """Return the operations for `rows` rows of `data.max_length` tokens with an image each.

    A parameter takes two operations per token in the forward pass and four in the backward pass;
    the two products of attention take 4 x length x hidden per token and layer (not halved for the
    causal mask). Recomputing activations adds a forward pass (Narayanan et al. 2021, appendix). The
    frozen vision tower has a forward pass only.
    """
    length = recipe.data.max_length
    forward = length * (2 * sizes.trainable + 4 * sizes.layers * length * sizes.hidden)
    vision = model_config(recipe.model).vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = 2 * (sizes.parameters - sizes.trainable) * patches
    return rows * ((4 if recipe.train.gradient_checkpointing else 3) * forward + tower)


def batches(recipe: AdaLlavaRecipe, gpus: int) -> Iterator[tuple[str, int]]:
    """Yield the rows of a rank with the recipe's global batch (strong) or rows per rank (weak)."""
    rows = recipe.train.global_batch // recipe.cluster.most_workers
    if recipe.train.global_batch % gpus == 0:
        yield "strong", recipe.train.global_batch // gpus
    if recipe.cluster.most_workers != gpus:
        yield "weak", rows


def lines_of(
    recipe: AdaLlavaRecipe, gpu_counts: Sequence[int], hardware: Hardware
) -> Iterator[str]:
    """Yield the lines of one recipe's table."""
    sizes = sizes_of(recipe)
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    frozen = sizes.parameters - sizes.trainable
    yield (
        f"{recipe.name}: {sizes.trainable / 1e9:.2f}e9 parameters train, {frozen / 1e9:.2f}e9 are"
        f" frozen; rows of {recipe.data.max_length} tokens"
    )
    yield (
        f"{'GPUs':>5s}{'batch':>14s}{'passes x rows':>15s}{'ZeRO':>6s}{'GiB':>7s}{'sent GB':>9s}"
        f"{'paper GB':>10s}{'compute s':>11s}{'communication s':>17s}{'step s':>14s}"
        f"{'1000 tokens/s':>15s}{'efficiency':>12s}"
    )
    for gpus in gpu_counts:
        for kind, rows in batches(recipe, gpus):
            micro = min(recipe.train.micro_batch, rows)
            passes = rows // micro
            computation = step_flops(sizes, recipe, rows) / (
                hardware.gpu_teraflops * 1e12 * hardware.utilisation
            )
            for stage in (1, 2, 3):
                changed = recipe.model_copy(
                    update={
                        "zero": recipe.zero.model_copy(update={"stage": stage}),
                        "train": recipe.train.model_copy(update={"micro_batch": micro}),
                        "cluster": recipe.cluster.model_copy(update={"workers": gpus}),
                    }
                )
                memory = estimate(sizes, changed).total / GIB
                fits = memory <= (recipe.cluster.gpu_memory_gib or memory)
                counts = (stage, sizes.trainable, frozen, width, passes)
                sent = volume(*counts).sent(gpus)
                communication = sent / hardware.bandwidth(gpus)
                hidden, exposed = max(computation, communication), computation + communication
                tokens = gpus * rows * recipe.data.max_length
                yield (
                    f"{gpus:5d}{f'{gpus * rows} {kind}':>14s}{f'{passes} x {micro}':>15s}{stage:6d}"
                    f"{memory:6.0f}{' ' if fits else '!'}{sent / 1e9:9.1f}"
                    f"{least(*counts).sent(gpus) / 1e9:10.1f}{computation:11.2f}"
                    f"{communication:17.2f}{f'{hidden:.2f}-{exposed:.2f}':>14s}"
                    f"{f'{tokens / exposed / 1e3:.0f}-{tokens / hidden / 1e3:.0f}':>15s}"
                    f"{f'{computation / exposed:.0%}-{computation / hidden:.0%}':>12s}"
                )


def assumptions(hardware: Hardware) -> list[str]:
    """Return the assumptions, as lines of text."""
    return [
        "projection; nothing was run on a GPU. Assumptions:",
        f"  {hardware.gpu_teraflops:g} TFLOP/s per GPU (bfloat16, dense), of which"
        f" computation reaches {hardware.utilisation:.0%};"
        f" nodes of {hardware.gpus_per_node} GPUs",
        f"  {hardware.nvlink_gigabytes:g} GB/s between the GPUs of a node,"
        f" {hardware.node_gigabits:g} Gbit/s per node between nodes, each way, of which collectives"
        f" reach {hardware.link_efficiency:.0%}; rings, no latency, no congestion",
        "  every row has data.max_length tokens and one image; layers that are off are computed"
        " (masked)",
        "  sent GB: by DeepSpeed 0.19 (benchmarks/communication.py); paper GB: what ZeRO needs;"
        " ZeRO-3 gathers"
        " trainable parameters twice per pass (slightly less with its defaults, see `volume`)",
        "  step s: from communication completely overlapped with computation to not overlapped"
        " (stages 1 and 2 overlap nothing with DeepSpeed's default, overlap_comm off); no time for"
        " data, the optimizer or checkpoints",
        "  strong: the recipe's global batch, where every GPU gets a row; weak: the recipe's rows"
        " per GPU, hence a larger batch, which may need another learning rate",
        "  GiB: memory of a GPU, estimated by fmray.runtime.gpu_memory; ! does not fit",
    ]


def projection(gpus: Sequence[int] = GPUS, hardware: Hardware | None = None) -> list[str]:
    """Return the assumptions and the tables, as lines of text."""
    hardware = hardware or Hardware()
    lines = assumptions(hardware)
    for name in RECIPES:
        recipe = load(job_path("recipes") / name).recipe
        lines += ["", *lines_of(recipe, gpus, hardware)]
    return lines


def main() -> int:
    """Parse the command line and print the projection."""
    parser = argparse.ArgumentParser(
        description="Projected step time of the 7B and 13B recipes on many GPUs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    for field in fields(Hardware):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=" ",
        )
    options = vars(parser.parse_args())
    gpus = options.pop("gpus")
    if min(*gpus, *options.values()) <= 0:
        parser.error("all numbers must be positive")
    print("\n".join(projection(gpus, Hardware(**options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
