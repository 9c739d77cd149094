"""Direct preference optimisation (DPO, arXiv:2305.18290): losses by document, and what they make.

The loss of a pair depends on the log-probabilities of whole answers, each a sum over its tokens.
Its gradient with respect to such a sum is one number a document, which is known only when all sums
are. So the head runs twice: forward for the sums alone, and backward, document by document with
that number, for gradients. The layers below run once. Logits are formed for some tokens at a time
in both, and no kernel has to know of weights by token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fulmen.kernels.cross_entropy import linear_cross_entropy, token_cross_entropy


def document_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, lengths: Sequence[int]
) -> Tensor:
    """`linear_cross_entropy` of each document of a packed row.

    Args:
        hidden: `[tokens, hidden_size]`.
        weight: `[vocab_size, hidden_size]`.
        labels: `[tokens]` int64, -100 for none, as of a question and of padding.
        lengths: tokens of each document, on the host; they sum to `tokens`.

    Returns:
        `[documents]`: minus the log-probability of each one's labels, fp32 (fp64 for fp64).
    """
    if sum(lengths) != hidden.shape[0]:
        raise ValueError(f"documents of {sum(lengths)} tokens in a row of {hidden.shape[0]}")
    losses: Tensor = _ByDocument.apply(hidden, weight, labels, tuple(lengths))
    return losses


class _ByDocument(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.lengths = lengths
        losses = token_cross_entropy(hidden, weight, labels)
        return torch.stack([part.sum() for part in losses.split(lengths)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total: Tensor | None = None
        if ctx.needs_input_grad[1]:
            # Summed over documents in fp32 at least.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros_like(weight, dtype=dtype)
        first = 0
        for length, gradient in zip(ctx.lengths, gradients[0].unbind(), strict=True):
            part = slice(first, first + length)
            first += length
            d_rows = None if d_hidden is None else d_hidden[part]
            _add_gradients(hidden[part], weight, labels[part], gradient, d_rows, total)
        return d_hidden, None if total is None else total.to(weight.dtype), None, None


def _add_gradients(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    gradient: Tensor,
    d_rows: Tensor | None,
    total: Tensor | None,
) -> None:
    """Of one document: `d_rows` is written, `total` added to. What it holds is free behind it."""
    rows = rows.detach().requires_grad_(d_rows is not None)
    weight = weight.detach().requires_grad_(total is not None)
    wanted = [one for one in (rows, weight) if one.requires_grad]
    with torch.enable_grad():
        loss = linear_cross_entropy(rows, weight, labels)
    found = iter(torch.autograd.grad(loss, wanted, gradient))
    if d_rows is not None:
        d_rows.copy_(next(found))
    if total is not None:
        total += next(found)


class PreferenceLoss(NamedTuple):
    """Sums over pairs; all but the first are without gradients."""

    loss: Tensor
    reward_margin: Tensor
    """By how much the chosen answer's reward, beta times its log-ratio, is above the other's."""
    reward_accuracy: Tensor
    """1 for each pair whose margin is above 0."""
    chosen_log_ratio: Tensor
    """By how much the answer's log-probability is above the reference's, in nats."""
    rejected_log_ratio: Tensor


def preference_loss(policy: Tensor, reference: Tensor, *, beta: float) -> PreferenceLoss:
    """`-log sigmoid(beta ((pc - rc) - (pr - rr)))`, summed over pairs.

    Args:
        policy: `[pairs, 2]` log-probabilities of the chosen and the rejected answers.
        reference: the same of the reference, without gradients.
    """
    log_ratios = policy - reference.detach()
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    loss = -functional.logsigmoid(margins).sum()
    margins, sums = margins.detach(), log_ratios.detach().sum(0)
    return PreferenceLoss(loss, margins.sum(), (margins > 0).sum(), sums[0], sums[1])
