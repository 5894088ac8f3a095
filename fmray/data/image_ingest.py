"""Image collections -> the image store. In this first form: labelled Parquet files, one process."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmray.data.image_store import IMAGE_SCHEMA, INDEX_SCHEMA, SPLITS, ImageManifest
from fmray.fewshot_config import FewshotRecipe


def prepare_images(recipe: FewshotRecipe) -> None:
    """Make the store of a recipe."""
    store = recipe.images.store
    index: list[dict[str, Any]] = []
    content = hashlib.sha256()
    for name, config in sorted(recipe.images.collections.items()):
        rows = pq.read_table(config.path).to_pylist()
        names = sorted({row["class_name"] for row in rows})
        for split in SPLITS:
            chosen = [row for row in rows if row["split"] == split]
            if not chosen:
                continue
            file = f"images/{name}/{split}/part-00000.parquet"
            (store / file).parent.mkdir(parents=True, exist_ok=True)
            groups = 0
            with pq.ParquetWriter(store / file, IMAGE_SCHEMA, compression="none") as writer:
                for label, class_name in enumerate(names):
                    images = [row for row in chosen if row["class_name"] == class_name]
                    if not images:
                        continue
                    key = str(recipe.seed).encode()
                    images.sort(
                        key=lambda row, key=key: hashlib.blake2b(row["image"], key=key).digest()
                    )
                    images = [{**row, "label": label} for row in images]
                    content.update(b"".join(row["image"] for row in images))
                    index.append(
                        {
                            "collection": name,
                            "split": split,
                            "label": label,
                            "class_name": class_name,
                            "count": len(images),
                            "file": file,
                            "row_group": groups,
                        }
                    )
                    size = recipe.images.rows_per_group
                    for start in range(0, len(images), size):
                        piece = images[start : start + size]
                        writer.write_table(pa.Table.from_pylist(piece, schema=IMAGE_SCHEMA))
                        groups += 1
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), store / "index.parquet")
    rows = sum(row["count"] for row in index)
    ImageManifest(1, {}, content.hexdigest()[:16], rows, 0, 0).write(store)
