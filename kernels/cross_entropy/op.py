"""Chunked head + cross entropy; the gradient is computed during the forward pass."""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_BYTES = 256 * 2**20  # fp32 logits of one chunk; two of these are alive at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of `-log softmax(weight @ hidden)[label]`, in nats, as an fp32 scalar.

    Args:
        hidden: `[tokens, hidden_size]`.
        weight: `[vocab_size, hidden_size]`.
        labels: `[tokens]` int64; `IGNORE_INDEX` tokens contribute nothing.

    The logits are formed for a few tokens at a time (`CHUNK_BYTES` in fp32), forward and
    backward in the same visit, so memory does not grow with tokens x vocabulary.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [tokens, hidden_size] and labels [tokens], "
            f"got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    if not torch.is_grad_enabled():
        # A parameter asks for its gradient even under no_grad.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk, target = hidden[part], labels[part]
            kept = target != IGNORE_INDEX
            index = target.clamp(min=0).unsqueeze(1)
            logits = (chunk @ weight.t()).to(accumulate)
            log_probabilities = torch.log_softmax(logits, dim=1)
            del logits
            total -= (log_probabilities.gather(1, index).squeeze(1) * kept).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot(label), 0 where ignored.
            grad = log_probabilities.exp_()
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            grad.mul_(kept.unsqueeze(1))
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = low @ weight
            if grad_weight is not None:
                grad_weight += low.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_output,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
