"""How a token is drawn."""

import pytest
import torch

from fulmen.trainer.generate import _sample

pytestmark = pytest.mark.fast

LOGITS = torch.tensor([1.0, 3.0, 2.5, -4.0])


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("temperature", [5e-324, 1e-60, 1e-40, 1e-3])
def test_the_coldest_draw_is_the_most_likely_token(temperature: float, top_k: int | None) -> None:
    for logits in (LOGITS, 1e30 * LOGITS, LOGITS - 1e4):
        generator = torch.Generator().manual_seed(0)
        drawn = {_sample(logits, temperature, top_k, generator) for _ in range(20)}
        assert drawn == {1}


def test_the_hottest_draw_is_any_of_those_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {_sample(LOGITS, 1e300, None, generator) for _ in range(100)} == {0, 1, 2, 3}
    assert {_sample(LOGITS, 1e300, 2, generator) for _ in range(100)} == {1, 2}


def test_draws_follow_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [_sample(LOGITS, 0.8, 3, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    weights = torch.tensor([*(LOGITS[:3] / 0.8).exp(), 0.0])
    assert torch.allclose(shares, weights / weights.sum(), atol=0.03)
