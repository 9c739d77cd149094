"""SwiGLU experts whose weights get their gradients later than their rows.

Autograd runs what was made last first. So the gradients of matrices that were handed out by
`with_late_gradients` are computed when the backward pass comes back to that call, behind all that
was made after it and waits for the gradient of the rows alone: an exchange of it that was begun is
under way beside these products.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.kernels.moe.reference import (
    reference_experts,
    reference_rows_backward,
    reference_weights_backward,
)


class LateGradients:
    """What one backward pass leaves to be done for the weights."""

    def __init__(self) -> None:
        self.compute: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None


def with_late_gradients(
    w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, LateGradients]:
    """The last four arguments of one call of `grouped_swiglu`."""
    late = LateGradients()
    return *_Weights.apply(w1, w3, w2, late), late


class Passes(NamedTuple):
    """How one implementation computes the experts."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(x, counts, w1, w3, w2) to the output, and the rows of gate and up."""
    rows: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    """(dy, x, counts, w1, w3, w2, gate, up) to the gradient of x, and what `weights` takes."""
    weights: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """To the gradients of w1, w3 and w2."""


def late_grouped_swiglu(
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    implementation: str,
    late: LateGradients,
) -> Tensor:
    """`grouped_swiglu` of matrices with late gradients."""
    if implementation == "torch":
        passes = Passes(reference_experts, reference_rows_backward, reference_weights_backward)
    else:
        from fulmen.kernels.moe import triton_experts as fused

        forward = partial(fused.fused_experts, implementation=implementation)
        rows = partial(fused.rows_backward, implementation=implementation)
        weights = partial(fused.weights_backward, implementation=implementation)
        passes = Passes(forward, rows, weights)
    y: Tensor = _Rows.apply(x, counts, w1, w3, w2, passes, late)
    return y


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, ctx.passes, ctx.late = arguments
        y, gate, up = ctx.passes.forward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradients[0] is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        dx, rest = ctx.passes.rows(gradients[0], *saved)
        if any(ctx.needs_input_grad[2:5]):
            ctx.late.compute = partial(ctx.passes.weights, *rest)
        # The matrices stand for their gradients: without a tensor of the device autograd would run
        # the other half in another thread, at any time.
        return dx, None, *saved[2:5], None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *matrices, ctx.late = arguments
        ctx.set_materialize_grads(False)
        return tuple(matrix.view_as(matrix) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        compute, ctx.late.compute = ctx.late.compute, None
        return (None,) * 4 if compute is None else (*compute(), None)
