"""Throughput of ingest through Ray against one plain process, and of the loader.

    python benchmarks/ingest.py [--pictures 4000] [--side 32] [--runs 3] [--cpus 2]
    python benchmarks/ingest.py --loader [--batch 64] [--threads 1]

Ingest: both sides read, check, decode, tokenise and write the same rows; the peer is one loop with
a pyarrow writer and without keys, retries or resuming. Ray's workers have started and loaded the
processor before the clock starts; the first, cold run is printed too. `--loader` measures samples
per second of the loader alone, with an empty and with a filled token cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from fmray.config import AdaLlavaRecipe
from fmray.data import shapes
from fmray.data.images import decode_image
from fmray.data.ingest import ROW_GROUP, SCHEMA, prepare
from fmray.data.loader import InstructionLoader
from fmray.data.processor import load_processor, scratch_processor
from fmray.data.records import encode, image_tokens


def write_plainly(source: Path, target: Path, recipe: AdaLlavaRecipe) -> int:
    """Write the rows as the peer does: one process, one file per split. Return their number."""
    splits = {
        split: json.loads((source / f"{split}.json").read_text())
        for split in ("train", "validation")
    }
    texts = [
        turn["value"]
        for records in splits.values()
        for record in records
        for turn in record["conversations"]
    ]
    processor = scratch_processor(texts, recipe.model.scratch)
    target.mkdir()
    for split, records in splits.items():
        with pq.ParquetWriter(target / f"{split}.parquet", SCHEMA, compression="zstd") as writer:
            rows = []
            for number, record in enumerate(records):
                image = (source / record["image"]).read_bytes()
                encoded = encode(processor, record["conversations"])
                tokens = image_tokens(processor, decode_image(image).image.size)
                rows.append({**record, "image": image, "row": number})
                rows[-1]["turn_tokens"] = encoded.turn_tokens(tokens)
                if len(rows) == ROW_GROUP or number == len(records) - 1:
                    writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                    rows = []
    return sum(len(records) for records in splits.values())


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def compare_ingest(arguments: argparse.Namespace, folder: Path) -> None:
    """Print rows/s of both sides, run alternately, and the median ratio."""
    # the data set is generated once, untimed, and read as files like a user's data
    config = {"pictures": arguments.pictures, "image_size": arguments.side}
    shapes_config = AdaLlavaRecipe(name="b", data={"shapes": config}).data.shapes
    shapes.generate(folder / "source", shapes_config, seed=0)
    data = {
        "train": folder / "source" / "train.json",
        "validation": folder / "source" / "validation.json",
        "rows_per_shard": max(64, arguments.pictures // (4 * arguments.cpus)),
    }

    def recipe(run: int) -> AdaLlavaRecipe:
        return AdaLlavaRecipe(name="b", data={**data, "store": folder / f"store{run}"})

    ray.init(address="local", num_cpus=arguments.cpus, include_dashboard=False)
    cold = seconds(lambda: prepare(recipe(0)))
    rays, plains, rows = [], [], 0
    for run in range(1, arguments.runs + 1):
        rays.append(seconds(lambda run=run: prepare(recipe(run))))
        begun = time.perf_counter()
        rows = write_plainly(folder / "source", folder / f"plain{run}", recipe(run))
        plains.append(time.perf_counter() - begun)
    ray.shutdown()
    ratios = sorted(plain / ours for plain, ours in zip(plains, rays, strict=True))
    print(f"{rows} rows of {arguments.side} pixels, {arguments.cpus} CPUs, {arguments.runs} runs")
    print(f"  Ray ingest      {rows / statistics.median(rays):8.0f} rows/s, warm workers")
    print(f"  Ray ingest      {rows / cold:8.0f} rows/s, workers starting")
    print(f"  plain process   {rows / statistics.median(plains):8.0f} rows/s")
    print(
        f"  speed-up        {statistics.median(ratios):8.2f}  [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
    )


def measure_loader(arguments: argparse.Namespace, folder: Path) -> None:
    """Print samples/s and CPU time per batch of the loader."""
    config = {"pictures": arguments.pictures, "image_size": arguments.side}
    recipe = AdaLlavaRecipe(name="b", data={"shapes": config, "store": folder / "store"})
    ray.init(address="local", num_cpus=arguments.cpus, include_dashboard=False)
    prepare(recipe)
    ray.shutdown()
    loader = InstructionLoader(
        folder / "store",
        "train",
        load_processor(folder / "store" / "processor"),
        global_batch=arguments.batch,
        rank=0,
        world_size=1,
        seed=0,
        samples="turn",
        max_length=2048,
        micro_batch=arguments.batch,
        threads=arguments.threads,
    )
    for epoch, name in enumerate(["empty token cache", *["filled token cache"] * arguments.runs]):
        wall, processor_time = time.perf_counter(), time.process_time()
        samples = sum(len(batch.rows) for step in loader.epoch(epoch) for batch in step)
        wall, processor_time = time.perf_counter() - wall, time.process_time() - processor_time
        batches = samples / arguments.batch
        print(
            f"  {name:18s} {samples / wall:8.0f} samples/s,"
            f" {1e3 * processor_time / batches:6.2f} ms"
            f" CPU per batch of {arguments.batch}"
        )


def main() -> None:
    """Parse the command line and run one of the two benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4000, help="images in the data set")
    parser.add_argument("--side", type=int, default=32, help="of an image, pixels")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--loader", action="store_true", help="measure the loader instead")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (measure_loader if arguments.loader else compare_ingest)(arguments, Path(folder))


if __name__ == "__main__":
    main()
