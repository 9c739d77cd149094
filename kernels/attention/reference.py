"""Softmax attention written out: every score of a document at once."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype

PIECE = 1024
"""Queries of a block whose scores are held at a time."""


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`softmax_attention` in fp32 (fp64 for fp64 inputs), with its shapes.

    Memory grows with the square of a document; `cu_seqlens` is read on the host.
    """
    dtype = accumulation_dtype(q)
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for start, end in itertools.pairwise(bounds):
        # A row's keys may begin before its queries.
        keys = slice(None) if cu_seqlens is None else slice(start, end)
        # g: the query heads that share one key and value head.
        queries = q[:, start:end].to(dtype).unflatten(2, (k.shape[2], -1))
        scores = torch.einsum("btkgd,bskd->bkgts", queries, k[:, keys].to(dtype))
        num_queries, num_keys = scores.shape[-2:]
        future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        future = future.triu(num_keys - num_queries + 1)
        scores = (scores / math.sqrt(q.shape[3])).masked_fill(future, float("-inf"))
        output = torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v[:, keys].to(dtype))
        outputs.append(output.flatten(2, 3))
    return torch.cat(outputs, dim=1).to(q.dtype)


def reference_block(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """`attend_block` in fp32 (fp64 for fp64 inputs)."""
    dtype = accumulation_dtype(q)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    for queries, keys in _pieces(q.shape[0], k.shape[0], lengths):
        scores = _block_scores(q[queries].to(dtype), k[keys].to(dtype), lengths is not None)
        weights = scores.softmax(-1)
        out[queries] = torch.einsum("kgts,skd->tkgd", weights, v[keys].to(dtype)).flatten(1, 2)
        lse[:, queries] = scores.logsumexp(-1).flatten(0, 1)
    return out, lse


def reference_block_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_block_backward`; the gradients are fp32 (fp64 for fp64 inputs)."""
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    kv_heads = (k.shape[1], -1)
    for queries, keys in _pieces(q.shape[0], k.shape[0], lengths):
        rows, do, o = (x[queries].to(dtype) for x in (q, gradient, out))
        key, value = k[keys].to(dtype), v[keys].to(dtype)
        scores = _block_scores(rows, key, lengths is not None)
        weights = torch.exp(scores - lse[:, queries].unflatten(0, kv_heads)[..., None])
        # Of one query and head: sum of its output times its gradient.
        inner = (do * o).sum(-1).t().unflatten(0, kv_heads)[..., None]
        rows, do = rows.unflatten(1, kv_heads), do.unflatten(1, kv_heads)
        d_scores = weights * (torch.einsum("tkgd,skd->kgts", do, value) - inner)
        d_scores = d_scores / math.sqrt(q.shape[2])
        dq[queries] = torch.einsum("kgts,skd->tkgd", d_scores, key).flatten(1, 2)
        dk[keys] += torch.einsum("kgts,tkgd->skd", d_scores, rows)
        dv[keys] += torch.einsum("kgts,tkgd->skd", weights, do)
    return dq, dk, dv


def _pieces(tokens: int, keys: int, lengths: Sequence[int] | None) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys up to the last that one of them sees."""
    ends = [0, *itertools.accumulate([tokens] if lengths is None else lengths)]
    for start, end in itertools.pairwise(ends):
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            yield slice(first, last), slice(0, keys) if lengths is None else slice(start, last)


def _block_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`[kv_heads, query heads of each, tokens, keys]`; causal: the last query sees the last key."""
    scores = torch.einsum("tkgd,skd->kgts", q.unflatten(1, (k.shape[1], -1)), k)
    scores = scores / math.sqrt(q.shape[2])
    if causal:
        tokens, keys = scores.shape[-2:]
        future = torch.ones(tokens, keys, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(future.triu(keys - tokens + 1), float("-inf"))
    return scores
