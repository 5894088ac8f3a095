"""One batch under many plans: equal to one forward per plan, with fewer layers run."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from support.tiny_models import adaptive, batch, qwen_batch, tiny_llava, tiny_qwen2_vl


def plans_of_size(units: int, units_on: int) -> torch.Tensor:
    chosen = list(combinations(range(units), units_on))
    return torch.tensor([[unit in on for unit in range(units)] for on in reversed(chosen)])


@pytest.mark.parametrize("token", ["inline", "probe"])
@pytest.mark.parametrize("design", ["layers", "heads"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2_vl"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_one_forward_per_plan(family: str, design: str, token: str, side: str) -> None:
    qwen = family == "qwen2_vl"
    model = adaptive(tiny_qwen2_vl() if qwen else tiny_llava(family), design, latency_token=token)
    data = (qwen_batch if qwen else batch)([7, 12, 9], side)
    if not qwen:
        data = batch([7, 12, 9], side, answers=[3, 1, 2])
    units = model.layout.num_units
    for units_on in (0, units // 2, units):
        plans = plans_of_size(units, units_on)
        seen = set()
        for index, logits in model.logits_under(plans, **data):
            with torch.no_grad():
                expected = model(**data, plan=plans[index].expand(3, -1)).logits
            attended = data["attention_mask"].bool()
            torch.testing.assert_close(logits[attended], expected[attended], atol=1e-5, rtol=1e-4)
            seen.add(index)
        assert seen == set(range(len(plans)))


def test_layers_that_plans_share_from_the_start_run_once() -> None:
    model = adaptive(tiny_llava(layers=6), first=2, latency_token="probe")
    calls = [0] * 6
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    plans = plans_of_size(4, 2)
    assert len(list(model.logits_under(plans, **batch([8, 6])))) == 6
    # a unit that is on runs once for each distinct beginning of a plan that ends with it
    expected = [len({tuple(p[: end + 1]) for p in plans.tolist() if p[end]}) for end in range(4)]
    assert calls == [1, 1, *expected]


def test_plans_of_different_sizes_are_an_error() -> None:
    model = adaptive(tiny_llava(layers=6), first=2)
    with pytest.raises(
        ValueError, match=r"plans must be \[P, 4\] with the same number .* \[1, 4\]"
    ):
        list(model.logits_under(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]).bool(), **batch([8])))
    with pytest.raises(ValueError, match=r"plans must be \[P, 4\]"):
        list(model.logits_under(torch.ones(1, 3).bool(), **batch([8])))
