"""Context parallelism: a row's tokens are spread over the ranks of one group, in contiguous parts.

Documents may begin, end or cross anywhere. Every rank knows the boundaries of the whole row, so
what has to be exchanged is known without asking:

- lightning layers (LASP+, arXiv:2501.08313 section 3.2, with decay and documents): the state of the
  document that reaches a part's end is gathered, `[heads, head_dim, head_dim]` in fp32 a rank
  whatever the length, and combined with the decay over the tokens between;
- softmax layers: keys and values, see softmax.py;
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

from fulmen.kernels.lightning import lightning_attention
from fulmen.models.layers import Context, decay_slopes
from fulmen.models.lightning import LightningAttention
from fulmen.parallel.progress import exchange

STATE_TOKENS = 8192
"""Tokens whose keys and values are held in fp32 at a time."""


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


def lasp_attend(
    layer: LightningAttention,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
) -> Tensor:
    """`LightningAttention.attend` on a part of a row."""
    slopes = decay_slopes(layer.num_heads, layer.layer, layer.num_layers, q.device)
    assert isinstance(context.row_part, RowPart)
    return lasp_attention(q, k, v, slopes, context.row_part, context.cu_seqlens, group)


def lasp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    part: RowPart,
    cu_seqlens: Tensor | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Lightning attention on `[1, tokens, heads, head_dim]`, this rank's part of a row.

    `cu_seqlens` are the boundaries inside the part.
    """
    lengths = part.lengths
    last = part.tokens - lengths[-1]
    state = _closing_state(k[0, last:], v[0, last:], slopes)
    entering = _ExchangeStates.apply(state, slopes, part, group)
    first = lengths[0]
    output, _ = lightning_attention(
        q[:, :first], k[:, :first], v[:, :first], slopes, initial_state=entering[None]
    )
    if len(lengths) == 1:
        return output
    assert cu_seqlens is not None
    rest, _ = lightning_attention(
        q[:, first:], k[:, first:], v[:, first:], slopes, cu_seqlens=cu_seqlens[1:] - first
    )
    return torch.cat([output, rest], dim=1)


def _closing_state(k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """`sum_j l^(n-1-j) k_j v_j^T` of `[n, heads, head_dim]` tokens, fp32 at least."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    state = k.new_zeros(k.shape[1], k.shape[2], v.shape[2], dtype=dtype)
    for start in range(0, k.shape[0], STATE_TOKENS):
        end = min(start + STATE_TOKENS, k.shape[0])
        behind = torch.arange(k.shape[0] - 1 - start, k.shape[0] - 1 - end, -1, device=k.device)
        weight = torch.exp(-slopes.to(dtype) * behind[:, None])
        keys = k[start:end].to(dtype) * weight[:, :, None]
        state = state + torch.einsum("thd,the->hde", keys, v[start:end].to(dtype))
    return state


def _remaining(part: RowPart, slopes: Tensor, between: Tensor, reached: Tensor) -> Tensor:
    """`[ranks, heads]`: what is left of a state after so many parts, 0 where it does not go."""
    decay = torch.exp(-slopes.double() * (part.tokens * between.clamp(min=0))[:, None])
    return decay * reached[:, None]


class _ExchangeStates(torch.autograd.Function):
    """State that enters this rank's part, from the states at the ends of all parts.

    One gather forward and one backward, each of a state a rank. Nothing waits for the device.
    """

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, slopes: Tensor, part: RowPart, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.part, ctx.group = part, group
        sender = torch.arange(part.size, device=state.device)
        reached = (sender >= part.first_sender) & (sender < part.rank)
        weights = _remaining(part, slopes, part.rank - 1 - sender, reached)
        with exchange("LASP+ states", group):
            states = _gather(state, group)
        return torch.einsum("sh,shde->hde", weights.to(state.dtype), states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        part, (gradient,) = ctx.part, gradients
        receiver = torch.arange(part.size, device=gradient.device)
        reached = (receiver > part.rank) & (receiver <= part.last_receiver)
        weights = _remaining(part, slopes, receiver - part.rank - 1, reached).to(gradient.dtype)
        with exchange("LASP+ gradients of states", ctx.group):
            received = _gather(gradient, ctx.group)
        return torch.einsum("rh,rhde->hde", weights, received), None, None, None


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[ranks, ...]` of every rank's tensor."""
    parts = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(parts), tensor.contiguous(), group=group)
    return parts


def sum_counts(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    """Assignments per expert over all parts of a row; `MoE.count_over_row`."""
    total = counts.clone()
    with exchange("counts of the router", group):
        dist.all_reduce(total, group=group)
    return total
