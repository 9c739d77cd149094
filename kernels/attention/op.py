"""The public op: argument checks, and the choice of what computes it."""

import torch
from torch import Tensor

from fulmen.kernels.attention.back_ends import (
    PACKAGES,
    attend_with_package,
    attend_with_sdpa,
    attend_with_torch_varlen,
    head_groups,
    ranking,
    why_not,
)
from fulmen.kernels.registry import choose


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    host_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention with scale `1 / sqrt(head_dim)`.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k, v: `[batch, keys, kv_heads, head_dim]`, `heads` a multiple of `kv_heads`. With
            `keys > tokens` the queries are the last `tokens` positions (decoding with a cache).
        cu_seqlens: `[documents + 1]` int32 boundaries of a packed row (batch 1, keys = tokens),
            from 0 to `tokens`, on the device of `q`.
        max_seqlen: upper bound of the documents' lengths, `tokens` if None. A tight one spares
            blocks of threads that find nothing to do, which count with many short documents.
        host_cu_seqlens: the same boundaries in host memory, for back ends that need lengths as
            Python numbers (cudnn, sdpa). Without them, those wait for the device.

    Returns:
        `[batch, tokens, heads, head_dim]`, the type of `q`.

    A compiled graph (fullgraph) holds every back end but flash_attn_4; on packed rows it does not
    hold cudnn and sdpa either, whose calls depend on the lengths.
    """
    _check(q, k, v, cu_seqlens)
    documents = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    if documents == 1:
        cu_seqlens = host_cu_seqlens = None
    elif host_cu_seqlens is None:
        host_cu_seqlens = cu_seqlens
    if not q.shape[1]:
        return attend_with_sdpa(q, k, v, None, cudnn=False)

    names = ranking(
        tokens=q.shape[1],
        keys=k.shape[1],
        documents=documents,
        lengths_known=host_cu_seqlens is not None and not host_cu_seqlens.is_cuda,
        compiling=torch.compiler.is_compiling(),
    )
    # A constant for the compiler, which guards the comparison.
    size = "" if head_groups(q.numel(), k.shape[2]) else "large"
    facts = (q.device.type, q.device.index, q.dtype, q.shape[3], size)
    name = choose("attention", *[(name, why_not(name, *facts)) for name in names])
    if name in ("cudnn", "sdpa"):
        return attend_with_sdpa(q, k, v, host_cu_seqlens, cudnn=name == "cudnn")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32)
    longest = q.shape[1] if max_seqlen is None else max_seqlen
    if name in PACKAGES:
        return attend_with_package(name, q, k, v, cu_seqlens, longest)
    return attend_with_torch_varlen(q, k, v, cu_seqlens, longest)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"softmax_attention: needs [batch, tokens, heads, head_dim], got {_shapes(q, k, v)}"
        )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"softmax_attention: batch, keys or head_dim do not agree: {_shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"softmax_attention: types differ: {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"softmax_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"softmax_attention: more queries than keys: {_shapes(q, k, v)}")
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise ValueError("softmax_attention: cu_seqlens needs batch 1 and as many keys as queries")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
