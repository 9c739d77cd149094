"""All group arithmetic: which ranks form which axis."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fulmen.parallel.config import ParallelConfig, check_parallel


@dataclass(frozen=True)
class Mesh:
    """The axes of one run: world = dp * cp, and for the experts world = edp * etp * ep."""

    device: torch.device
    """This rank's device."""
    world_size: int
    rank: int
    dp: int
    """Data-parallel size."""
    dp_rank: int
    cp: int
    """Ranks that share a row; neighbours in the world."""
    cp_rank: int
    cp_group: dist.ProcessGroup
    """The ranks that share this rank's rows."""
    shard: DeviceMesh
    """One axis over all ranks: ZeRO stages 1 to 3. Ranks that share a row hold the same weights,
    so that for ZeRO they are data-parallel ranks like others."""
    replicate: DeviceMesh
    """(all ranks, 1): ZeRO stage 0, a full copy on each."""


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """Form every group of the run; the default process group must exist."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    check_parallel(config, world_size)
    kind = device.type
    rows = init_device_mesh(kind, (world_size // config.cp, config.cp), mesh_dim_names=("dp", "cp"))
    return Mesh(
        device=device,
        world_size=world_size,
        rank=rank,
        dp=rows["dp"].size(),
        dp_rank=rank // config.cp,
        cp=config.cp,
        cp_rank=rank % config.cp,
        cp_group=rows["cp"].get_group(),
        shard=init_device_mesh(kind, (world_size,), mesh_dim_names=("dp",)),
        replicate=init_device_mesh(kind, (world_size, 1), mesh_dim_names=("dp_replicate", "one")),
    )
