"""Values that are not finite: no optimizer applies them, and the run stops or skips the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmray.config import AdaLlavaRecipe
from fmray.config.fewshot import FewshotTrainConfig
from fmray.errors import exit_code
from fmray.train.engine import (
    engine_config,
    import_deepspeed,
    make_engine,
    make_optimizer,
    scaled,
    single_process_group,
)
from fmray.train.finite import (
    FEWEST,
    WINDOW,
    Diverged,
    FiniteCheck,
    Spikes,
    all_finite,
    name_samples,
    weights_finite,
)
from fmray.train.method import Worker

NAN, INF = math.nan, math.inf


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def deepspeed_engine(stage: int, dtype: str) -> Any:
    values: dict[str, Any] = {
        "name": "a",
        "model": {"dtype": dtype},
        "zero": {"stage": stage},
        "train": {"lr": 0.1, "weight_decay": 0.1, "global_batch": 4, "micro_batch": 2},
    }
    recipe = AdaLlavaRecipe.model_validate(values)
    learner = model().to(getattr(torch, dtype))
    engine, *_ = import_deepspeed().initialize(
        model=learner,
        optimizer=make_optimizer(learner, recipe),
        config=engine_config(recipe, 1),
        dist_init_required=False,
    )
    return engine


def steps_of(engine: Any, factors: list[float], dtype: torch.dtype) -> list[Tensor]:
    """Take a step of two passes for each factor, which multiplies the loss of the first pass.

    Returns the weights.
    """
    norms = []
    for factor in factors:
        for spoil in (factor, 1.0):
            rows = torch.linspace(-1, 1, 12, dtype=dtype).reshape(2, 6)
            engine.backward(scaled(engine(rows).float().square().mean() * spoil, 1.0))
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    assert [math.isfinite(norm) for norm in norms] == [math.isfinite(f) for f in factors]
    state = engine.module.state_dict()
    if getattr(engine, "zero_optimization_partition_weights", bool)():  # ZeRO-3
        state = {name: p.ds_tensor for name, p in engine.module.named_parameters()}
    return [tensor.detach().float().clone() for tensor in state.values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(stage: int, dtype: str) -> None:
    """Weights, moments, weight decay and step counts are those of a run without the step."""
    kind = getattr(torch, dtype)
    with single_process_group():
        wanted = steps_of(deepspeed_engine(stage, dtype), [1.0, 2.0, 1.0], kind)
        found = steps_of(deepspeed_engine(stage, dtype), [NAN, 1.0, INF, 2.0, NAN, 1.0], kind)
    assert any(tensor.abs().sum() > 0 for tensor in wanted)
    for tensor, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "zero"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fewshot_step_that_is_not_finite_leaves_no_trace(strategy: str, optimizer: str) -> None:
    config = FewshotTrainConfig(
        optimizer=optimizer, strategy=strategy, lr=0.05, weight_decay=0.1, episodes_per_step=2
    )
    with single_process_group():
        wanted, found = (
            steps_of(make_engine(model(), config, 1), factors, torch.float32)
            for factors in ([1.0, 2.0, 1.0], [NAN, 1.0, INF, 2.0, NAN, 1.0])
        )
    for tensor, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


# --- What the run does ---


class Lines(list):
    def check(self, allowed: int = 0, skipped: int = 0) -> FiniteCheck:
        return FiniteCheck("r", self.append, lambda step: "lower train.lr", allowed, skipped)


def samples() -> str:
    return "rank 1, samples a, b"


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({"loss": NAN, "grad_norm": NAN}, "loss"),
        ({"loss": INF}, "loss"),
        ({"loss": 1.0, "grad_norm": -INF}, "gradient norm"),
    ],
)
def test_a_value_that_is_not_finite_is_one_line_and_exit_code_1(
    metrics: dict[str, float], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Lines().check()
    assert check.step(2, {"loss": 1.0, "grad_norm": 0.0}, samples)
    assert exit_code(lambda: check.step(3, metrics, samples)) == 1
    assert capsys.readouterr().err == (
        f"fmray: run r: step 3: the {name} is not finite (rank 1, samples a, b); lower train.lr,"
        " or set train.skip_nonfinite to skip such steps\n"
    )


def test_evaluations_and_weights_are_checked() -> None:
    check = Lines().check()
    check.evaluation(4, {"accuracy/0.5": 0.0, "loss/0.5": 3.0})
    check.weights(4, True)
    with pytest.raises(
        Diverged, match=r"^run r: step 4: loss/1 of the evaluation is not finite; l"
    ):
        check.evaluation(4, {"loss/0.5": 3.0, "loss/1": INF})
    with pytest.raises(Diverged, match=r"^run r: step 4: the weights are not finite; lower"):
        check.weights(4, False)


def test_so_many_steps_may_be_skipped() -> None:
    lines = Lines()
    check = lines.check(allowed=3, skipped=1)  # one before the run was resumed
    counts = [check.step(n, {"loss": NAN if n in (5, 8) else 1.0}, samples) for n in range(4, 9)]
    assert counts == [True, False, True, True, False]
    assert check.skipped == 3
    assert lines[0] == (
        "step 5: the loss is not finite (rank 1, samples a, b); skipped, 2 of"
        " train.skip_nonfinite: 3"
    )
    with pytest.raises(Diverged, match=r"\); 3 steps were skipped before; lower train\.lr$"):
        check.step(9, {"loss": NAN}, samples)


def test_a_spike_is_reported_once() -> None:
    lines = Lines()
    check = lines.check()
    losses = [2.0] * 30 + [20.0, 20.1, 300.0, 2.0, 50.0] + [2.0] * WINDOW + [40.0]
    for step, loss in enumerate(losses, 1):
        assert check.step(step, {"loss": loss, "grad_norm": 1.0}, samples)
    assert lines == [
        "step 32: loss 20.1 is 10 times the median of the last steps",
        f"step {len(losses)}: loss 40 is 20 times the median of the last steps",
    ]


def test_the_first_steps_and_a_loss_of_zero_are_no_spikes() -> None:
    first, zero = Spikes(), Spikes()
    assert [first.add(step, 100.0**step) for step in range(FEWEST)] == [None] * FEWEST
    assert [zero.add(step, step % 50 == 40) for step in range(100)] == [None] * 100


def test_the_guilty_passes_are_named() -> None:
    worker = Worker(0, 1, torch.device("cpu"))
    worker.passes = [
        (lambda: [f"s{n}" for n in range(20)], torch.tensor(1.0)),
        (lambda: ["b", "c", "b"], torch.tensor(NAN)),
    ]
    assert name_samples(worker) == "rank 0, samples b, c"
    del worker.passes[1]  # only the gradient is not finite
    assert name_samples(worker) == "rank 0, samples s0, s1, s2, s3, s4, s5, s6, s7 and 12 more"


def test_all_kinds_of_weights_are_looked_at() -> None:
    good = [torch.ones(3), torch.zeros(0), torch.tensor([7]), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(good) and all_finite([])
    for bad in (NAN, INF, -INF):
        assert not all_finite([*good, torch.tensor([1.0, bad])])
        assert not all_finite([*good, torch.tensor([bad], dtype=torch.bfloat16)])
    assert all_finite([torch.tensor([3e38, -3e38])])


@pytest.mark.parametrize(
    ("rank", "shard", "finite"),
    [
        (1, [1.0, NAN], True),  # 3 values on 2 ranks: the last is padding
        (1, [NAN, 0.0], False),
        (2, [NAN, NAN], True),  # of 4 ranks: padding only
        (0, [1.0, NAN], False),
    ],
)
def test_padding_of_shards_is_not_looked_at(rank: int, shard: list[float], finite: bool) -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.ds_numel, module.weight.ds_tensor = 3, torch.tensor(shard)
    worker = Worker(rank, 1, torch.device("cpu"))  # one rank's verdict
    assert weights_finite(module, worker) is finite
