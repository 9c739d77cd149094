"""Lightning attention on Triton: the plan of segments, the launches, torch ops with autograd.

`triton_lightning_attention` is what a caller needs. The kernels and their cost are described in
triton_forward.py.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.lightning.triton_backward import backward_kernel
from fulmen.kernels.lightning.triton_forward import (
    carry_kernel,
    forward_kernel,
    local_state_kernel,
    segment_table_kernel,
)

DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128, 256)
SHORTEST_SEGMENT = 8
"""Chunks. A segment's state costs as much traffic as two chunks' k and v."""
FULL_ENOUGH = 0.75
"""Share of the multiprocessors that programs must fill before documents are left whole."""
PROCESSORS_WITHOUT_GPU = 8
"""The interpreter's chip."""
CARRY_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """How a scan is cut for one program. The widths must divide the head dimension."""

    block_tokens: int
    block_values: int
    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads where a program has a multiprocessor to itself."""
    stages_together: int
    """The same where two programs are to share one."""


def choose_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """The table for H100 and H200 (one chip but for its memory).

    Chosen by what the compiler reports for sm_90 (registers, shared memory, no spills in the loop);
    not timed yet. To be timed at head_dim 128: (64, 64, 8, 3, 3), which has no spills, a program
    per multiprocessor and twice the warps, and (64, 128, 8, 3, 2), which reads q and k once.
    """
    if dtype == torch.float32:
        # Exact fp32 products have no tensor cores: small tiles, for registers and compile time.
        return Tile(16, 16, 4, 1, 1)
    if head_dim <= 64:
        return Tile(64, head_dim, 4, 3, 3)
    if head_dim == 128:
        return Tile(64, 64, 4, 3, 2)
    return Tile(64, 32, 4, 2, 2)


def choose_segment_tokens(
    tokens: int, programs: int, *, block_tokens: int, num_processors: int
) -> int:
    """Longest segment, a power of two of chunks, that gives each multiprocessor two programs.

    `programs` would run were no document cut. Returns 0 if none is to be cut.
    """
    if programs >= FULL_ENOUGH * num_processors:
        return 0
    wanted = -(-2 * num_processors // max(1, programs))
    chunks = SHORTEST_SEGMENT
    while 2 * chunks * block_tokens * wanted <= tokens:
        chunks *= 2
    return chunks * block_tokens if chunks * block_tokens < tokens else 0


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Plan:
    """Sizes of all launches of one call; from shapes alone, so that fake tensors can make one."""

    tile: Tile
    batch: int
    tokens: int
    heads: int
    head_dim: int
    num_sequences: int
    segment_tokens: int
    """0: no document is cut, a segment is a sequence."""

    @property
    def segments_per_row(self) -> int:
        if not self.segment_tokens:
            return 1
        return max(1, -(-self.tokens // self.segment_tokens))

    def num_segments(self, packed: bool) -> int:
        """Exact for rows; for documents an upper bound, since their lengths are on the device."""
        if packed and self.segment_tokens:
            return self.tokens // self.segment_tokens + self.num_sequences
        return self.num_sequences * self.segments_per_row

    def num_cuts(self, packed: bool) -> int:
        """Like `num_segments`. A document of n tokens has (n - 1) // segment_tokens."""
        if packed and self.segment_tokens:
            return self.tokens // self.segment_tokens
        return self.num_sequences * (self.segments_per_row - 1)

    @property
    def slices(self) -> int:
        return self.head_dim // self.tile.block_values


