"""Triton kernel of lightning attention's backward pass: dk and dv, scans from the right.

See triton_forward.py for the scan and its cost; dq is `forward_kernel`'s. dk and dv share a launch
because both read q and do (the second reader finds them in L2), and because 2 x 64 heads x 2
slices = 256 programs, two on each multiprocessor, hide each other's waiting.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from fulmen.kernels.lightning.triton_forward import RUNTIME_SIZES, scan_slice


@triton.jit
def choose(condition, x, y):
    """Elementwise choice between two triples of strides."""
    return (
        tl.where(condition, x[0], y[0]),
        tl.where(condition, x[1], y[1]),
        tl.where(condition, x[2], y[2]),
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def backward_kernel(
    q,
    k,
    v,
    d_out,
    dk,
    dv,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    slopes,
    outer_gradients,
    cut_gradients,
    leaving_gradients,
    cu_seqlens,
    table,
    tokens,
    segment_tokens,
    segments_per_row,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    IS_CUT: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
):
    """`dk = reverse scan(v, do, q)` and `dv = reverse scan(k, q, do)`.

    `outer_gradients`: of the final states; `cut_gradients`: of the states at the cuts;
    `leaving_gradients`: of the initial states. Grid: segments x heads x slices x (dk, dv), the last
    fastest.
    """
    is_dv = tl.program_id(0) % 2 == 1
    scan_slice(
        tl.where(is_dv, k, v),
        tl.where(is_dv, q, d_out),
        tl.where(is_dv, d_out, q),
        tl.where(is_dv, dv, dk),
        choose(is_dv, k_strides, v_strides),
        choose(is_dv, q_strides, d_out_strides),
        choose(is_dv, d_out_strides, q_strides),
        slopes,
        outer_gradients,
        cut_gradients,
        leaving_gradients,
        # States in memory are [key, value], like dv's own; dk's are transposed.
        tl.where(is_dv, HEAD_DIM, 1),
        tl.where(is_dv, 1, HEAD_DIM),
        is_dv,
        cu_seqlens,
        table,
        tokens,
        segment_tokens,
        segments_per_row,
        heads,
        tl.program_id(0) // 2,
        HEAD_DIM,
        BLOCK_TOKENS,
        BLOCK_VALUES,
        PACKED,
        HAS_OUTER,
        IS_CUT,
        STORE_LEAVING,
        True,
    )
