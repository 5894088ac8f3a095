"""Bearer keys and the limits of their callers.

Keys come from a YAML file or from the environment variable FMRAY_API_KEYS, never from the command
line, which any user of the machine can read. Only hashes of the keys are kept in memory. The file:

    - name: alice                     # unique; identifies the caller for fairness and limits
      key: sk-...                     # or sha256: its hash in hex, to keep the secret out of here
      requests_per_second: 2          # limits are optional and per replica; see CallerLimits
      burst: 10
      operations_per_second: 1.0e12   # operations of the decoder
      max_budget: "0.8"               # larger budgets are lowered to it
      weight: 2.0                     # share of a busy engine, relative to others' 1.0
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fmray.config import Section
from fmray.config.serve import BudgetText
from fmray.config.yaml_file import explain, read_yaml
from fmray.engine.fairness import CallerLimits
from fmray.errors import ConfigError

VARIABLE = "FMRAY_API_KEYS"
ANONYMOUS = "anonymous"
_MIN_LENGTH = 16  # characters; shorter keys can be guessed


class KeyEntry(Section):
    """One key of the file, with the limits of its caller."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    key: str | None = Field(None, min_length=_MIN_LENGTH, max_length=512)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    weight: float = Field(1.0, gt=0)
    requests_per_second: float | None = Field(None, gt=0)
    burst: float | None = Field(None, ge=1)
    operations_per_second: float | None = Field(None, gt=0)
    operations_burst: float | None = Field(None, gt=0)
    max_budget: BudgetText | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("needs either `key` or `sha256`")
        return self


_Entries = TypeAdapter(Annotated[list[KeyEntry], Field(min_length=1)])


@dataclass(frozen=True)
class Caller:
    """Who sends a request, and the limits that apply."""

    name: str
    limits: CallerLimits = field(default_factory=CallerLimits)


class KeyRing:
    """The known keys. An empty key ring accepts everybody as `anonymous`."""

    def __init__(self, entries: Iterable[tuple[bytes, Caller]] = ()) -> None:
        self._entries = tuple(entries)  # (sha256 of the key, its caller)

    @property
    def open(self) -> bool:
        """Whether requests need no key."""
        return not self._entries

    @property
    def callers(self) -> Sequence[Caller]:
        """All possible callers."""
        return [caller for _, caller in self._entries] or [Caller(ANONYMOUS)]

    def find(self, authorization: bytes | None) -> Caller | None:
        """Return the caller of an `Authorization: Bearer KEY` header, None if the key is unknown.

        Compares the hash with every known one, each in constant time, so that the response time
        reveals nothing about a key.
        """
        if self.open:
            return Caller(ANONYMOUS)
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        match = None
        for known, caller in self._entries:
            if hmac.compare_digest(known, digest):
                match = caller
        return match if scheme.lower() == b"bearer" else None


def load_keys(file: Path | None) -> KeyRing:
    """Load the keys of a file, else of FMRAY_API_KEYS (comma-separated), else an open ring.

    Raises:
        ValueError: If the file is not a list of keys; the message never contains a key.
    """
    if file is None:
        words = [word.strip() for word in os.environ.get(VARIABLE, "").split(",")]
        words = [word for word in words if word]
        if any(len(word) < _MIN_LENGTH for word in words):
            raise ConfigError(f"{VARIABLE}: a key has fewer than {_MIN_LENGTH} characters")
        return KeyRing(
            (hashlib.sha256(word.encode()).digest(), Caller(f"key{index}"))
            for index, word in enumerate(words, start=1)
        )
    tree = read_yaml(file, "keys file", secret=True)
    try:
        entries = _Entries.validate_python(tree and tree.plain())
    except ValidationError as error:
        # Pydantic's error holds the values: it is not chained.
        text = explain(error, KeyEntry, tree, str(file), secret=True)
        raise ConfigError(text) from None
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ConfigError(f"{file}: two keys have the same name")
    return KeyRing((_hash(entry), _caller(entry)) for entry in entries)


def _hash(entry: KeyEntry) -> bytes:
    if entry.sha256 is not None:
        return bytes.fromhex(entry.sha256)
    assert entry.key is not None, "the model asks for one of the two"
    return hashlib.sha256(entry.key.encode()).digest()


def _caller(entry: KeyEntry) -> Caller:
    limits = entry.model_dump(exclude={"name", "key", "sha256"})
    return Caller(entry.name, CallerLimits(**limits))
