"""Whether ranks that should hold the same bits do.

There are three kinds of copies. *Kept* are weights and moments that no mesh axis splits between
two ranks: in ZeRO stage 0 all ranks hold the same dense ones, and the edp ranks the same experts
where ep or etp spread these. *Gathered* are those of stages 1 to 3, in which a rank keeps a part of
its own but computes with the whole: each unit is gathered as for a step, and the copies are
compared. And what the host keeps (step, data, updates made) has to be the same on all ranks.
Which ranks hold what follows from the tensors and their meshes as they are.

Each rank sums up the words of its copies on the device; one reduction for each group of ranks and
one over all ranks tell whether all sums are equal. Only where they are not is more exchanged, to
say whose is which.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fulmen.parallel.audit import EXPERT_AXES
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import exchange
from fulmen.parallel.rendezvous import name_ranks
from fulmen.parallel.zero import ZeroEngine, local_part

BLOCK = 2**22
"""Words that are summed at a time: their products take 8 bytes each."""
HOST = "step, data or updates made"


MOST_TOLD = 20
"""Tensors in which a group of ranks differs that are looked at one by one."""


class Copy(NamedTuple):
    """What this rank has of a tensor that others have too."""

    name: str
    mesh: DeviceMesh
    axis: int
    """Of the mesh, along which ranks have the same."""
    total: Tensor
    """Its checksum."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that have to have the same."""
        place = self.mesh.get_coordinate()
        assert place is not None
        others = (*place[: self.axis], *place[self.axis + 1 :])
        return tuple(self.mesh.mesh.movedim(self.axis, -1)[others].tolist())


def checksum(x: Tensor) -> Tensor:
    """Sum of x's words times odd numbers that rise by place, modulo 2^64.

    Of one changed bit always another, of two equal values that changed places too; the order in
    which a device sums does not matter.
    """
    words = x.detach().contiguous().view(-1)
    words = words.view({2: torch.int16, 4: torch.int32}[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK]
        odd = torch.arange(2 * start + 1, 2 * (start + len(block)), 2, device=x.device)
        total += (block * odd).sum()
    return total


def replicated(tensors: Mapping[str, DTensor]) -> dict[str, DTensor]:
    """Those of which another rank keeps the same part."""
    return {name: one for name, one in tensors.items() if _copy_axes(one, gathered=False)}


def find_difference(kept: Mapping[str, DTensor], host: int, engine: ZeroEngine) -> str | None:
    """Which ranks differ in what, or None; the same on all ranks, which all call it between steps.

    `kept` are `replicated` tensors, of the same names everywhere, in the same order; `host` is a
    hash of what the host keeps, below 2^63. Waits for the device.
    """
    mesh = engine.mesh
    with exchange("checksums of replicas"), torch.no_grad():
        groups: dict[dist.ProcessGroup, list[Copy]] = {}
        for copy in chain(_kept(kept), _gathered(engine)):
            groups.setdefault(_group_of(copy, mesh), []).append(copy)
        differ = {
            group: _differ(torch.stack([copy.total for copy in copies]), group)
            for group, copies in groups.items()
        }
        # That one group has found something has to be known to all ranks.
        own = torch.tensor([host, 0], device=mesh.device)
        for one in differ.values():
            own[1] += one.any()
        if not bool(_differ(own, mesh.shard.get_group()).any() | (own[1] > 0)):
            return None
    values = {HOST: (tuple(range(mesh.world_size)), host)}
    for group, copies in groups.items():
        places = differ[group].nonzero().flatten().tolist()
        told = [copies[place] for place in places[:MOST_TOLD]]
        values |= {copy.name: (copy.ranks, int(copy.total)) for copy in told}
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, values)
    return describe(found)


def describe(found: list[dict[str, tuple[tuple[int, ...], int]]]) -> str:
    """In words, from each rank's (ranks that have to have the same, checksum) by name."""
    told: dict[str, list[str]] = {}
    for rank, values in enumerate(found):
        for name, (ranks, _) in values.items():
            if rank == ranks[0]:
                sums = {one: found[one][name][1] for one in ranks}
                if len(set(sums.values())) > 1:
                    told.setdefault(_who(sums), []).append(name)
    texts = []
    for who, names in told.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        texts.append(f"{who} in {names[0]}{more}")
    return "; ".join(texts)


def _who(sums: Mapping[int, int]) -> str:
    """Who differs from most, by rank."""
    ((common, number), *_) = Counter(sums.values()).most_common()
    if 2 * number <= len(sums):
        return f"{name_ranks(sums)} differ, with no majority,"
    alike = [rank for rank, total in sums.items() if total == common]
    others = [rank for rank in sums if rank not in alike]
    return f"{name_ranks(others)} differs from {name_ranks(alike)}"


def _kept(tensors: Mapping[str, DTensor]) -> Iterator[Copy]:
    for name, tensor in tensors.items():
        (axis,) = _copy_axes(tensor, gathered=False)  # as parallel/zero.py makes them
        yield Copy(name, tensor.device_mesh, axis, checksum(local_part(tensor)))


def _gathered(engine: ZeroEngine) -> Iterator[Copy]:
    """Weights as ranks compute with them, a unit at a time, where they keep parts of them."""
    modules = dict(engine.model.named_modules())
    units: dict[nn.Module, dict[str, int]] = {unit: {} for unit in engine.stages}
    for name, kept in engine.parameters.items():
        owner = name.rpartition(".")[0]
        while modules[owner] not in units:
            owner = owner.rpartition(".")[0]
        unit = modules[owner]
        for axis in _copy_axes(kept, gathered=True) if engine.stages[unit] > 0 else []:
            units[unit][name] = axis
    for unit, axes in units.items():
        if axes:
            assert isinstance(unit, FSDPModule)
            unit.unshard()
            for name, axis in axes.items():
                whole = engine.model.get_parameter(name)
                local = local_part(whole) if isinstance(whole, DTensor) else whole
                mesh = engine.parameters[name].device_mesh
                yield Copy(f"gathered {name}", mesh, axis, checksum(local))
            unit.reshard()


def _copy_axes(kept: DTensor, *, gathered: bool) -> list[int]:
    """The mesh's axes, of more than one rank, along which the same is held."""
    mesh = kept.device_mesh
    assert mesh.mesh_dim_names is not None
    return [
        axis
        for axis, (name, placement) in enumerate(
            zip(mesh.mesh_dim_names, kept.placements, strict=True)
        )
        if mesh.size(axis) > 1
        and (placement.is_replicate() or (gathered and name not in EXPERT_AXES))
    ]


def _group_of(copy: Copy, mesh: Mesh) -> dist.ProcessGroup:
    """By the axis' name: a tensor's own mesh is equal, but may be that of a stage before, whose
    groups are gone, for DTensor keeps meshes and tells them apart by ranks and names alone."""
    assert copy.mesh.mesh_dim_names is not None
    name = copy.mesh.mesh_dim_names[copy.axis]
    (own,) = (
        one
        for one in (mesh.shard, mesh.replicate, mesh.experts)
        if one.mesh_dim_names is not None and name in one.mesh_dim_names
    )
    return own.get_group(name)


def _differ(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Which of some int64 values are not the same on all ranks of a group, on the device."""
    extremes = torch.cat([values, ~values])  # ~ turns the order round
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes[: len(values)], ~extremes[len(values) :]
    return highest != lowest
