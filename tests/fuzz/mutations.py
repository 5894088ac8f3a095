"""Change bytes as a fuzzer does; `tests/fuzz` falls back on it where atheris is not installed."""

from __future__ import annotations

import random


def mutate(seeds: list[bytes], tokens: tuple[bytes, ...], rng: random.Random) -> bytes:
    """Return a seed with one to eight random changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.choice((1, 1, 4, 16, 1 << 10)))
        match rng.randrange(7):
            case 0:  # flip a bit
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
            case 1:  # overwrite
                data[at:end] = rng.randbytes(end - at)
            case 2:  # insert what the format knows, once or many times
                data[at:at] = rng.choice(tokens) * rng.choice((1, 1, 1, 2, 50))
            case 3:  # delete
                del data[at:end]
            case 4:  # repeat
                data[at:at] = data[at:end] * rng.choice((1, 3, 20))
            case 5:  # continue with another input
                other = rng.choice(seeds)
                data[at:] = other[rng.randint(0, len(other)) :]
            case 6:  # cut off
                if rng.random() < 0.3:
                    del data[at:]
    return bytes(data)
