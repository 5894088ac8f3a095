"""Text that can be shown while tokens still come.

In: a tokenizer, token ids one at a time, stop strings. Out: pieces of text that are final. Held
back: bytes that are not yet a character, and an end that may yet become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmray.adallava.token_sampling import sample_rows
from fmray.engine.requests import Sampling

# Which token comes next, for rows that are each drawn in their own way.
#
# In: logits [R, V] and one `Sampling` and generator a row. Out: token ids. A row's draw uses one
# number of its own generator, so it does not depend on the rows beside it (beyond the last bits of
# the logits, which a matrix product of another number of rows may change).


def generator_of(sampling: Sampling) -> torch.Generator:
    """The row's own randomness, on the CPU whatever the model is on."""
    return torch.Generator().manual_seed(sampling.seed)


def draw(
    logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]
) -> tuple[list[int], list[bool]]:
    """One token a row, and whether the row's logits were numbers at all.

    temperature 0: the largest logit. Else the inverse of the distribution function of
    softmax(logits / temperature), cut to the smallest set of most probable tokens with at least
    top_p (the token that reaches it is in, as in transformers' TopPLogitsWarper).
    """
    best = logits.max(-1)
    tokens, sound = best.indices, best.values.isfinite()
    drawn = [row for row, (sampling, _) in enumerate(rows) if sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen = [rows[row] for row in drawn]
        numbers = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for _, g in chosen])
        temperature = logits.new_tensor([s.temperature for s, _ in chosen], dtype=torch.float64)
        top_p = logits.new_tensor([s.top_p for s, _ in chosen], dtype=torch.float64)
        tokens = tokens.index_copy(
            0, index, sample_rows(logits[index], numbers.to(logits.device), temperature, top_p)
        )
    both = torch.stack((tokens, sound.long())).tolist()
    return both[0], [bool(value) for value in both[1]]


_INCOMPLETE = "\ufffd"  # what tokenizers decode an unfinished character to


class TextStream:
    """The text of one answer. Without a tokenizer there is none.

    Raises ValueError for stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str] = ()) -> None:
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # The window: ids before `_read` are in the text; it begins a few earlier, at `_start`,
        # because a token's text depends on its neighbours (leading spaces, bytes of a character).
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """One token more -> the text that became final; sets `stopped` if a stop string did."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._show(after[len(before) :], last=False)

    def finish(self) -> str:
        """No more tokens -> the rest of the text; bytes that never became a character are not
        shown.
        """
        if self._tokenizer is None or self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        return self._show(after[len(before) :].rstrip(_INCOMPLETE), last=True)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _show(self, new: str, last: bool) -> str:
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself not counted."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
