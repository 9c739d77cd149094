"""Chunked head + cross entropy in plain torch; the gradient is computed in the forward pass."""

from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype

IGNORE_INDEX = -100


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """`summed_cross_entropy` with logits in fp32 at least and the weight's gradient summed in it.

    Args:
        chunk_bytes: of fp32 logits; at least one token is visited at a time.
    """
    if not torch.is_grad_enabled():
        # A parameter asks for its gradient even under no_grad.
        hidden, weight = hidden.detach(), weight.detach()
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    total, losses = _LinearCrossEntropy.apply(hidden, weight, labels, z_loss, rows)
    return total, losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        accumulate = accumulation_dtype(hidden)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        losses = torch.empty(labels.shape, dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk, target = hidden[part], labels[part]
            kept = target != IGNORE_INDEX
            index = target.clamp(0, weight.shape[0] - 1).unsqueeze(1)
            logits = (chunk @ weight.t()).to(accumulate)
            log_z = torch.logsumexp(logits, dim=1) if z_loss else logits.new_zeros(len(logits))
            log_probabilities = torch.log_softmax(logits, dim=1)
            del logits
            loss = z_loss * log_z.square() - log_probabilities.gather(1, index).squeeze(1)
            loss = loss.where(index.squeeze(1) == target, torch.nan)
            losses[part] = loss.where(kept, 0.0)
            total += losses[part].sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = (1 + 2 z log Z) softmax - one_hot(label), 0 where ignored.
            grad = log_probabilities.exp_()
            if z_loss:
                grad.mul_((1 + 2 * z_loss * log_z).unsqueeze(1))
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            grad.mul_(kept.unsqueeze(1))
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = low @ weight
            if grad_weight is not None:
                grad_weight += low.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_output, _ = grad_outputs
        # In grad_output's type: a bf16 tensor times a fp32 number would round the number first.
        hidden, weight = (
            None if grad is None else (grad.to(grad_output.dtype) * grad_output).to(ctx.dtype)
            for grad in ctx.saved_tensors
        )
        return hidden, weight, None, None, None


@torch.no_grad()
def chunked_token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_bytes: int
) -> Tensor:
    """`token_cross_entropy`, some tokens at a time."""
    losses = hidden.new_zeros(labels.shape, dtype=accumulation_dtype(hidden))
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = (hidden[part] @ weight.t()).to(losses.dtype)
        losses[part] = torch.nn.functional.cross_entropy(
            logits, labels[part], ignore_index=IGNORE_INDEX, reduction="none"
        )
    return losses
