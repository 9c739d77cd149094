"""CoCa over data-parallel ranks: ZeRO, and embeddings that every rank compares with its own."""

from collections.abc import Collection
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.models.coca import CoCa
from fulmen.models.vision import VisionBlock
from fulmen.parallel.checkpointing import checkpoint_activations
from fulmen.parallel.collectives import all_gather, reduce_scatter
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import exchange
from fulmen.parallel.seams import fill_seam
from fulmen.parallel.values import give_values
from fulmen.parallel.zero import ZeroEngine


def parallelize_coca(
    model: CoCa,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: str,
    offload_checkpoints: bool,
    seed: int,
    frozen: Collection[str] = (),
) -> ZeroEngine:
    """`parallel.plan.parallelize` for a tower that learns from captions: data parallelism alone."""
    blocks = [*model.vision_tower.layers, *model.layers]
    checkpoint_activations(
        [],
        [cast(VisionBlock, block) for block in blocks],
        activation_checkpointing,
        chunk_tokens=None,
        offload=offload_checkpoints,
        over_ranks=False,
        device=mesh.device,
    )
    if mesh.world_size > 1:
        gather = partial(gather_rows, mesh.shard.get_group())
        fill_seam(model.contrast, "gather", gather, "embeddings of all ranks")
    engine = ZeroEngine(model, mesh, dtype=dtype, frozen=frozen)
    # In fp32: a temperature rounded to bf16 would move in steps of a percent.
    engine.shard(model.contrast, config.zero_stage, dtype=torch.float32)
    tower = model.vision_tower
    for part in (*blocks, tower.vision_model, model.pooler, model.text_head):
        engine.shard(part, config.zero_stage)
    for part in (model.embed_tokens, model.lm_head, model):
        engine.shard(part, config.zero_stage)
    give_values(engine, model.config, seed)
    return engine


def gather_rows(group: dist.ProcessGroup, rows: Tensor) -> tuple[Tensor, int]:
    """`Contrast.gather`: `[rows, width]` of each rank, equally many, back to back.

    Backward each rank gets the sum of what all ranks' losses ask of its rows. So losses may be
    summed over ranks, as gradients are.
    """
    first = dist.get_rank(group) * rows.shape[0]
    return _Gather.apply(rows, group), first


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        everyone = rows.new_empty(dist.get_world_size(group) * rows.shape[0], rows.shape[1])
        with exchange("embeddings", group):
            all_gather(everyone, rows.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty(
            gradient.shape[0] // dist.get_world_size(ctx.group), gradient.shape[1]
        )
        with exchange("gradients of embeddings", ctx.group):
            reduce_scatter(own, gradient, group=ctx.group)
        return own, None
