"""Fuzz one reader for a while: `python tests/fuzz/run.py TARGET --minutes 10`.

With atheris (`pip install atheris`) the search is guided by the coverage of fmray's code; without
it, inputs are mutated at random. An input that breaks the reader is printed in base64, for
`tests/fuzz/found.json`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import base64
import random
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]


def report(name: str, data: bytes) -> None:
    """Print an input that broke a reader."""
    print(f"{name} is broken by {base64.b64encode(data).decode()}", flush=True)


def with_atheris(name: str, seconds: float) -> None:
    """Fuzz guided by coverage; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fmray", "yaml"]):
        from fuzz.mutations import mutate
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    seeds = target.seeds()

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            report(name, data)
            raise

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutate([data, *seeds] if rng.random() < 0.2 else [data], target.tokens, rng)[
            :max_size
        ]

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds:.0f}", "-timeout=20", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, corpus], one, custom_mutator=change)
        atheris.Fuzz()


def without(name: str, seconds: float) -> None:
    """Fuzz by random changes to the seeds."""
    from fuzz.mutations import mutate
    from fuzz.targets import TARGETS

    target, rng = TARGETS[name], random.Random()
    seeds, runs, valid, end = target.seeds(), 0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(seeds, target.tokens, rng)
        try:
            if target(data):
                valid += 1
                seeds.append(data)
                if len(seeds) > 2000:
                    del seeds[rng.randrange(20, len(seeds))]
        except Exception:
            report(name, data)
            raise
        runs += 1
    print(f"{name}: {runs} inputs in {seconds:.0f} s, {valid} of them valid, none broke it")


def main() -> None:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--random", action="store_true", help="mutate at random, without atheris")
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        options.random = True
        print("atheris is not installed; inputs are mutated at random", flush=True)
    (without if options.random else with_atheris)(options.target, options.minutes * 60)


if __name__ == "__main__":
    main()
