"""The public op: argument checks, and the choice between Triton and the reference."""

import torch
from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.cross_entropy.reference import (
    IGNORE_INDEX,
    chunked_linear_cross_entropy,
    chunked_token_cross_entropy,
)
from fulmen.kernels.registry import choose

__all__ = [
    "CHUNK_BYTES",
    "IGNORE_INDEX",
    "linear_cross_entropy",
    "summed_cross_entropy",
    "token_cross_entropy",
]

CHUNK_BYTES = 256 * 2**20
"""Of the torch implementation: fp32 logits of one chunk; two of these are alive at once."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """Sum over tokens of `-log softmax(weight @ hidden)[label]`, in nats, as an fp32 scalar.

    Args:
        hidden: `[tokens, hidden_size]`.
        weight: `[vocab_size, hidden_size]`, of the same dtype.
        labels: `[tokens]` int64; `IGNORE_INDEX` tokens contribute nothing. Any other label outside
            the vocabulary makes the loss NaN; nothing is read out of bounds.
        z_loss: adds `z_loss * logsumexp(logits)^2` per token (PaLM, arXiv:2204.02311, section 5).

    Returns:
        The sum (fp64 for fp64 inputs). The logits are formed for some tokens at a time, and the
        gradients in the same visit, so memory does not grow with tokens x vocabulary. Where Triton
        runs, backward scales these gradients in place: a second backward through one result raises
        torch's error about a tensor changed in place.
    """
    return summed_cross_entropy(hidden, weight, labels, z_loss=z_loss)[0]


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and beside it the loss of each token, which it is the sum of.

    These are `[tokens]` fp32 (fp64 for fp64), 0 where `IGNORE_INDEX`, without gradients; they cost
    nothing more.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be [tokens, hidden_size] and labels [tokens], "
            f"got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            "linear_cross_entropy: weight must be [vocab_size, hidden_size] and typed like hidden, "
            f"got {tuple(weight.shape)} {weight.dtype} for {tuple(hidden.shape)} {hidden.dtype}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels must be int64, got {labels.dtype}")
    reason = why_not_triton(hidden, weight)
    if choose("cross_entropy", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.cross_entropy.triton_cross_entropy import triton_summed_cross_entropy

        return triton_summed_cross_entropy(hidden, weight, labels, z_loss=z_loss)
    return chunked_linear_cross_entropy(
        hidden, weight, labels, z_loss=z_loss, chunk_bytes=CHUNK_BYTES
    )


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, `[tokens]` fp32 (fp64 for fp64), 0 where `IGNORE_INDEX`.

    For evaluation: no gradients, and torch alone. Arguments as in `linear_cross_entropy`; a label
    outside the vocabulary is an error. The logits are formed for some tokens at a time.
    """
    return chunked_token_cross_entropy(hidden, weight, labels, chunk_bytes=CHUNK_BYTES)
