"""Context parallelism: a row's tokens are spread over the ranks of one group, in contiguous parts.

Documents may begin, end or cross anywhere. Every rank knows the boundaries of the whole row, so
what has to be exchanged is known without asking:

- lightning layers: a state of fixed size a rank, see lasp.py;
- softmax layers: keys and values are gathered;
- the load-balancing loss: counts of assignments are summed.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.attention import softmax_attention
from fulmen.models.layers import Context
from fulmen.models.softmax import SoftmaxAttention


@dataclass(frozen=True)
class RowPart:
    """Where one rank's part of a row lies in it."""

    rank: int
    size: int
    tokens: int
    """Of each part."""
    bounds: tuple[int, ...]
    """Of all documents of the row, from 0 to its end."""

    @property
    def first(self) -> int:
        """Index in the row of the part's first token."""
        return self.rank * self.tokens

    def document_before(self, token: int) -> int:
        """First token of the document that the token in front of `token` belongs to."""
        return self.bounds[bisect_left(self.bounds, token) - 1]

    @cached_property
    def first_sender(self) -> int:
        """First rank at whose end the document of this part's first token has begun; or `rank`."""
        return min(self.rank, self.document_before(self.first + 1) // self.tokens)

    @cached_property
    def last_receiver(self) -> int:
        """Last rank at whose start the document of this part's last token goes on; or `rank`."""
        end = self.first + self.tokens
        behind = self.bounds[bisect_left(self.bounds, end)]
        return max(self.rank, (behind - 1) // self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document in this part, without empty ones."""
        end = self.first + self.tokens
        inside = sorted({bound for bound in self.bounds if self.first < bound < end})
        return [b - a for a, b in pairwise([self.first, *inside, end])]


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[ranks, ...]` of every rank's tensor."""
    parts = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(parts), tensor.contiguous(), group=group)
    return parts


def gathered_attend(
    layer: SoftmaxAttention,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
) -> Tensor:
    """`SoftmaxAttention.attend` on a part of a row."""
    assert isinstance(context.row_part, RowPart)
    return gathered_attention(q, k, v, context.row_part, group)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, part: RowPart, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention on `[1, tokens, heads, head_dim]`, this rank's part, to all keys before."""
    k, v = (_GatherTokens.apply(x[0], group) for x in (k, v))
    outputs, start = [], part.first
    for length in part.lengths:
        end = start + length
        keys = slice(part.document_before(start + 1), end)
        here = slice(start - part.first, end - part.first)
        outputs.append(softmax_attention(q[:, here], k[None, keys], v[None, keys]))
        start = end
    return torch.cat(outputs, dim=1)


class _GatherTokens(torch.autograd.Function):
    """`[all tokens, ...]` from each rank's `[tokens, ...]`; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(part, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = list(gradients[0].contiguous().chunk(ctx.group.size()))
        part = torch.empty_like(parts[0])
        dist.reduce_scatter(part, parts, group=ctx.group)
        return part, None


def sum_counts(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    """Assignments per expert over all parts of a row; `MoE.count_over_row`."""
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total