def _make_plan(q: Tensor, cu_seqlens: Tensor | None, segment_tokens: int) -> Plan:
    batch, tokens, heads, head_dim = q.shape
    tile = choose_tile(q.dtype, head_dim)
    if segment_tokens == 0:
        segment_tokens = choose_segment_tokens(
            tokens,
            batch * heads * (head_dim // tile.block_values),
            block_tokens=tile.block_tokens,
            num_processors=_num_processors(q.device),
        )
    num_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Plan(tile, batch, tokens, heads, head_dim, num_sequences, segment_tokens)


class _Launcher:
    """The launches of one call: what all of them share, written once."""

    def __init__(self, plan: Plan, slopes: Tensor, cu_seqlens: Tensor | None) -> None:
        self.plan, self.slopes, self.cu_seqlens = plan, slopes, cu_seqlens
        self.packed = cu_seqlens is not None
        self.num_segments = plan.num_segments(self.packed)
        # 2^30 keeps `first + segment_tokens` inside int32 where a document is one segment.
        self.segment_tokens = plan.segment_tokens or 2**30
        self.table = self.first_segments = slopes  # never read unless packed
        if cu_seqlens is not None:
            self._make_table(cu_seqlens)

    def _make_table(self, cu_seqlens: Tensor) -> None:
        self.table = torch.empty(self.num_segments, 2, dtype=torch.int32, device=cu_seqlens.device)
        self.first_segments = torch.empty(
            self.plan.num_sequences, dtype=torch.int32, device=cu_seqlens.device
        )
        block = 64
        _run(
            segment_table_kernel,
            -(-self.num_segments // block),
            cu_seqlens,
            self.table,
            self.first_segments,
            self.plan.num_sequences,
            self.num_segments,
            self.segment_tokens,
            BLOCK_SEGMENTS=block,
            BLOCK_SEQUENCES=128,
            num_warps=4,
        )

    def sizes(self) -> dict[str, int]:
        return {
            "tokens": self.plan.tokens,
            "segment_tokens": self.segment_tokens,
            "segments_per_row": self.plan.segments_per_row,
            "heads": self.plan.heads,
        }

    def scan_options(self, *, together: bool = False) -> dict[str, Any]:
        tile = self.plan.tile
        together = together or self.plan.segment_tokens > 0
        return self.sizes() | {
            "HEAD_DIM": self.plan.head_dim,
            "BLOCK_TOKENS": tile.block_tokens,
            "BLOCK_VALUES": tile.block_values,
            "PACKED": self.packed,
            "num_warps": tile.num_warps,
            "num_stages": tile.stages_together if together else tile.num_stages,
        }

    @property
    def num_programs(self) -> int:
        return self.num_segments * self.plan.heads * self.plan.slices

    def documents(self) -> tuple[Tensor, Tensor]:
        return (self.slopes if self.cu_seqlens is None else self.cu_seqlens), self.table

    def cut_states(self, b: Tensor, c: Tensor, outer: Tensor | None, *, reverse: bool) -> Tensor:
        """Phases 1 and 2: the states at the cuts; `outer` are those that enter sequences."""
        plan = self.plan
        states = torch.empty(_cuts_shape(plan, self.packed), dtype=torch.float32, device=b.device)
        if not states.numel():
            return states
        cu_seqlens, table = self.documents()
        _run(
            local_state_kernel,
            self.num_programs,
            b,
            c,
            _strides(b),
            _strides(c),
            self.slopes,
            states,
            cu_seqlens,
            table,
            REVERSE=reverse,
            # It does little but read, so it takes more loads in flight.
            **self.scan_options() | {"num_stages": plan.tile.num_stages + 1},
        )
        size = plan.head_dim**2
        block = min(size, CARRY_BLOCK)
        _run(
            carry_kernel,
            plan.num_sequences * plan.heads * (size // block),
            states,
            states if outer is None else outer,
            self.slopes,
            cu_seqlens,
            self.first_segments,
            **self.sizes(),
            STATE_SIZE=size,
            BLOCK=block,
            PACKED=self.packed,
            HAS_OUTER=outer is not None,
            REVERSE=reverse,
            num_warps=4,
        )
        return states


def _cuts_shape(plan: Plan, packed: bool) -> tuple[int, ...]:
    return plan.num_cuts(packed), plan.heads, plan.head_dim, plan.head_dim


def _state_shape(plan: Plan) -> tuple[int, ...]:
    return plan.num_sequences, plan.heads, plan.head_dim, plan.head_dim


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launches over a grid of one axis, on the device of the first argument."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **options)


@torch.library.custom_op("fulmen::lightning_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state (empty unless asked for), states at the cuts (for the backward pass)."""
    plan = _make_plan(q, cu_seqlens, segment_tokens)
    launcher = _Launcher(plan, slopes, cu_seqlens)
    states = launcher.cut_states(k, v, initial_state, reverse=False)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    final = q.new_empty(_state_shape(plan) if output_final_state else (0,), dtype=torch.float32)
    _run(
        forward_kernel,
        launcher.num_programs,
        q,
        k,
        v,
        out,
        _strides(q),
        _strides(k),
        _strides(v),
        slopes,
        states if initial_state is None else initial_state,
        states,
        final,
        *launcher.documents(),
        HAS_OUTER=initial_state is not None,
        IS_CUT=states.numel() > 0,
        STORE_LEAVING=output_final_state,
        TRANSPOSED=False,
        **launcher.scan_options(),
    )
    return out, final, states


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _make_plan(q, cu_seqlens, segment_tokens)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        q.new_empty(_state_shape(plan) if output_final_state else (0,), dtype=torch.float32),
        q.new_empty(_cuts_shape(plan, cu_seqlens is not None), dtype=torch.float32),
    )


@torch.library.custom_op("fulmen::lightning_attention_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state (empty if there was none)."""
    plan = _make_plan(q, cu_seqlens, segment_tokens)
    launcher = _Launcher(plan, slopes, cu_seqlens)
    # Autograd chooses the layout of the gradients that it hands in; the kernels need whole rows.
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    gradients = launcher.cut_states(q, d_out, d_final, reverse=True)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    has_initial = initial_state is not None
    d_initial = q.new_empty(_state_shape(plan) if has_initial else (0,), dtype=torch.float32)
    _run(
        forward_kernel,
        launcher.num_programs,
        d_out,
        v,
        k,
        dq,
        _strides(d_out),
        _strides(v),
        _strides(k),
        slopes,
        states if initial_state is None else initial_state,
        states,
        d_initial,
        *launcher.documents(),
        HAS_OUTER=has_initial,
        IS_CUT=states.numel() > 0,
        STORE_LEAVING=False,
        TRANSPOSED=has_initial or states.numel() > 0,
        **launcher.scan_options(),
    )
    _run(
        backward_kernel,
        2 * launcher.num_programs,
        q,
        k,
        v,
        d_out,
        dk,
        dv,
        _strides(q),
        _strides(k),
        _strides(v),
        _strides(d_out),
        slopes,
        gradients if d_final is None else d_final,
        gradients,
        d_initial,
        *launcher.documents(),
        HAS_OUTER=d_final is not None,
        IS_CUT=gradients.numel() > 0,
        STORE_LEAVING=has_initial,
        **launcher.scan_options(together=True),
    )
    return dq, dk, dv, d_initial


@_attend_backward.register_fake
def _(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = _make_plan(q, cu_seqlens, segment_tokens)
    shape = (0,) if initial_state is None else _state_shape(plan)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return dq, dk, dv, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, slopes, cu_seqlens, initial_state, output_final_state, segment_tokens = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, slopes, cu_seqlens, initial_state, output[2])
    ctx.output_final_state = output_final_state
    ctx.segment_tokens = segment_tokens


def _backward(
    ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, cu_seqlens, initial_state, states = ctx.saved_tensors
    dq, dk, dv, d_initial = _attend_backward(
        torch.zeros_like(q) if d_out is None else d_out,
        d_final if ctx.output_final_state else None,
        q,
        k,
        v,
        slopes,
        cu_seqlens,
        initial_state,
        states,
        ctx.segment_tokens,
    )
    d_state = None if initial_state is None else d_initial
    return dq, dk, dv, None, None, d_state, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    segment_tokens: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` by the Triton kernels, for arguments whose shapes it has checked.

    Args:
        q, k, v: fp32 or bf16, one dtype; head_dim a power of two, 16 to 256. Any strides, but the
            numbers of a head must lie side by side (views of a joint projection do).
        slopes: receives no gradient.
        segment_tokens: length at which long sequences are cut for parallelism, a multiple of 64;
            0 chooses by heads, tokens and multiprocessors.

    Returns:
        Output, contiguous, and the final state in fp32 or None. A `ValueError` names what the
        kernels cannot take.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"lightning_attention: the Triton kernels need {name} in float32 or bfloat16 and "
                f"q, k, v of one dtype, got {x.dtype}"
            )
        if x.stride(3) != 1:
            raise ValueError(
                f"lightning_attention: {name} must be contiguous in its last dimension for the "
                f"Triton kernels (stride {x.stride(3)}); call .contiguous()"
            )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            "lightning_attention: the Triton kernels need a head_dim that is a power of two from "
            f"16 to 256, got {q.shape[3]}"
        )
    if segment_tokens % 64:
        raise ValueError(
            f"lightning_attention: segment_tokens must be a multiple of 64, got {segment_tokens}"
        )
    out, final_state, _ = _attend(
        q,
        k,
        v,
        slopes.detach().float().contiguous(),
        None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
        None if initial_state is None else initial_state.float().contiguous(),
        output_final_state,
        segment_tokens,
    )
    return out, final_state if output_final_state else None
