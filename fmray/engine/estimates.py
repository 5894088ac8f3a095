"""One request as the forecasts see it: how long its prompt, its answer and its turn will be.

In: an `Entry` (an ask under way) and what answers and pictures have been like. Out: `Waiting`,
`Row`, `Request`, seconds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from fmray.engine.forecast import Forecast, Moment, Row, Waiting
from fmray.engine.policy import Ask
from fmray.engine.requests import Request

PICTURES = 256  # remembered as seen
LEARNING = 0.02  # weight of the latest answer's length, once many are known


@dataclass(eq=False)
class Entry:
    """One ask from `submit` to its end; times on the dispatcher's clock.

    cap: the most switches that its key and the memory allow; fixed: what it asked for, None if it
    is to be decided; units: decided. operations: counted against its key, 0 where they are not.
    pixels: picture values. least: seconds that it takes alone (strict deadlines); seconds: of the
    machine that its caller was charged. forecast, told: seconds from admission to `told_of`, as the
    forecast has them and as the decision said. first: when its first token came; tokens: so far.
    """

    ask: Ask
    submitted: float
    cap: int
    fixed: int | None
    operations: float
    pixels: int = 0
    units: int = 0
    least: float = 0.0
    seconds: float = 0.0
    admitted: float = math.nan
    forecast: float = math.nan
    told: float = math.nan
    told_of: Moment = "first_token"
    first: float | None = None
    tokens: int = 0


class Estimates:
    """What is expected of requests; learns from those that were answered."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self._pictures: OrderedDict[str, None] = OrderedDict()
        self._length_ratio = 1.0  # of max_new_tokens that answers use
        self._answers = 3  # as if so many had used all

    def saw(self, image_key: str | None) -> None:
        """A prefill with this picture is done: its features are at hand for the next."""
        if image_key is None:
            return
        self._pictures[image_key] = None
        self._pictures.move_to_end(image_key)
        if len(self._pictures) > PICTURES:
            self._pictures.popitem(last=False)

    def answered(self, entry: Entry) -> None:
        """A request got its whole answer: so long do they become."""
        self._answers += 1
        used = min(1.0, entry.tokens / entry.ask.sampling.max_new_tokens)
        self._length_ratio += max(LEARNING, 1 / self._answers) * (used - self._length_ratio)

    def pixels(self, entry: Entry) -> int:
        """Picture values that its prefill will read: none if the picture was seen of late."""
        return 0 if entry.ask.image_key in self._pictures else entry.pixels

    def expected(self, entry: Entry) -> float:
        """Tokens its answer will have, by what answers have had."""
        return max(1.0, self._length_ratio * entry.ask.sampling.max_new_tokens)

    def waiting(self, entry: Entry, new_tokens: float | None = None) -> Waiting:
        """A request that is not admitted; new_tokens: of its answer, default as expected."""
        new_tokens = self.expected(entry) if new_tokens is None else new_tokens
        tokens = entry.ask.prompt_tokens
        return Waiting(tokens, new_tokens, entry.fixed, self.pixels(entry), entry.cap)

    def row(self, entry: Entry) -> Row:
        """A request that the engine holds."""
        most = entry.ask.sampling.max_new_tokens - entry.tokens
        remaining = max(self.expected(entry) - entry.tokens, 0.1 * most, 1.0)
        context = entry.ask.prompt_tokens + max(0, entry.tokens - 1)
        return Row(entry.units, context, remaining, entry.first is not None)

    def least(self, entry: Entry) -> float:
        """Seconds to the moment it asks for, alone and with no switch on."""
        ask = entry.ask
        alone = Waiting(ask.prompt_tokens, ask.sampling.max_new_tokens, 0, self.pixels(entry))
        return float(self.forecast.play([], [alone], np.zeros(1), ask.deadline_of)[0, 0])

    def seconds(self, entry: Entry, new_tokens: float) -> float:
        """Of the machine, for an answer of `new_tokens` with the switches that it was given."""
        rows = self.forecast.max_rows
        tokens, pixels = entry.ask.prompt_tokens, self.pixels(entry)
        return float(self.forecast.cost.answer(tokens, entry.units, new_tokens, rows, pixels))

    @staticmethod
    def request(entry: Entry, units_on: int) -> Request:
        """What the engine is given."""
        ask = entry.ask
        return Request(ask.id, ask.inputs, ask.image_key, units_on, ask.plan, ask.sampling)
