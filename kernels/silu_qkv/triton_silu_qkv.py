"""SiLU and the split of a joint projection on Triton: one pass over each tensor.

The projection is `[rows, 3, head_dim]` with one row for each token and head. A program owns a tile
of rows, 4 KiB of each of q, k and v: the 12 KiB that it reads of the projection lie side by side.
With 16-byte loads a thread has 96 bytes in flight forward (128 threads) and as many backward (256),
so 32 KiB a multiprocessor need three programs forward and two backward.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.triton_common import silu, silu_gradient

TILE_BYTES = 4096
FORWARD_WARPS = 4
BACKWARD_WARPS = 8


@triton.jit
def tile_of(rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets in the projection's q, offsets in q alone, which of them exist), int64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < HEAD_DIM)
    return row * (3 * HEAD_DIM) + column, row * HEAD_DIM + column, inside


@triton.jit(do_not_specialize=["rows"])
def silu_qkv_kernel(
    qkv, q, k, v, rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    joint, alone, inside = tile_of(rows, HEAD_DIM, ROWS, COLUMNS)
    # All loads stand before the first use, so that they are in flight together.
    xq = tl.load(qkv + joint, mask=inside, other=0.0)
    xk = tl.load(qkv + joint + HEAD_DIM, mask=inside, other=0.0)
    xv = tl.load(qkv + joint + 2 * HEAD_DIM, mask=inside, other=0.0)
    tl.store(q + alone, silu(xq).to(q.dtype.element_ty), mask=inside)
    tl.store(k + alone, silu(xk).to(k.dtype.element_ty), mask=inside)
    tl.store(v + alone, silu(xv).to(v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def silu_qkv_backward_kernel(
    qkv,
    dq,
    dk,
    dv,
    d_qkv,
    rows,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    joint, alone, inside = tile_of(rows, HEAD_DIM, ROWS, COLUMNS)
    xq = tl.load(qkv + joint, mask=inside, other=0.0)
    xk = tl.load(qkv + joint + HEAD_DIM, mask=inside, other=0.0)
    xv = tl.load(qkv + joint + 2 * HEAD_DIM, mask=inside, other=0.0)
    yq = tl.load(dq + alone, mask=inside, other=0.0)
    yk = tl.load(dk + alone, mask=inside, other=0.0)
    yv = tl.load(dv + alone, mask=inside, other=0.0)
    dtype = d_qkv.dtype.element_ty
    tl.store(d_qkv + joint, silu_gradient(yq, xq).to(dtype), mask=inside)
    tl.store(d_qkv + joint + HEAD_DIM, silu_gradient(yk, xk).to(dtype), mask=inside)
    tl.store(d_qkv + joint + 2 * HEAD_DIM, silu_gradient(yv, xv).to(dtype), mask=inside)


def _run(kernel: Any, qkv: Tensor, num_heads: int, others: list[Tensor], num_warps: int) -> None:
    if not qkv.numel():
        return
    head_dim = qkv.shape[-1] // (3 * num_heads)
    rows = qkv.numel() // (3 * head_dim)
    columns = triton.next_power_of_2(head_dim)
    tile_rows = max(1, TILE_BYTES // qkv.element_size() // columns)
    with torch.cuda.device_of(qkv):
        kernel[(triton.cdiv(rows, tile_rows),)](
            qkv.contiguous(),
            *(x.contiguous() for x in others),
            rows,
            HEAD_DIM=head_dim,
            ROWS=tile_rows,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def _empty_parts(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:-1], num_heads, qkv.shape[-1] // (3 * num_heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    return q, k, v


@torch.library.custom_op("fulmen::silu_qkv", mutates_args=())
def triton_silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`silu_qkv` by the Triton kernels, for fp32 or bf16 arguments that it has checked."""
    parts = _empty_parts(qkv, num_heads)
    _run(silu_qkv_kernel, qkv, num_heads, list(parts), FORWARD_WARPS)
    return parts


@triton_silu_qkv.register_fake
def _(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_parts(qkv, num_heads)


@torch.library.custom_op("fulmen::silu_qkv_backward", mutates_args=())
def triton_silu_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, num_heads: int
) -> Tensor:
    """Gradient of the projection, contiguous. Autograd chooses the layout of dq, dk, dv."""
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _run(silu_qkv_backward_kernel, qkv, num_heads, [dq, dk, dv, d_qkv], BACKWARD_WARPS)
    return d_qkv


@triton_silu_qkv_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return triton_silu_qkv_backward(dq, dk, dv, qkv, ctx.num_heads), None


triton_silu_qkv.register_autograd(_backward, setup_context=_setup_context)
