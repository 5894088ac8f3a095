"""Make a small complete data store without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmray.config import ScratchConfig, ShapesConfig
from fmray.data import shapes
from fmray.data.images import DECODER_VERSION
from fmray.data.ingest import ShardTask, write_shard
from fmray.data.processor import fingerprint, scratch_processor
from fmray.data.store import Manifest


def make_store(
    store: Path,
    records: list[dict[str, Any]],
    image_folder: Path,
    processor: Any,
    rows_per_shard: int = 200,
    max_length: int = 2048,
) -> Path:
    """Write good records as the train split of a store."""
    (store / "train").mkdir(parents=True)
    processor.save_pretrained(store / "processor")
    rows = list(enumerate(records))
    shards = [rows[i : i + rows_per_shard] for i in range(0, len(rows), rows_per_shard)]
    counts = {"rows": 0, "answers": 0, "shards": len(shards)}
    for number, shard in enumerate(shards):
        task = ShardTask(
            split="train",
            path=str(store / "train" / f"part-{number:05d}.parquet"),
            file="records",
            rows=json.dumps(shard).encode(),
            image_folder=str(image_folder),
            processor=str(store / "processor"),
            processor_hash=fingerprint(processor),
            max_length=max_length,
            shapes="null",
            write_bad=False,
        )
        result = write_shard(task)
        assert not result.bad_rows
        counts["rows"] += result.rows
        counts["answers"] += result.answers
    settings = {"max_length": max_length, "decoder": DECODER_VERSION}
    Manifest(settings, fingerprint(processor), {"train": counts}, bad_rows=0).write(store)
    return store


def shapes_store(folder: Path, config: ShapesConfig, **options: Any) -> Path:
    """Generate shapes in `folder/source`, and a store of their train split in `folder/store`."""
    shapes.generate(folder / "source", config, seed=0)
    records = json.loads((folder / "source" / "train.json").read_text())
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    processor = scratch_processor(texts, ScratchConfig())
    return make_store(folder / "store", records, folder / "source", processor, **options)
