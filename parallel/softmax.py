"""Softmax layers on rows that are spread over ranks: `SoftmaxAttention.attend` for one rank.

Two ways to bring queries and keys together, ring.py and gather.py, both on the layout of
balance.py; `parallel.softmax_attention` and `parallel.balance_attention` choose.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.models.layers import Context
from fulmen.parallel.balance import from_layout, plan_layout, to_layout
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.gather import gather_attention
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.prompt import attend_softmax
from fulmen.parallel.ring import ring_attention
from fulmen.parallel.sequence import RowPart


def softmax_over_ranks(mesh: Mesh, config: ParallelConfig) -> tuple[Callable[..., Tensor], str]:
    """What replaces `SoftmaxAttention.attend`, given the layer's index, and a note of it."""
    # NCCL connects a group at its first collective, in which all ranks have to take part; in a
    # step of the ring, those that share no document do not.
    dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.cp_group)
    is_ring = config.softmax_attention == "ring"
    note = "ring of keys and values" if is_ring else "gather of keys and values"
    note += ", balanced" if config.balance_attention else ""
    return partial(_attend, mesh.cp_group, is_ring, config.balance_attention), note


@torch.compiler.disable  # type: ignore[untyped-decorator]  # boundaries are no part of a graph
def _attend(
    group: dist.ProcessGroup,
    ring: bool,
    balanced: bool,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
) -> Tensor:
    if context.cache is not None:
        return attend_softmax(layer, group, q, k, v, context)
    assert isinstance(context.row_part, RowPart)
    return spread_attention(q, k, v, context.row_part, group, ring=ring, balanced=balanced)


def spread_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: RowPart,
    group: dist.ProcessGroup,
    *,
    ring: bool,
    balanced: bool,
) -> Tensor:
    """Causal attention on `[1, tokens, heads, head_dim]`, this rank's part, to all keys before."""
    layout = plan_layout(part.size, part.tokens, part.bounds, balanced)
    where = layout, part.rank, group
    queries, kv = to_layout(q[0].contiguous(), *where), torch.cat([k[0], v[0]], dim=1)
    if ring:
        out = ring_attention(queries, to_layout(kv, *where), *where)
    else:
        out = gather_attention(queries, kv, *where)
    return from_layout(out, *where)[None]
