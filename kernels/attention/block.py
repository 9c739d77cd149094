"""Attention of some queries to some of their keys, in pieces that can be put together.

The keys of a query may come in several blocks, from other ranks say. Each block gives an output
and the log-sum-exp of its scores, which says how much that output weighs among the others. The
gradients of a block follow from the output and log-sum-exp over *all* blocks: README.md has the
formulas.
"""

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.attention.back_ends import LONG_DOCUMENT, why_not
from fulmen.kernels.attention.reference import reference_block, reference_block_backward
from fulmen.kernels.registry import choose


@dataclass(frozen=True)
class Documents:
    """Boundaries in a block whose keys are those of its queries' own tokens."""

    lengths: tuple[int, ...]
    """Tokens of each document, at least 1."""
    cu_seqlens: Tensor
    """`[documents + 1]` int32, the same on the device of the block."""


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with scale `1 / sqrt(head_dim)`, without autograd.

    Args:
        q: `[tokens, heads, head_dim]`.
        k, v: `[keys, kv_heads, head_dim]`, `heads` a multiple of `kv_heads`.
        documents: attention is causal and inside each of them, keys = tokens. None: every query
            sees every key.

    Returns:
        output `[tokens, heads, head_dim]` in the type of `q`, and log-sum-exp `[heads, tokens]`
        in fp32 (fp64 for fp64).
    """
    name = _choose(q, k, documents)
    if name == "torch":
        return reference_block(q, k, v, _lengths(documents))
    if name == "flash":
        return _flash(q, k, v, documents)
    if documents is None:
        return _cudnn(q, k, v, causal=False)
    pieces = [_cudnn(q[x], k[x], v[x], causal=True) for x in _spans(documents)]
    return torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces], dim=1)


def attend_block_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients of q, k and v, in their types or in fp32.

    `gradient`, `out` and `lse` belong to the queries and all of their keys, not to this block.
    """
    name = _choose(q, k, documents)
    if name == "torch":
        return reference_block_backward(gradient, q, k, v, out, lse, _lengths(documents))
    if name == "flash":
        return _flash_backward(gradient, q, k, v, out, lse, documents)
    if documents is None:
        return _cudnn_backward(gradient, q, k, v, out, lse, causal=False)
    pieces = [
        _cudnn_backward(gradient[x], q[x], k[x], v[x], out[x], lse[:, x], causal=True)
        for x in _spans(documents)
    ]
    dq, dk, dv = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return dq, dk, dv


def ranking(tokens: int, keys: int, documents: int | None) -> list[str]:
    """All back ends, best first: cuDNN, which plans each new length, where the block is large."""
    if documents is None:
        is_large = tokens * keys >= LONG_DOCUMENT**2 // 2  # the scores of one long document
    else:
        is_large = tokens >= LONG_DOCUMENT * documents
    return ["cudnn", "flash", "torch"] if is_large else ["flash", "cudnn", "torch"]


def _choose(q: Tensor, k: Tensor, documents: Documents | None) -> str:
    if not q.shape[0]:
        return "torch"
    size = "large" if q.numel() >= 2**31 else ""
    facts = (q.device.type, q.device.index, q.dtype, q.shape[2], size)
    reasons = {
        "flash": why_not("torch_varlen", *facts),
        "cudnn": why_not("cudnn", *facts),
        "torch": "",
    }
    lengths = _lengths(documents)
    names = ranking(q.shape[0], k.shape[0], None if lengths is None else len(lengths))
    return choose("attention_block", *[(name, reasons[name]) for name in names])


def _lengths(documents: Documents | None) -> tuple[int, ...] | None:
    return None if documents is None else documents.lengths


def _spans(documents: Documents) -> list[slice]:
    return [slice(*ends) for ends in pairwise([0, *accumulate(documents.lengths)])]


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """FlashAttention, or what `torch.nn.attention.activate_flash_attention_impl` put there."""
    if documents is None:
        return _flash_whole(q, k, v, causal=False)
    longest = _longest(documents)
    cu_seqlens = documents.cu_seqlens
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False
    )
    return out, lse


def _flash_whole(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[None], k[None], v[None], None, None, q.shape[0], k.shape[0], 0.0, causal, False
    )
    return out[0], lse.reshape(q.shape[1], q.shape[0])


def _flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if documents is None:
        return _flash_whole_backward(gradient, q, k, v, out, lse, causal=False)
    longest = _longest(documents)
    cu_seqlens = documents.cu_seqlens
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        gradient,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        True,
        *_flash_seed(q),
    )
    return dq, dk, dv


def _flash_whole_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        gradient[None],
        q[None],
        k[None],
        v[None],
        out[None],
        lse.contiguous()[None],
        None,
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        causal,
        *_flash_seed(q),
    )
    return dq[0], dk[0], dv[0]


def _longest(documents: Documents) -> int:
    # With 1 FlashAttention 2 takes a short cut for decoding; as in back_ends.py.
    return max(2, *documents.lengths)


def _flash_seed(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of the dropout that there is not."""
    return torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    if not _fits_cudnn(q, k):
        return _flash_whole(q, k, v, causal=causal)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_heads_first(x) for x in (q, k, v)), None, True, 0.0, causal, False
    )
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], q.shape[0])


def _cudnn_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits_cudnn(q, k):
        return _flash_whole_backward(gradient, q, k, v, out, lse, causal=causal)
    lse = lse.contiguous()[None]
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    gradients: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_heads_first(x) for x in (gradient, q, k, v, out)),
        lse[..., None] if _cudnn_lse_dims(q.device) == 4 else lse,
        unused,
        unused,
        None,
        None,
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        causal,
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in gradients)
    return dq, dk, dv


def _fits_cudnn(q: Tensor, k: Tensor) -> bool:
    return min(q.shape[0], k.shape[0]) > 1


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Whether this torch's log-sum-exp is `[batch, heads, tokens]`, or has a last dim of 1."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()
