"""SwiGLU on Triton: one pass over each tensor, forward and backward.

A program owns a tile of rows x columns, 4 KiB of each tensor. At 128 threads that is two 16-byte
loads a thread and tensor: with 8 programs on a multiprocessor 64 KiB are in flight forward and
96 KiB backward, twice what the memory's latency needs.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.common import as_rows
from fulmen.kernels.triton_common import silu, silu_gradient

TILE_BYTES = 4096
NUM_WARPS = 4
NARROWEST_TILE = 128
"""Columns, for row lengths that no large power of two divides."""


@triton.jit
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row numbers as int64 [ROWS, 1], column numbers [1, COLUMNS], which of them exist)."""
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    gate, up, out, gate_stride, up_stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, inside = tile_of(rows, columns, ROWS, COLUMNS)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
    y = silu(g) * u.to(tl.float32)
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    d_out,
    gate,
    up,
    d_gate,
    d_up,
    d_out_stride,
    gate_stride,
    up_stride,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = tile_of(rows, columns, ROWS, COLUMNS)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
    dy = tl.load(d_out + row * d_out_stride + column, mask=inside, other=0.0)
    g = g.to(tl.float32)
    dy = dy.to(tl.float32)
    dg = silu_gradient(dy * u.to(tl.float32), g)
    du = dy * g * tl.sigmoid(g)
    target = row * columns + column
    tl.store(d_gate + target, dg.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + target, du.to(d_up.dtype.element_ty), mask=inside)


def _run(kernel: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    if not outputs[0].numel():
        return
    inputs = [as_rows(x) for x in inputs]
    rows, columns = inputs[0].shape
    size = TILE_BYTES // outputs[0].element_size()
    # The largest power of two that divides a row leaves no thread idle.
    wide = min(size, max(NARROWEST_TILE, columns & -columns))
    programs = triton.cdiv(rows, size // wide) * triton.cdiv(columns, wide)
    with torch.cuda.device_of(outputs[0]):
        kernel[(programs,)](
            *inputs,
            *outputs,
            *(x.stride(0) for x in inputs),
            rows,
            columns,
            ROWS=size // wide,
            COLUMNS=wide,
            num_warps=NUM_WARPS,
        )


@torch.library.custom_op("fulmen::swiglu", mutates_args=())
def triton_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by the Triton kernels, for fp32 or bf16 arguments that it has checked."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(swiglu_kernel, [gate, up], [out])
    return out


@triton_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("fulmen::swiglu_backward", mutates_args=())
def triton_swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous. Autograd chooses the layout of `d_out`."""
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_up = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(swiglu_backward_kernel, [d_out, gate, up], [d_gate, d_up])
    return d_gate, d_up


@triton_swiglu_backward.register_fake
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return d_gate, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return triton_swiglu_backward(d_out, *ctx.saved_tensors)


triton_swiglu.register_autograd(_backward, setup_context=_setup_context)
