"""The manifest of a data store: what it holds and what it was made of. Written last, so its
presence means done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Manifest:
    """`settings`: sources and options; `processor`: its fingerprint; `counts`: split -> rows,
    answers, shards."""

    settings: dict[str, Any]
    processor: str
    counts: dict[str, dict[str, int]]
    bad_rows: int

    @staticmethod
    def path(store: Path) -> Path:
        """Where the manifest of a store lies."""
        return store / "manifest.json"

    @staticmethod
    def exists(store: Path) -> bool:
        """Whether `store` is a finished store."""
        return Manifest.path(store).is_file()

    @classmethod
    def read(cls, store: Path) -> Manifest:
        """Raises ValueError where there is no finished store or its manifest is not one."""
        path = cls.path(store)
        if not path.is_file():
            raise ValueError(
                f"{store}: not a finished data store (no {path.name}); run jobs/prepare_data.py"
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}: not a manifest ({error}); delete it and run jobs/prepare_data.py"
            ) from error

    def write(self, store: Path) -> None:
        """Written to a temporary name and moved."""
        temporary = self.path(store).with_name("manifest.json.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        temporary.replace(self.path(store))

    def summary(self) -> str:
        """Counts in words."""
        parts = [
            f"{count['rows']} {split} rows with {count['answers']} answers"
            for split, count in self.counts.items()
        ]
        return ", ".join([*parts, f"{self.bad_rows} bad rows left out"])
