"""Rotary position embedding on Triton: one pass over x, its gradient by the same kernel.

A row is one head of one token. A program owns 8 KiB of rows of one batch entry, for 128 threads
four 16-byte loads each: with 8 programs on a multiprocessor 64 KiB are in flight. The tables are
read for every row, but a token's heads find them in the cache, and memory gives them once.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8192
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def rope_kernel(
    x,
    cos,
    sin,
    out,
    batch_stride,
    token_stride,
    head_stride,
    rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
):
    """`rows` = tokens * heads of one batch entry; the number of columns are powers of two."""
    tiles = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    token = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    source = x + batch * batch_stride + token * token_stride + head * head_stride
    target = out + (batch * rows + row) * HEAD_DIM
    column = tl.arange(0, HALF_COLUMNS)[None, :]
    inside = (row < rows) & (column < HALF)
    low = tl.load(source + column, mask=inside, other=0.0)
    high = tl.load(source + HALF + column, mask=inside, other=0.0)
    c = tl.load(cos + token * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=inside, other=0.0)
    if HEAD_DIM > 2 * HALF:
        rest_column = 2 * HALF + tl.arange(0, REST_COLUMNS)[None, :]
        rest_inside = (row < rows) & (rest_column < HEAD_DIM)
        rest = tl.load(source + rest_column, mask=rest_inside, other=0.0)
        tl.store(target + rest_column, rest, mask=rest_inside)
    if INVERSE:
        s = -s
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(target + column, (low * c - high * s).to(dtype), mask=inside)
    tl.store(target + HALF + column, (high * c + low * s).to(dtype), mask=inside)


@torch.library.custom_op("fulmen::rope", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotation by the angle of the tables, or by its negative: the gradient of the former."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    # Autograd chooses the layout of the gradients that it hands in; the kernel needs whole rows.
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, tokens, heads, head_dim = x.shape
    half = cos.shape[1]
    tile_rows = max(1, TILE_BYTES // x.element_size() // triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(x):
        rope_kernel[(batch * triton.cdiv(tokens * heads, tile_rows),)](
            x,
            cos.float().contiguous(),
            sin.float().contiguous(),
            out,
            *x.stride()[:3],
            tokens * heads,
            HEADS=heads,
            HEAD_DIM=head_dim,
            HALF=half,
            INVERSE=inverse,
            ROWS=tile_rows,
            HALF_COLUMNS=triton.next_power_of_2(half),
            REST_COLUMNS=triton.next_power_of_2(head_dim - 2 * half),
            num_warps=NUM_WARPS,
        )
    return out


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return _rotate(d_out, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_backward, setup_context=_setup_context)


def triton_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` by the Triton kernel, for fp32 or bf16 x and tables of at least one angle."""
    return _rotate(x, cos, sin, False)
