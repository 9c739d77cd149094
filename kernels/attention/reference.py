"""Softmax attention written out: every score of a document at once."""

import itertools
import math

import torch
from torch import Tensor


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`softmax_attention` in fp32 (fp64 for fp64 inputs), with its shapes.

    Memory grows with the square of a document; `cu_seqlens` is read on the host.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
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
