"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

A layer's experts are spread over `ep` ranks, whole ones on each, and the inner width of each expert
over `etp` ranks. Of one group of tokens:

    all-to-all over ep -> gather over etp -> experts -> reduce over etp -> all-to-all over ep

A rank's tokens go in `parallel.expert_token_groups` groups: the all-to-alls of the others run while
the experts compute one. The gradients of one also travel back beside the products for the gradients
of the weights. Without a capacity the rows sent are those there are; the host learns their
numbers by one exchange of counts, and waits for it once a layer. With a capacity that each rank
has to itself, every rank sends buffers of that size, and the host waits for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fulmen.kernels.moe import (
    LateGradients,
    Permutation,
    grouped_swiglu,
    permutation,
    permute,
    transpose_segments,
    unpermute,
    with_late_gradients,
)
from fulmen.models.moe import Experts
from fulmen.parallel.all_to_all import AllToAll, Parts, Room
from fulmen.parallel.collectives import all_gather
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import exchange
from fulmen.parallel.seams import fill_seam

Weights = tuple[Tensor, Tensor, Tensor, LateGradients]
"""This rank's slice of its experts, for one group of rows."""
Compute = Callable[[Tensor, Weights], Tensor]

WIDTH_DIM = {"w1": 1, "w3": 1, "w2": 2}
"""Dim of an expert's inner width, which `etp` splits; the experts are dim 0."""


