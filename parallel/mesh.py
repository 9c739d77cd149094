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
    edp: int
    """Copies of each expert."""
    ep: int
    """Ranks that share the experts of a layer, each some of them whole."""
    ep_rank: int
    ep_group: dist.ProcessGroup
    """The ranks that tokens are sent to and come from."""
    etp: int
    """Ranks that split each expert's inner width; neighbours in the world."""
    etp_rank: int
    etp_group: dist.ProcessGroup
    """The ranks that hold the other slices of this rank's experts."""
    expert_group: dist.ProcessGroup
    """The ep * etp ranks that together hold every expert once."""
    shard: DeviceMesh
    """One axis over all ranks: ZeRO stages 1 to 3. Ranks that share a row hold the same weights,
    so that for ZeRO they are data-parallel ranks like others."""
    replicate: DeviceMesh
    """(all ranks, 1): ZeRO stage 0, a full copy on each."""
    experts: DeviceMesh
    """(edp, one, ep, etp), of which `one` has size 1: ZeRO stage 0 of experts that are spread."""

    @property
    def spreads_experts(self) -> bool:
        """Whether a rank holds less than all experts of a layer."""
        return self.ep * self.etp > 1

    def table(self) -> str:
        """Every axis with its size and the ranks of its groups, for the log."""
        ranks = torch.arange(self.world_size)
        rows = ranks.view(self.dp, self.cp)
        experts = ranks.view(self.edp, self.ep, self.etp)
        axes = [
            ("dp", rows.t(), "other rows"),
            ("cp", rows, "parts of the same rows"),
            ("edp", experts.movedim(0, -1), "the same experts"),
            ("ep", experts.movedim(1, -1), "other experts"),
            ("etp", experts, "slices of the same experts"),
        ]
        lines = [f"{self.world_size} rank(s) = dp x cp = edp x ep x etp"]
        for name, groups, meaning in axes:
            members = groups.reshape(-1, groups.shape[-1]).tolist()
            shown = " ".join(_brief(group, 8) for group in members[:4])
            more = " ..." if len(members) > 4 else ""
            lines.append(f"{name:>5} {groups.shape[-1]:>5}  {meaning:<27} {shown}{more}")
        return "\n".join(lines)


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """Form every group of the run; the default process group must exist."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    check_parallel(config, world_size)
    kind = device.type
    rows = init_device_mesh(kind, (world_size // config.cp, config.cp), mesh_dim_names=("dp", "cp"))
    split = config.ep * config.etp
    experts = init_device_mesh(
        kind,
        (world_size // split, 1, config.ep, config.etp),
        mesh_dim_names=("edp", "one", "ep", "etp"),
    )
    # Tokens move most between slices of one expert, and ranks next to each other are nearest.
    blocks = init_device_mesh(kind, (world_size // split, split), mesh_dim_names=("edp", "block"))
    return Mesh(
        device=device,
        world_size=world_size,
        rank=rank,
        dp=rows["dp"].size(),
        dp_rank=rank // config.cp,
        cp=config.cp,
        cp_rank=rank % config.cp,
        cp_group=rows["cp"].get_group(),
        edp=world_size // split,
        ep=config.ep,
        ep_rank=rank // config.etp % config.ep,
        ep_group=experts["ep"].get_group(),
        etp=config.etp,
        etp_rank=rank % config.etp,
        etp_group=experts["etp"].get_group(),
        expert_group=blocks["block"].get_group(),
        shard=init_device_mesh(kind, (world_size,), mesh_dim_names=("dp",)),
        replicate=init_device_mesh(kind, (world_size, 1), mesh_dim_names=("dp_replicate", "one")),
        experts=experts,
    )


def release_groups() -> None:
    """Give back every group of this process but the world's; nothing may use them any more."""
    groups = dist.distributed_c10d._world.pg_map
    for group in [group for group in groups if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def _brief(ranks: list[int], most: int) -> str:
    shown = " ".join(str(rank) for rank in ranks[:most])
    return f"[{shown} ...]" if len(ranks) > most else f"[{shown}]"
