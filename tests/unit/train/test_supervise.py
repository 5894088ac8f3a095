"""What the supervisor does after each kind of failure, with Ray replaced by a script."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, WorkerGroupError

from fmray.config import AdaLlavaRecipe, load
from fmray.errors import GaveUp, exit_code
from fmray.runtime.ray_private import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from fmray.train import supervise
from fmray.train.finite import Diverged

DIED = WorkerHealthCheckFailedError("failed", ActorDiedError())
DONE = {"metrics": {}}


def raised(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("traceback", {1: error})  # as Ray's poll of the workers makes it


class Tags(dict):
    def tag(self, name: str, value: str) -> None:
        self[name] = value


@pytest.fixture
def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[supervise.Outcome, Tags, int]]:
    """Run `fit` on a script of (step of the newest checkpoint, what `fit()` raises or returns)."""

    def play(script: list[tuple[int, Any]], max_failures: int = 2) -> Any:
        recipe = AdaLlavaRecipe.model_validate(
            {
                "name": "a",
                "cluster": {"storage": tmp_path, "workers": 2, "max_failures": max_failures},
            }
        )
        remaining, step, tags = list(script), [0], Tags()

        class Trainer:
            def fit(self) -> Any:
                step[0], result = remaining.pop(0)
                if isinstance(result, BaseException):
                    raise result
                return type("Result", (), {"return_value": result})

        monkeypatch.setattr(supervise, "_trainer", lambda *_: Trainer())
        monkeypatch.setattr(supervise, "_last_step", lambda *_: step[0])
        monkeypatch.setattr(supervise, "_wait_for_drained", lambda _: None)
        monkeypatch.setattr(supervise, "_cluster_address", nullcontext)  # it would start Ray
        (tmp_path / "run").mkdir(exist_ok=True)
        monkeypatch.setattr(supervise.time, "sleep", lambda _: None)
        try:
            return supervise.fit(recipe, "run", {}, lambda _: {}, tags), tags, len(remaining)
        except BaseException as error:
            error.remaining, error.tags = len(remaining), tags
            raise

    return play


def test_a_failure_is_logged_and_the_run_resumes(play: Callable[..., Any], capsys: Any) -> None:
    failure = WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: DIED})
    outcome, tags, _ = play([(40, failure), (40, raised(OSError("disk"))), (90, DONE)])
    assert outcome.values == DONE
    first, second = capsys.readouterr().out.splitlines()
    assert "run: worker 1 died" in first
    assert first.endswith("(and 1 more failed); resuming from step 40 (attempt 2 of 3)")
    assert second.endswith("worker 1 raised OSError: disk; resuming from step 40 (attempt 3 of 3)")
    assert tags == {"fmray.restarts": "2", "fmray.last_failure": "worker 1 raised OSError: disk"}
    assert outcome.lines() == ["restarts: 2 (last: worker 1 raised OSError: disk)"]


def test_only_failures_without_a_new_checkpoint_count(play: Callable[..., Any]) -> None:
    each = [(step, raised(OSError("disk"))) for step in range(1, 30)]
    assert play([*each, (30, DONE)], max_failures=1)[2] == 0
    with pytest.raises(GaveUp, match=r"gave up: .*disk; that was failure 3 in a row") as error:
        play([*each[:5], *[each[4]] * 9], max_failures=2)
    assert error.value.remaining == 7  # two of nine were retried
    assert error.value.tags["fmray.restarts"] == "7"


def test_max_failures_0_never_restarts(play: Callable[..., Any]) -> None:
    with pytest.raises(GaveUp, match=r"failure 1 in a row.*resumes from step 8"):
        play([(8, raised(OSError("disk"))), (8, DONE)], max_failures=0)


def test_giving_up_is_one_line_and_exit_code_1(play: Callable[..., Any], capsys: Any) -> None:
    script = [(0, raised(OSError("disk")))] * 3
    assert exit_code(lambda: play(script)) == 1
    # each failure's traceback, and why it gave up
    *traces, last = capsys.readouterr().err.splitlines()
    assert traces == ["Training failed due to worker errors:", "traceback"] * 3
    assert last.startswith("fmray: run run gave up: worker 1 raised OSError: disk; that was")


def test_a_users_mistake_is_not_retried(play: Callable[..., Any], capsys: Any) -> None:
    mistake = supervise._Mistake("train.lr: should be smaller")
    with pytest.raises(ValueError, match=r"^train\.lr: should be smaller$") as error:
        play([(0, raised(mistake)), (0, DONE)])
    assert error.value.remaining == 1
    assert exit_code(lambda: play([(0, raised(mistake))])) == 2
    assert capsys.readouterr().err == "fmray: train.lr: should be smaller\n"


def test_a_run_that_diverged_is_not_retried(play: Callable[..., Any], capsys: Any) -> None:
    failure = WorkerGroupError(
        "", {0: DIED, 1: Diverged("run run: step 3: the loss is not finite")}
    )
    with pytest.raises(GaveUp, match=r"^run run: step 3: the loss is not finite$") as error:
        play([(0, failure), (0, DONE)])
    assert error.value.remaining == 1
    assert exit_code(lambda: play([(0, failure)])) == 1
    assert capsys.readouterr().err == "fmray: run run: step 3: the loss is not finite\n"


def test_only_fmrays_own_value_errors_are_mistakes() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        supervise._mark_mistakes(lambda _: int("x"), {})
    with pytest.raises(supervise._Mistake, match="no such recipe file"):
        supervise._mark_mistakes(lambda _: load(Path("nowhere.yaml")), {})


def test_a_preemption_is_not_a_failure(play: Callable[..., Any], capsys: Any) -> None:
    preempted = {"preempted": "node 1234 is being drained: checkpoint at step 7"}
    outcome, tags, _ = play([(7, preempted), (9, preempted), (20, DONE)], max_failures=0)
    assert tags["fmray.restarts"] == "2"
    assert "checkpoint at step 7; resuming from step 7 (attempt 1 of 1)" in capsys.readouterr().out
    assert len(outcome.restarts) == 2
    with pytest.raises(GaveUp):  # unless the step does not advance
        play([(7, preempted), (7, preempted), (7, DONE)], max_failures=0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ControllerError(WorkerGroupStartupTimeoutError(4)),
            "4 workers could not be placed within cluster.timeout_s",
        ),
        (
            ControllerError(OSError("leaked\nplacement group")),
            "the workers did not start: OSError: leaked placement group",
        ),
        (
            PreemptionError(PreemptionInfo(None, {"abc": [1, 2]})),
            "the node of rank 1, 2 was preempted before a checkpoint was written",
        ),
        (ActorDiedError(), "Ray's training controller died: ActorDiedError: The actor died"),
    ],
)
def test_every_failure_is_one_line(error: Exception, text: str) -> None:
    assert supervise.failure_reason(error).startswith(text)
    assert "\n" not in supervise.failure_reason(error)