def spread_experts(experts: Experts, mesh: Mesh, *, num_groups: int) -> None:
    """Leave each rank its experts, as DTensors over (ep, etp), and their way to get tokens."""
    for name, width in WIDTH_DIM.items():
        whole = getattr(experts, name)
        local = list(whole.shape)
        local[0] //= mesh.ep
        local[width] //= mesh.etp
        part = DTensor.from_local(
            torch.empty(local, dtype=whole.dtype, device="meta"),
            mesh.experts["ep", "etp"],
            (Shard(0), Shard(width)),
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        setattr(experts, name, nn.Parameter(part))
    note = f"all-to-all over ep={mesh.ep}, {num_groups} group(s) of tokens"
    if mesh.etp > 1:
        note += f"; width over etp={mesh.etp}"
    fill_seam(experts, "dispatch", partial(dispatch, mesh, num_groups, experts.w1.shape[0]), note)
    fill_seam(experts, "matrices", partial(_local_matrices, experts), "this rank's slices")


@dataclass
class Leg:
    """The way of one group of rows to this rank's experts and back."""

    there: AllToAll
    gather: AllToAll
    reduce: AllToAll
    back: AllToAll
    compute: Compute
    """The experts on the gathered rows."""


def make_leg(
    mesh: Mesh,
    send: list[int],
    receive: list[int],
    gathered: list[int],
    compute: Compute,
    room: Room | None = None,
) -> Leg:
    """`send` and `receive` are by rank of ep, `gathered` by rank of etp; `room` as in `Parts`."""
    there = AllToAll(mesh.ep_group, send, receive, (None, room))
    # Over etp too these are all-to-alls, of copies and of parts of a sum: sizes differ, and parts
    # in bf16 are better summed here, in fp32. The bytes are those of the usual collectives.
    gather = AllToAll(mesh.etp_group, [gathered[mesh.etp_rank]] * mesh.etp, gathered)
    return Leg(there, gather, gather.reverse(), there.reverse(), compute)


def dispatch(
    mesh: Mesh,
    num_groups: int,
    num_experts: int,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    most_rows: int | None,
    matrices: Sequence[Tensor],
) -> Tensor:
    """`Experts.dispatch` where a rank holds a part of the experts."""
    if most_rows is not None:
        sizes = (num_experts, most_rows)
        return _dispatch_buffers(sizes, mesh, num_groups, x, chosen, weights, matrices)
    keys = _by_group(chosen, num_groups, num_experts)
    order = permutation(keys, num_groups * num_experts)
    table, on_host = _exchange_counts(order.counts.view(num_groups, num_experts), mesh)
    # Until on_host all is prepared that needs no numbers of the host, and after it nothing stands
    # before the exchange of rows that can stand elsewhere: the device is idle until it begins.
    rows = permute(x, order)
    segments = _arriving_segments(table, mesh)
    counts = segments.sum(1)
    computes = [
        partial(_compute, *of_group)
        for of_group in zip(segments.unbind(), counts.unbind(), strict=True)
    ]
    legs, parts = _plan_legs(on_host(), mesh, computes, rows.shape[0])
    arriving = parts.start(rows, [leg.there for leg in legs])
    outputs = parts.wait(_travel(arriving, legs, mesh, matrices), [leg.back for leg in legs])
    return unpermute(outputs, weights, order)


def _by_group(chosen: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """Sort keys by group of tokens, then by expert: what goes to one rank lies together in each."""
    if num_groups == 1:
        return chosen
    num_tokens = chosen.shape[0]
    group = torch.arange(num_tokens, device=chosen.device)[:, None] * num_groups // num_tokens
    dropped = num_groups * num_experts
    return torch.where(chosen < num_experts, group * num_experts + chosen, dropped)


def _local_matrices(experts: Experts) -> tuple[Tensor, ...]:
    return tuple(cast(DTensor, w).to_local() for w in (experts.w1, experts.w3, experts.w2))


def _travel(
    rows: list[Tensor], legs: list[Leg], mesh: Mesh, matrices: Sequence[Tensor]
) -> list[Tensor]:
    """Rows to their experts and back, each group's exchanges beside the work on the others.

    `rows` are under way, and so are those returned. A wait also holds up what is issued behind it:
    the next group is waited for before the work on this one where it has yet to be gathered, and
    after it otherwise. Backward, the way of a group's gradients back to their ranks is also beside
    the products for the gradients of the weights, which stand between its two halves.
    """
    weights: dict[int, Weights] = {}

    def gather(g: int) -> None:
        weights[g] = with_late_gradients(*matrices)
        arrived = legs[g].there.wait(rows[g])
        if mesh.etp > 1:
            arrived = arrived.expand(mesh.etp, -1, -1).flatten(0, 1)
        rows[g] = legs[g].gather.start(arrived)

    def send_back(g: int) -> None:
        results = legs[g].reduce.wait(rows[g])
        rows[g] = legs[g].back.start(_sum_parts(results, mesh.etp) if mesh.etp > 1 else results)

    ahead = 1 if mesh.etp > 1 else 0
    for g in range(-ahead, len(legs) + ahead):
        if 0 <= g + ahead < len(legs):
            gather(g + ahead)
        if 0 <= g < len(legs):
            results = legs[g].compute(legs[g].gather.wait(rows[g]), weights.pop(g))
            rows[g] = legs[g].reduce.start(results)
        if 0 <= g - ahead < len(legs):
            send_back(g - ahead)
    return rows


def _sum_parts(parts: Tensor, ranks: int) -> Tensor:
    parts = parts.unflatten(0, (ranks, parts.shape[0] // ranks))
    dtype = torch.promote_types(parts.dtype, torch.float32)
    return parts.sum(0, dtype=dtype).to(parts.dtype)


def _exchange_counts(counts: Tensor, mesh: Mesh) -> tuple[Tensor, Callable[[], Tensor]]:
    """`[ep, etp, groups, experts]` rows of every rank, and a function that gives them on the host.

    It waits for the device, which is the one time in a layer.
    """
    table = counts.new_empty(mesh.ep * mesh.etp * counts.shape[0], counts.shape[1])
    with exchange("counts of rows for experts", mesh.expert_group):
        all_gather(table, counts, group=mesh.expert_group)
    table = table.view(mesh.ep, mesh.etp, *counts.shape)
    if not table.is_cuda:
        return table, lambda: table
    numbers = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    numbers.copy_(table, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def on_host() -> Tensor:
        copied.synchronize()
        return numbers

    return table, on_host


def _arriving_segments(table: Tensor, mesh: Mesh) -> Tensor:
    """`[groups, senders, local experts]` rows that this rank's experts get of each rank.

    Gathered rows lie by rank of etp, then by rank of ep, then by expert.
    """
    mine = table.unflatten(-1, (mesh.ep, -1))[..., mesh.ep_rank, :]
    return mine.permute(2, 1, 0, 3).flatten(1, 2)


def _plan_legs(
    numbers: Tensor, mesh: Mesh, computes: Sequence[Compute], num_rows: int
) -> tuple[list[Leg], Parts]:
    """The way of each group, and its part of this rank's rows; `numbers` lie on the host."""
    # [ep, etp, groups, ep]: from a rank to a rank of ep.
    sizes = numbers.unflatten(-1, (mesh.ep, -1)).sum(-1).tolist()
    sends = sizes[mesh.ep_rank][mesh.etp_rank]
    parts = Parts([sum(send) for send in sends], num_rows)
    legs = []
    for g, (send, compute) in enumerate(zip(sends, computes, strict=True)):
        by_etp = [
            [sizes[ep][etp][g][mesh.ep_rank] for ep in range(mesh.ep)] for etp in range(mesh.etp)
        ]
        receive, gathered = by_etp[mesh.etp_rank], [sum(arriving) for arriving in by_etp]
        legs.append(make_leg(mesh, send, receive, gathered, compute, partial(parts.room, g)))
    return legs, parts


def _compute(segments: Tensor, counts: Tensor, rows: Tensor, weights: Weights) -> Tensor:
    """Apply the experts to rows that lie in segments, by sender and then by expert.

    `segments` is `[senders, experts]`, `counts` its sum `[experts]`.
    """
    outputs = grouped_swiglu(transpose_segments(rows, segments), counts, *weights)
    return transpose_segments(outputs, segments.t())


def _dispatch_buffers(
    sizes: tuple[int, int],
    mesh: Mesh,
    num_groups: int,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    matrices: Sequence[Tensor],
) -> Tensor:
    """Every rank sends as many rows to every expert, zeros where it has fewer; `sizes` are the
    number of experts and that of these rows.

    The groups are ranges of an expert's rows.
    """
    num_experts, most_rows = sizes
    order = permutation(chosen, num_experts)
    buffers = _fill_buffers(permute(x, order), order, most_rows)
    legs, rows = [], []
    for part in buffers.tensor_split(min(num_groups, most_rows), dim=1):
        share = part.shape[0] * part.shape[1] // mesh.ep
        shares = [share] * mesh.ep
        compute = partial(_compute_buffers, part.shape[1])
        leg = make_leg(mesh, shares, shares, [share * mesh.ep] * mesh.etp, compute)
        legs.append(leg)
        rows.append(leg.there.start(part.flatten(0, 1)))
    returning = zip(legs, _travel(rows, legs, mesh, matrices), strict=True)
    filled = [leg.back.wait(part).unflatten(0, (num_experts, -1)) for leg, part in returning]
    outputs = filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)
    return unpermute(_read_buffers(outputs, order), weights, order)


def _compute_buffers(size: int, rows: Tensor, weights: Weights) -> Tensor:
    """Apply the experts to `[senders * experts * size, hidden_size]`."""
    num_local = weights[0].shape[0]
    by_expert = rows.reshape(-1, num_local, size, rows.shape[1]).transpose(0, 1)
    sorted_rows = by_expert.reshape(-1, rows.shape[1])
    # Zeros are computed too: an expert without a bias makes zeros of them, and no gradient.
    per_expert = sorted_rows.shape[0] // num_local
    counts = torch.full((num_local,), per_expert, dtype=torch.int64, device=rows.device)
    outputs = grouped_swiglu(sorted_rows, counts, *weights)
    return outputs.view(by_expert.shape).transpose(0, 1).reshape(rows.shape)


def _fill_buffers(rows: Tensor, order: Permutation, size: int) -> Tensor:
    """`[experts, size, hidden_size]` from rows sorted by expert, zeros behind an expert's last."""
    slot = torch.arange(size, device=rows.device)
    ends = order.counts.cumsum(0)
    source = (ends - order.counts)[:, None] + slot
    filled = slot < order.counts[:, None]
    picked = rows.index_select(0, torch.where(filled, source, 0).flatten())
    return torch.where(filled.unsqueeze(-1), picked.unflatten(0, source.shape), 0)


def _read_buffers(buffers: Tensor, order: Permutation) -> Tensor:
    """The reverse of `_fill_buffers`; rows of dropped assignments are of any value."""
    num_experts, size, _ = buffers.shape
    ends = order.counts.cumsum(0)
    row = torch.arange(order.destinations.numel(), device=buffers.device)
    expert = torch.searchsorted(ends, row, right=True).clamp(max=num_experts - 1)
    source = expert * size + row - (ends - order.counts)[expert]
    return buffers.flatten(0, 1).index_select(0, source.clamp(max=num_experts * size - 1))
