"""Attention of a row's last tokens to keys that a cache holds, put together from blocks of keys.

The library's kernels get rectangles without a mask and one causal square, whose log-sum-exps say
how much each weighs. Nothing is as large as queries times keys, and no kernel has to know how to
align a causal mask where there are more keys than queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fulmen.kernels.attention.block import Documents, attend_block
from fulmen.kernels.common import accumulation_dtype

KEY_UNIT = 1024
"""Blocks have a power of two times as many keys: cuDNN plans each new size, and so meets few."""
MOST_ELEMENTS = 2**30
"""Of a block's keys: cuDNN takes less than 2^31."""
MOST_KEYS_ON_TORCH = 8192
"""The formulas hold the scores of a block's keys."""


class Merged:
    """Output and log-sum-exp of some queries over the keys seen so far; no gradients."""

    def __init__(self, q: Tensor) -> None:
        """`q` is `[tokens, heads, head_dim]`; it has seen no key."""
        dtype = accumulation_dtype(q)
        self.q = q
        self.out = torch.zeros_like(q, dtype=dtype)
        """`[tokens, heads, head_dim]`, fp32 at least."""
        self.lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
        """`[heads, tokens]`; -inf without a key."""

    def add(self, k: Tensor, v: Tensor, queries: slice = slice(None)) -> None:
        """Keys and values `[keys, kv_heads, head_dim]` that all of `queries` see."""
        q = self.q[queries]
        by_library = k.is_cuda and k.dtype in (torch.bfloat16, torch.float16)
        most = MOST_ELEMENTS // (k.shape[1] * k.shape[2]) if by_library else MOST_KEYS_ON_TORCH
        for block in key_blocks(len(k), most):
            self.merge(*attend_block(q, k[block], v[block]), queries)

    def add_causal(self, k: Tensor, v: Tensor, queries: slice = slice(None)) -> None:
        """Keys and values of the tokens that `queries` are."""
        q = self.q[queries]
        bounds = torch.tensor([0, len(q)], dtype=torch.int32)
        if q.is_cuda:
            bounds = bounds.pin_memory().to(q.device, non_blocking=True)
        self.merge(*attend_block(q, k, v, Documents((len(q),), bounds)), queries)

    def merge(self, out: Tensor, lse: Tensor, queries: slice = slice(None)) -> None:
        """What another block of keys gave for `queries`."""
        before = self.lse[:, queries]
        total = torch.logaddexp(before, lse)
        self.out[queries] *= _weight(before, total)
        self.out[queries] += out * _weight(lse, total)
        self.lse[:, queries] = total


@torch.no_grad()
def attend_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax_attention` of many queries behind more keys, by blocks and without gradients."""
    rows = []
    for queries, keys, values in zip(q, k, v, strict=True):
        merged = Merged(queries)
        before = len(keys) - len(queries)
        merged.add(keys[:before], values[:before])
        merged.add_causal(keys[before:], values[before:])
        rows.append(merged.out.to(q.dtype))
    return torch.stack(rows)


def key_blocks(keys: int, most: int) -> Iterator[slice]:
    """All keys in blocks of a power of two times KEY_UNIT, at most `most`; the rest at the end."""
    start = 0
    while keys - start >= KEY_UNIT:
        units = min(keys - start, max(most, KEY_UNIT)) // KEY_UNIT
        size = KEY_UNIT << (units.bit_length() - 1)
        yield slice(start, start + size)
        start += size
    if start < keys:
        yield slice(start, keys)


def _weight(part: Tensor, total: Tensor) -> Tensor:
    # Where neither has seen a key, -inf - -inf would be NaN.
    return torch.exp(part - total.clamp(min=torch.finfo(total.dtype).min)).t()[:, :, None]
