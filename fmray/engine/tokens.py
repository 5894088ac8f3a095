"""From logits to text: sample the next token of each row, and stream the text of an answer.

Each row samples with its own generator, so its tokens do not depend on the other rows (except for
the last bits of the logits, which a matrix product of another size may change).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fmray.adallava.token_sampling import sample_rows
from fmray.engine.requests import Sampling

# --- Sampling -------------------------------------------------------------------------------


def generator_of(sampling: Sampling) -> torch.Generator:
    """A generator for one row, always on the CPU so that a seed means the same on each device."""
    return torch.Generator().manual_seed(sampling.seed)


def sample_tokens(
    logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]
) -> tuple[list[int], list[bool]]:
    """Sample one token per row; greedy at temperature 0, else see `sample_rows`.

    Args:
        logits: [R, V].
        rows: sampling parameters and generator of each row; a sampled row uses one number of it.

    Returns:
        Token ids [R], and whether each row's logits are finite.
    """
    best = logits.max(-1)
    tokens, finite = best.indices, best.values.isfinite()
    sampled = [index for index, (sampling, _) in enumerate(rows) if sampling.temperature > 0]
    if sampled:
        index = torch.tensor(sampled, device=logits.device)
        subset = [rows[row] for row in sampled]
        numbers = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for _, g in subset])
        temperature = logits.new_tensor([s.temperature for s, _ in subset], dtype=torch.float64)
        top_p = logits.new_tensor([s.top_p for s, _ in subset], dtype=torch.float64)
        tokens = tokens.index_copy(
            0, index, sample_rows(logits[index], numbers.to(logits.device), temperature, top_p)
        )
    both = torch.stack((tokens, finite.long())).tolist()  # one transfer from the device
    return both[0], [bool(value) for value in both[1]]


# --- Text -----------------------------------------------------------------------------------


_INCOMPLETE = "\ufffd"  # tokenizers decode an unfinished character to this


class TextStream:
    """Incremental text of one answer; empty without a tokenizer.

    Holds back the bytes of an unfinished character, and an end that may become a stop string.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str] = ()) -> None:
        """Raises ValueError for stop strings without a tokenizer."""
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # The decoded window: it starts a few ids before `_read`, the first id that is not in the
        # text yet, because a token's text depends on its neighbours (leading spaces, bytes of a
        # character).
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that became final, and sets `stopped` at a stop string."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :], last=False)

    def finish(self) -> str:
        """Return the rest of the text, without bytes that never became a character."""
        if self._tokenizer is None or self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        if rest.endswith(_INCOMPLETE):
            # what the model itself wrote as U+FFFD stays
            complete = _bytes_of(self._tokenizer, self._ids[self._read :]).decode(errors="ignore")
            written = len(complete) - len(complete.rstrip(_INCOMPLETE))
            rest = rest.rstrip(_INCOMPLETE) + written * _INCOMPLETE
        return self._release(rest, last=True)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, new: str, last: bool) -> str:
        """The text that is final now, up to a stop string; holds back the rest."""
        text = self._held + new
        positions = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if positions:
            self.stopped, self._held = True, ""
            return text[: min(positions)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _bytes_of(tokenizer: Any, ids: list[int]) -> bytes:
    """Return the bytes that tokens stand for, special ones left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    letters = _byte_letters() if "ByteLevel" in str(getattr(backend, "decoder", "")) else {}
    parts = []
    for token in tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True):
        fallback = re.fullmatch("<0x([0-9A-F]{2})>", token)  # SentencePiece's form of a byte
        if fallback:
            parts.append(bytes.fromhex(fallback[1]))
        else:
            parts.append(b"".join(letters.get(letter, letter.encode()) for letter in token))
    return b"".join(parts)


@functools.cache
def _byte_letters() -> dict[str, bytes]:
    """Return the letter -> byte table of byte-level BPE (GPT-2's)."""
    return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
