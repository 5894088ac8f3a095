"""Text that can be shown while tokens still come.

In: a tokenizer, token ids one at a time, stop strings. Out: pieces of text that are final. Held
back: bytes that are not yet a character, and an end that may yet become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
