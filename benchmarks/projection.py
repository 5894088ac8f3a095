"""On paper: what a step of the large recipes takes on 8, 64 and 512 GPUs. No GPU is used.

    python benchmarks/projection.py [--gpus 8 64 512] [--node-gigabits 400] ...

In: recipes, and a machine in numbers (the defaults are nodes of eight A100s of 80 GB, with NVLink
and 400 Gbit/s of network a node). Out: a table: memory, bytes sent, and a step's time between two
bounds, communication wholly hidden behind computation and not at all. `assumptions` are printed
with it.
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
    """gpu_teraflops: dense bfloat16 peak; utilisation: share of it that computation reaches;
    nvlink_gigabytes: a second, one way, a GPU; node_gigabits: of network, one way, a node;
    link_efficiency: share of both that collectives reach."""

    gpu_teraflops: float = 312.0
    utilisation: float = 0.45
    gpus_per_node: int = 8
    nvlink_gigabytes: float = 300.0
    node_gigabits: float = 400.0
    link_efficiency: float = 0.8

    def bandwidth(self, gpus: int) -> float:
        """Bytes a second that each rank can send around the ring.

        Between nodes all of a node's rings share its network, and each passes a node's border once:
        together they bring what one rank sends.
        """
        one = self.nvlink_gigabytes * 1e9
        if gpus > self.gpus_per_node:
            one = min(one, self.node_gigabits * 1e9 / 8)
        return one * self.link_efficiency


def step_flops(sizes: Sizes, recipe: AdaLlavaRecipe, rows: int) -> float:
    """Of a rank's rows, all as long as `data.max_length`, each with a picture.

    Two a parameter and token forward, four backward; attention's two products, 4 x length x hidden
    a token and layer (not halved for what the causal mask leaves out); forward once more where
    activations are recomputed. As Narayanan et al. 2021, appendix; the vision tower, frozen, goes
    forward only.
    """
    length = recipe.data.max_length
    forward = length * (2 * sizes.trainable + 4 * sizes.layers * length * sizes.hidden)
    vision = model_config(recipe.model).vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    seen = 2 * (sizes.parameters - sizes.trainable) * patches
    return rows * ((4 if recipe.train.gradient_checkpointing else 3) * forward + seen)


def batches(recipe: AdaLlavaRecipe, gpus: int) -> Iterator[tuple[str, int]]:
    """Rows of a rank: the recipe's global batch kept (strong), or its rows a rank (weak)."""
    rows = recipe.train.global_batch // recipe.cluster.most_workers
    if recipe.train.global_batch % gpus == 0:
        yield "strong", recipe.train.global_batch // gpus
    if recipe.cluster.most_workers != gpus:
        yield "weak", rows


def lines_of(
    recipe: AdaLlavaRecipe, gpu_counts: Sequence[int], hardware: Hardware
) -> Iterator[str]:
    """A table of one recipe."""
    sizes = sizes_of(recipe)
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    frozen = sizes.parameters - sizes.trainable
    yield (
        f"{recipe.name}: {sizes.trainable / 1e9:.2f}e9 parameters learn, {frozen / 1e9:.2f}e9 are"
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
    """In words."""
    return [
        "on paper; nothing here was run on a GPU. Assumed:",
        f"  {hardware.gpu_teraflops:g} TFLOP/s a GPU (bfloat16, dense), of which"
        f" {hardware.utilisation:.0%} are reached in computation;"
        f" nodes of {hardware.gpus_per_node} GPUs",
        f"  {hardware.nvlink_gigabytes:g} GB/s from GPU to GPU in a node,"
        f" {hardware.node_gigabits:g} Gbit/s a node between nodes, each way, of which"
        f" {hardware.link_efficiency:.0%} are reached; rings, no latency, no congestion",
        "  every row as long as data.max_length, with one picture; layers that are switched off are"
        " computed (masked)",
        "  bytes of DeepSpeed 0.19 (benchmarks/communication.py), `paper` what ZeRO would need;"
        " ZeRO-3 gathers"
        " what learns twice a pass (with its defaults a little less: `volume`)",
        "  a step: from communication wholly hidden behind computation to not hidden at all (stages"
        " 1 and 2 hide nothing with DeepSpeed's defaults, overlap_comm off); no time for data,"
        " the optimizer, checkpoints",
        "  strong: the recipe's global batch, where every GPU gets a row; weak: the recipe's rows a"
        " GPU, and so a larger batch, which may need another learning rate",
        "  GiB: fmray.runtime.gpu_memory's estimate of a GPU; ! does not fit",
    ]


def projection(gpus: Sequence[int] = GPUS, hardware: Hardware | None = None) -> list[str]:
    """The lines of all tables."""
    hardware = hardware or Hardware()
    lines = assumptions(hardware)
    for name in RECIPES:
        recipe = load(job_path("recipes") / name).recipe
        lines += ["", *lines_of(recipe, gpus, hardware)]
    return lines


def main() -> int:
    """Parse, and print."""
    parser = argparse.ArgumentParser(
        description="A step of the 7B and 13B recipes on many GPUs, on paper.",
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
