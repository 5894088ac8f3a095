"""One rank of `scaling.py`, on its machine: trains each case that it receives, and measures it.

Reads a JSON line per case from standard input (`scaling.Case`, rank, folder, recipe, run id).
Writes the line `ready` when everything is imported, then a JSON line per case: the parameters of
the model, and for each measured step its seconds (all, blocked by communication, waiting for data),
the bytes that eth0 has sent, and the bytes of complete tensors by collective.

Each case runs in a forked process, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from support.collectives import Collectives
from support.ranks import run_rank

from fmray.config import AdaLlavaRecipe
from fmray.runtime.run_log import Progress
from fmray.train import loop
from fmray.train.adallava import method
from fmray.train.method import TrainJob

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


class Enough(Exception):
    """Raised after the last measured step; the end of the training loop is not of interest."""


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Train until the last measured step of the case; return the measurements."""
    collectives = Collectives()
    found: dict[str, Any] = {"steps": []}
    make_optimizer, engine_config = method.make_optimizer, method.engine_config

    def counted_optimizer(model: Any, recipe: Any) -> Any:
        for learned, name in ((True, "trainable"), (False, "frozen")):
            sizes = [p.numel() for p in model.parameters() if p.requires_grad is learned]
            found[name] = sum(sizes)
        return make_optimizer(model, recipe)

    def large_model_config(*args: Any) -> dict[str, Any]:
        config = engine_config(*args)
        if config["zero_optimization"]["stage"] == 3:
            # else stage 3 would keep all gathered parameters: the model has less than 1e9
            config["zero_optimization"]["stage3_max_reuse_distance"] = 0
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        return config

    class Marks(Progress):
        """Reads clocks and counters at the end of each step, on every rank."""

        def __init__(self, total: int, start: int, enabled: bool, name: str) -> None:
            super().__init__(total, start, False, name)
            self._last: tuple[float, float, int, dict[str, int]] | None = None

        def update(self, step: int, metrics: dict[str, float]) -> None:
            now = (
                time.perf_counter(),
                collectives.seconds,
                int(SENT.read_text()),
                dict(collectives.bytes),
            )
            if self._last is not None and step > case["warm_up"]:
                seconds = now[0] - self._last[0]
                found["steps"].append(
                    {
                        "seconds": seconds,
                        "communication": now[1] - self._last[1],
                        "data": metrics["waiting_share"] * seconds,
                        "sent": now[2] - self._last[2],
                        "called": {k: n - self._last[3].get(k, 0) for k, n in now[3].items()},
                    }
                )
            self._last = now
            if step == case["warm_up"] + case["steps"]:
                raise Enough

    method.make_optimizer, method.engine_config = counted_optimizer, large_model_config
    loop.Progress = Marks
    recipe = AdaLlavaRecipe.model_validate_json(case["config"]["recipe"])
    job = TrainJob(recipe, "", case["config"]["run_id"])
    try:
        run_rank(case["rank"], case["world_size"], Path(case["folder"]), {"job": job})
    except Enough:
        return found
    raise AssertionError("the training ended before its last measured step")


def main() -> None:
    """Answer cases until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep output of libraries out of the answers
    print("ready", file=answers)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(measure(json.loads(line))), file=answers)
            sys.stdout.flush()
            answers.flush()
            os._exit(0)  # without the exit handlers of an unfinished training
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("a rank failed; its traceback is above")


if __name__ == "__main__":
    main()
