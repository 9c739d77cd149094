"""DPO against a hand-written reference in fp64: loss, metrics, every gradient."""

import pytest
import torch
from support.tiny import VOCAB_SIZE, tiny_engine, tiny_model
from support.worlds import run_world
from torch import Tensor

from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.preference import document_cross_entropy, preference_loss
from fulmen.models.text import TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.preference import (
    Pair,
    fill_rows,
    pack_pairs,
    pair_log_probabilities,
    reference_log_probabilities,
)

CPU = torch.device("cpu")
BETA = 0.3
SIZES = [(1, 1, 9), (7, 3, 1), (4, 20, 5), (2, 2, 2)]
"""Tokens of prompt, chosen and rejected answer."""


def make_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(3)

    def text(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist())

    return [
        Pair(f"pair {number}", *(text(size) for size in sizes))
        for number, sizes in enumerate(SIZES)
    ]


PAIRS = make_pairs()


def tiny(seed: int, dtype: torch.dtype = torch.float64) -> TextModel:
    model = TextModel(tiny_model(), MoEConfig())
    init_model(model, model.config, seed)
    return model.to(dtype)


def answer_by_hand(model: TextModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Log-probability of an answer, its document alone, from all logits."""
    text = torch.tensor([prompt + answer])
    logits = model(text[:, :-1])
    assert isinstance(logits, Tensor)
    found = torch.log_softmax(logits[0], dim=-1)[len(prompt) - 1 :]
    return found.gather(1, torch.tensor(answer)[:, None]).sum()


def by_hand(model: TextModel, pairs: list[Pair]) -> Tensor:
    return torch.stack(
        [
            torch.stack([answer_by_hand(model, p.prompt, a) for a in (p.chosen, p.rejected)])
            for p in pairs
        ]
    )


@pytest.mark.fast
def test_loss_and_every_gradient_are_those_of_the_formula() -> None:
    policy, plain, start = tiny(1), tiny(1), tiny(2)
    reference = by_hand(start, PAIRS).detach()
    values, output = pair_log_probabilities(policy, PAIRS, 70, CPU)
    result = preference_loss(values, reference, beta=BETA)
    (result.loss_sum / len(PAIRS)).backward()
    expected = by_hand(plain, PAIRS)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-11)
    differences = expected - reference
    margins = BETA * (differences[:, 0] - differences[:, 1])
    loss = torch.log1p(torch.exp(-margins)).sum()
    (loss / len(PAIRS)).backward()
    torch.testing.assert_close(result.loss_sum, loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.margin_sum, margins.sum().detach())
    torch.testing.assert_close(result.chosen_reward_sum, BETA * differences[:, 0].sum().detach())
    torch.testing.assert_close(result.rejected_reward_sum, BETA * differences[:, 1].sum().detach())
    assert result.num_right == sum(bool(margin > 0) for margin in margins)
    assert 0 < int(result.num_right) < len(PAIRS)
    for (name, ours), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad - theirs.grad).abs().max()) <= 1e-10 * scale, name
    assert output.loss_sum.shape == (2 * len(PAIRS) + 1,)


@pytest.mark.fast
def test_smoothing_mixes_both_directions() -> None:
    policy, reference = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    right = preference_loss(policy, reference, beta=BETA).loss_sum
    wrong = preference_loss(policy.flip(1), reference.flip(1), beta=BETA).loss_sum
    mixed = preference_loss(policy, reference, beta=BETA, label_smoothing=0.2).loss_sum
    torch.testing.assert_close(mixed, 0.8 * right + 0.2 * wrong)


@pytest.mark.fast
@pytest.mark.parametrize("frozen", ["none", "head", "below"])
def test_losses_by_document_with_frozen_factors(frozen: str) -> None:
    hidden = torch.randn(12, 8).double().requires_grad_(frozen != "below")
    weight = torch.randn(30, 8).double().requires_grad_(frozen != "head")
    labels = torch.randint(30, (12,))
    labels[[0, 5]] = -100
    factors, lengths = torch.tensor([0.5, -2.0, 3.0]).double(), [1, 7, 4]
    wanted = [one for one in (hidden, weight) if one.requires_grad]
    losses = document_cross_entropy(hidden, weight, labels, lengths)
    ours = torch.autograd.grad((factors * losses).sum(), wanted)
    tokens = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    expected = torch.stack([part.sum() for part in tokens.split(lengths)])
    torch.testing.assert_close(losses, expected)
    theirs = torch.autograd.grad((factors * expected).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.fast
def test_reference_values_do_not_depend_on_rows() -> None:
    model = tiny(2)
    expected = by_hand(model, PAIRS).tolist()
    for row_tokens in (31, 64):
        found = reference_log_probabilities(model, PAIRS, row_tokens=row_tokens, device=CPU)
        assert list(found) == [pair.key for pair in PAIRS]
        assert list(found.values()) == [pytest.approx(tuple(pair), rel=1e-10) for pair in expected]
    assert model.training
    assert len(list(fill_rows(PAIRS, 31))) > 1


@pytest.mark.fast
def test_a_pair_that_fits_no_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"pair pair 2: .*31 tokens of a row's 30"):
        list(fill_rows(PAIRS, 30))
    inputs = pack_pairs(PAIRS[:1], 12, CPU)
    assert inputs["document_lengths"] == [1, 9, 2]
    assert inputs["labels"][0, 10:].tolist() == [-100, -100]
    with pytest.raises(ValueError, match=r"per_document needs document_lengths"):
        tiny(1)(inputs["input_ids"], labels=inputs["labels"], per_document=True)


def gradients(device: torch.device) -> dict[str, Tensor]:
    model, engine = tiny_engine(device, ParallelConfig(zero_stage=3), seed=1)
    mesh = engine.mesh
    mine = PAIRS[mesh.dp_rank :: mesh.dp]
    engine.begin_micro_batch(is_last=True)
    values, _ = pair_log_probabilities(model, mine, 64, device)
    result = preference_loss(values, torch.zeros_like(values), beta=BETA)
    (result.loss_sum / len(PAIRS)).backward()
    return {name: p.grad.full_tensor() for name, p in engine.parameters.items()}  # type: ignore


@pytest.mark.slow
def test_pairs_over_two_ranks_and_zero_3() -> None:
    model = tiny(1, torch.float32)
    values, _ = pair_log_probabilities(model, PAIRS, 70, CPU)
    (preference_loss(values, torch.zeros_like(values), beta=BETA).loss_sum / len(PAIRS)).backward()
    for ours in run_world(gradients, 2):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            difference = (ours[name] - parameter.grad).norm()
            assert difference <= 1e-5 * parameter.grad.norm(), name
