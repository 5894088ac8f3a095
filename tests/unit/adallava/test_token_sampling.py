"""Token sampling against transformers' logits warpers."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from fmray.adallava.token_sampling import nucleus, sample, sample_rows


@pytest.mark.parametrize("vocabulary", [11, 4000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_sample_draws_what_the_warpers_and_multinomial_draw(
    vocabulary: int, temperature: float, top_p: float
) -> None:
    logits = 3 * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[
        :, 0
    ]
    tokens = sample(logits, temperature, top_p, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, expected)


def test_each_row_has_its_own_temperature_and_top_p() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    temperature, top_p = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.2, 0.9, 1.0])
    together = sample_rows(logits, numbers, temperature, top_p)
    for row in range(3):
        part = slice(row, row + 1)
        alone = sample_rows(logits[part], numbers[part], temperature[part], top_p[part])
        assert alone[0] == together[row]


def test_the_nucleus_includes_the_token_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for top_p, size in ((0.0, 1), (0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3)):
        probabilities, tokens = nucleus(logits, 1.0, top_p)
        assert tokens[0].tolist() == [1, 2, 0]
        assert int((probabilities > 0).sum()) == size


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1)])
def test_out_of_range_parameters_are_an_error(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        sample(torch.zeros(1, 3), temperature, top_p, None)
