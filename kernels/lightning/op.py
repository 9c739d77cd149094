"""The public op: argument checks, and the choice between Triton and the reference."""

import functools
import itertools

import torch
from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.lightning.reference import chunked_lightning_attention
from fulmen.kernels.registry import choose

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Of the Triton kernels."""


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with decay: `S_t = exp(-slope) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`.

    Args:
        q, k, v: `[batch, tokens, heads, head_dim]`, one dtype; no scaling is applied.
        slopes: `[heads]` fp32, >= 0; the decay is `exp(-slope)` per token.
        cu_seqlens: `[sequences + 1]` int32 document boundaries of a packed row (batch 1), from 0
            to `tokens`; no state crosses a boundary. On a GPU, a row that goes on behind the last
            boundary is undefined there.
        initial_state: `[sequences, heads, head_dim, head_dim]`, key index first; `sequences` is the
            batch, or the number of packed documents. States of packed documents cost a call for
            each document, and the host waits for the lengths.
        output_final_state: also return the state after each sequence's last token.

    Returns:
        The output, shaped and typed like `v`, and the final state in fp32 (fp64 for fp64 inputs)
        or None. Sums and states are fp32 at least, whatever the input type.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 4:
        raise ValueError(
            "lightning_attention: q, k, v must share one shape [batch, tokens, heads, head_dim], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if slopes.shape != (q.shape[2],):
        raise ValueError(f"lightning_attention: slopes must be [{q.shape[2]}], one per head")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError("lightning_attention: cu_seqlens needs batch 1 (one packed row)")
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state_shape = (num_sequences, q.shape[2], q.shape[3], q.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"lightning_attention: initial_state must be {state_shape}, "
            f"got {tuple(initial_state.shape)}"
        )

    attend = chunked_lightning_attention
    if choose("lightning", ("triton", why_not(q)), ("torch", "")) == "triton":
        from fulmen.kernels.lightning.launch import triton_lightning_attention as attend
    if cu_seqlens is None or (initial_state is None and not output_final_state):
        return attend(q, k, v, slopes, cu_seqlens, initial_state, output_final_state)
    outputs, states = [], []
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = None if initial_state is None else initial_state[index : index + 1]
        output, state = attend(
            q[:, start:end], k[:, start:end], v[:, start:end], slopes, None, state, True
        )
        outputs.append(output)
        states.append(state)
    final_state = torch.cat([s for s in states if s is not None]) if output_final_state else None
    return torch.cat(outputs, dim=1), final_state


def why_not(q: Tensor) -> str:
    """Why the Triton kernels cannot take this input, or ""."""
    if reason := why_not_triton(q):
        return reason
    if not _has_copy_engine(q.device.index):
        return "needs compute capability 9.0 or 10.0"
    if q.shape[3] not in HEAD_DIMS:
        return "needs a head_dim that is a power of two from 16 to 256"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_copy_engine(device_index: int | None) -> bool:
    return _capability(device_index)[0] in (9, 10)


@functools.cache
def _capability(device_index: int | None) -> tuple[int, int]:
    """Kept, for torch takes as long to ask as to compute on a small tensor."""
    return torch.cuda.get_device_capability(device_index)
