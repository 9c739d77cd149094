"""Work on one token at a time, done for some tokens after the other.

Between the cores of attention every op of a block maps a token to a token. So a long row need not
go through it at once: what lies between input and output, six hidden sizes in the experts alone,
then exists for one chunk of tokens only. Backward each chunk is computed again and its gradients
follow at once; the row's inputs are all that is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def in_chunks(
    function: Function, size: int, rows: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`function(*rows, *shared)` for `size` tokens at a time, put together.

    Args:
        function: of tensors whose first dim are tokens, to one or a tuple of the same kind, each
            token by itself. It must have no other way to anything that needs a gradient.
        size: tokens of a chunk, the last of which may be shorter.
        rows: `[tokens, ...]` each.
        shared: weights. Their gradients are summed over chunks in fp32 at least.
    """
    outputs: tuple[Tensor, ...] = _Chunks.apply(function, size, len(rows), *rows, *shared)
    return outputs


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Function, size: int, num_rows: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.size, ctx.num_rows = function, size, num_rows
        ctx.save_for_backward(*tensors)
        rows, shared = tensors[:num_rows], tensors[num_rows:]
        tokens = rows[0].shape[0]
        outputs: list[Tensor] = []
        for chunk in _slices(tokens, size):
            parts = _as_tuple(function(*(row[chunk] for row in rows), *shared))
            if not outputs:
                outputs = [part.new_empty(tokens, *part.shape[1:]) for part in parts]
            for output, part in zip(outputs, parts, strict=True):
                output[chunk] = part
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        rows, shared = tensors[: ctx.num_rows], tensors[ctx.num_rows :]
        needed = ctx.needs_input_grad[3:]
        d_rows = [
            torch.empty_like(row) if need else None
            for row, need in zip(rows, needed[: ctx.num_rows], strict=True)
        ]
        d_shared: list[Tensor | None] = [None] * len(shared)
        for chunk in _slices(rows[0].shape[0], ctx.size):
            inputs = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip([*(r[chunk] for r in rows), *shared], needed, strict=True)
            ]
            with torch.enable_grad():
                parts = _as_tuple(ctx.function(*inputs))
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            # Some outputs may depend on nothing but frozen weights.
            live = [index for index, part in enumerate(parts) if part.requires_grad]
            of_parts = [gradients[index][chunk] for index in live]
            found = iter(torch.autograd.grad([parts[i] for i in live], wanted, of_parts))
            del parts, inputs
            for d_row in d_rows:
                if d_row is not None:
                    d_row[chunk] = next(found)
            for index, need in enumerate(needed[ctx.num_rows :]):
                if need:
                    d_shared[index] = _add(d_shared[index], next(found))
        sums = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(d_shared, shared, strict=True)
        ]
        return None, None, None, *d_rows, *sums


def _slices(tokens: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size)]


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    if total is None:
        # A copy in any case: what autograd hands out may be shared.
        return part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
    return total.add_(part)
