"""The global router: an expert's capacity is shared by all ranks.

MiniMax-01 (arXiv:2501.08313, section 2.1) exchanges the number of tokens per expert between all
expert-parallel groups before it dispatches them, "under the same capacity constraints". What is
done with the numbers is not printed. Here tokens stay in their group, and what some ranks leave of
an expert's capacity goes to those that have too many for it: an expert drops `max(0, total asked -
total capacity)` and never more than with each rank on its own.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.parallel.progress import exchange


def share_capacity(counts: Tensor, capacities: Tensor) -> Tensor:
    """`[ranks, experts]` assignments that each rank may send to each expert.

    Each rank keeps up to its own capacity. What is left free goes to the ranks with more, in
    proportion to what they have too much; what the divisions leave goes one by one to the first
    ranks. Integers throughout, so that every rank finds the same.

    Args:
        counts: `[ranks, experts]` int64 assignments asked for.
        capacities: `[ranks]` int64, of each expert.
    """
    own = torch.minimum(counts, capacities[:, None])
    over = counts - own
    total_over = over.sum(0)
    given = torch.minimum((capacities[:, None] - own).sum(0), total_over)
    shared = over * given // total_over.clamp(min=1)
    # Fewer than the ranks whose division left something, so that nobody gets more than it asked.
    rest = given - shared.sum(0)
    cut = over * given > shared * total_over
    shared = shared + (cut & (cut.cumsum(0) <= rest))
    return own + shared


def shared_allowance(group: dist.ProcessGroup, counts: Tensor, capacity: int) -> Tensor:
    """`MoE.allowance` with the capacities of all ranks of `group` shared; `[experts]` int64."""
    mine = torch.cat([counts, counts.new_full((1,), capacity)])
    table = mine.new_empty(group.size(), mine.shape[0])
    with exchange("counts for the global router", group):
        dist.all_gather(list(table), mine, group=group)
    return share_capacity(table[:, :-1], table[:, -1])[dist.get_rank(group)]
