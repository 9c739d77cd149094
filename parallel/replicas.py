"""Whether ranks that should hold the same bits do.

Which ranks these are follows from the tensors as they are: all that have the same place on every
mesh axis along which a tensor is split. In ZeRO stage 0 that is every rank for a dense parameter
and its moments, and the edp ranks for experts that ep or etp spread. From stage 1 on every rank has
a part of its own, and there is nothing to compare. What the host keeps (step, data, updates made)
has to be the same on all ranks in any case.

Of each tensor a rank sums up its words on the device; one reduction for each group of replicas and
one over all ranks tell whether all sums are equal. Only where they are not is more exchanged, to
say whose is which.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import exchange
from fulmen.parallel.rendezvous import name_ranks
from fulmen.parallel.zero import local_part

BLOCK = 2**22
"""Words that are summed at a time: their products take 8 bytes each."""
Holders = tuple[int, ...]
"""Ranks, in their order."""


def checksum(x: Tensor) -> Tensor:
    """Sum of x's 32-bit words times odd numbers that rise by place, modulo 2^64.

    Of one changed bit always another, of two equal values that changed places too; the order in
    which a device sums does not matter.
    """
    assert x.element_size() == 4
    words = x.detach().contiguous().view(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK]
        odd = torch.arange(2 * start + 1, 2 * (start + len(block)), 2, device=x.device)
        total += (block * odd).sum()
    return total


def holders(tensor: DTensor) -> Holders:
    """The ranks that hold the same part of a tensor as this one."""
    ranks, place = tensor.device_mesh.mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    for dim in reversed(range(ranks.ndim)):
        if not tensor.placements[dim].is_replicate():
            ranks = ranks.select(dim, place[dim])
    return tuple(ranks.flatten().tolist())


def replicated(tensors: Mapping[str, DTensor]) -> dict[str, DTensor]:
    """Those of which another rank holds the same part."""
    return {name: one for name, one in tensors.items() if len(holders(one)) > 1}


@torch.no_grad()
def find_difference(tensors: Mapping[str, DTensor], host: int, mesh: Mesh) -> str | None:
    """Which ranks differ in what, or None; the same on all ranks, which all call it.

    `tensors` are `replicated` ones, of the same names everywhere, in the same order; `host` is a
    hash of what the host keeps, below 2^63. Waits for the device.
    """
    sums = {name: checksum(local_part(one)) for name, one in tensors.items()}
    groups: dict[dist.ProcessGroup, list[str]] = {}
    for name, one in tensors.items():
        groups.setdefault(_group(one), []).append(name)
    differs = torch.zeros((), dtype=torch.bool, device=mesh.device)
    with exchange("checksums of replicas"):
        for group, names in groups.items():
            differs |= _differ(torch.stack([sums[name] for name in names]), group)
        # That one group has found something has to be known to all ranks.
        own = torch.tensor([host, 0], device=mesh.device)
        own[1] = differs
        if not bool(_differ(own, mesh.shard.get_group()) | differs):
            return None
    values = {name: (holders(tensors[name]), int(total)) for name, total in sums.items()}
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, (host, values))
    return describe(found)


def describe(found: list[tuple[int, dict[str, tuple[Holders, int]]]]) -> str:
    """In words, from every rank's hash of its host and its tensors' holders and checksums."""
    hosts = {rank: host for rank, (host, _) in enumerate(found)}
    told: dict[str, list[str]] = {}
    if len(set(hosts.values())) > 1:
        told[_who(hosts)] = ["step, data or updates made"]
    for rank, (_, values) in enumerate(found):
        for name, (ranks, _) in values.items():
            sums = {one: found[one][1][name][1] for one in ranks}
            if rank == ranks[0] and len(set(sums.values())) > 1:
                told.setdefault(_who(sums), []).append(name)
    texts = []
    for who, names in told.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        texts.append(f"{who} in {names[0]}{more}")
    return "; ".join(texts)


def _who(values: dict[int, int]) -> str:
    """Who differs from most, by rank."""
    ((common, number), *_) = Counter(values.values()).most_common()
    if 2 * number <= len(values):
        return f"{name_ranks(values)} differ, with no majority,"
    alike = [rank for rank, value in values.items() if value == common]
    others = [rank for rank in values if rank not in alike]
    return f"{name_ranks(others)} differs from {name_ranks(alike)}"


def _differ(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whether int64 values are not the same on all ranks of a group, a scalar on the device."""
    extremes = torch.cat([values, ~values])  # ~ turns the order round
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes[: len(values)], ~extremes[len(values) :]
    return (highest != lowest).any()


def _group(tensor: DTensor) -> dist.ProcessGroup:
    mesh = tensor.device_mesh
    dims = [
        dim
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate() and mesh.size(dim) > 1
    ]
    assert len(dims) == 1, "one axis of copies, as parallel/zero.py makes them"
    return mesh.get_group(dims[0])
