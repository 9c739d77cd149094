"""Softmax attention put together from blocks: a rank's own tokens, then keys from elsewhere.

Keys from elsewhere lie before the queries and in one document with them, so no mask is needed: a
rectangle of scores, a `Tile`. Keys and values share a tensor, `[tokens, 2 kv_heads, head_dim]`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.kernels.attention import Documents, attend_block, attend_block_backward
from fulmen.kernels.common import accumulation_dtype


class Tile(NamedTuple):
    """Queries of one document, and keys of it before all of them."""

    queries: slice
    """Among the tokens that the rank attends for."""
    keys: slice
    """In the tensor that holds them."""


def halves(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, `[tokens, kv_heads, head_dim]` each; views."""
    k, v = kv.chunk(2, dim=1)
    return k, v


class Attended:
    """Output and log-sum-exp of a rank's queries over the keys seen so far."""

    def __init__(self, q: Tensor, kv: Tensor, documents: Documents) -> None:
        """Begin with the rank's own tokens: `q` `[tokens, heads, head_dim]`, and their `kv`."""
        self.q = q
        self.out, self.lse = attend_block(q, *halves(kv), documents)
        self._sums: dict[int, tuple[slice, Tensor]] = {}
        """First query -> queries whose keys come in pieces, their output so far in fp32."""

    def add(self, kv: Tensor, tiles: Iterable[Tile]) -> None:
        """Go on with keys and values from elsewhere."""
        for queries, keys in tiles:
            out, lse = attend_block(self.q[queries], *halves(kv[keys]))
            before = self.lse[:, queries]
            total = torch.logaddexp(before, lse)
            _, held = self._sums.get(queries.start, (queries, self.out[queries]))
            held = held * _weight(before, total) + out * _weight(lse, total)
            self._sums[queries.start] = queries, held
            self.lse[:, queries] = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Output `[tokens, heads, head_dim]`, log-sum-exp `[heads, tokens]`."""
        for queries, held in self._sums.values():
            self.out[queries] = held
        return self.out, self.lse


def _weight(part: Tensor, total: Tensor) -> Tensor:
    return torch.exp(part - total).t()[:, :, None]


class Gradients:
    """Gradient of a rank's queries, and what its queries add to that of keys and values."""

    def __init__(self, gradient: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """`gradient` is that of `out`, all as in `Attended.result`."""
        self._gradient, self._q, self._out, self._lse = gradient.contiguous(), q, out, lse
        self.dq = torch.zeros_like(q, dtype=accumulation_dtype(q))

    def own(self, kv: Tensor, d_kv: Tensor, documents: Documents) -> None:
        """The block that `Attended` begins with; adds to `d_kv`."""
        self._add(slice(None), kv, d_kv, documents)

    def add(self, kv: Tensor, d_kv: Tensor, tiles: Iterable[Tile]) -> None:
        """Tiles of keys and values from elsewhere; adds to `d_kv`, in fp32."""
        for queries, keys in tiles:
            self._add(queries, kv[keys], d_kv[keys], None)

    def _add(self, queries: slice, kv: Tensor, d_kv: Tensor, documents: Documents | None) -> None:
        dq, dk, dv = attend_block_backward(
            self._gradient[queries],
            self._q[queries],
            *halves(kv),
            self._out[queries],
            self._lse[:, queries],
            documents,
        )
        self.dq[queries] += dq
        for total, part in zip(halves(d_kv), (dk, dv), strict=True):
            total += part
