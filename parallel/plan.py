"""The one function that spreads a model over a mesh, in a fixed order."""

from collections.abc import Collection
from functools import partial
from typing import cast

import torch

from fulmen.models.coca import CoCa
from fulmen.models.lightning import LightningAttention
from fulmen.models.moe import MoE
from fulmen.models.softmax import SoftmaxAttention
from fulmen.models.text import Block, TextModel
from fulmen.models.vision import VisionBlock
from fulmen.models.vl import VisionLanguageModel
from fulmen.parallel.captions import parallelize_coca
from fulmen.parallel.checkpointing import checkpoint_activations
from fulmen.parallel.config import ParallelConfig, check_experts
from fulmen.parallel.expert import spread_experts
from fulmen.parallel.lasp import spread_lightning
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.patches import collect_patches
from fulmen.parallel.router import shared_allowance
from fulmen.parallel.seams import fill_seam
from fulmen.parallel.sequence import sum_counts
from fulmen.parallel.softmax import softmax_over_ranks
from fulmen.parallel.values import give_values
from fulmen.parallel.zero import ZeroEngine


def parallelize(
    model: TextModel | CoCa,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: str,
    compile_blocks: bool,
    seed: int,
    chunk_tokens: int | None = None,
    offload_checkpoints: bool = False,
    frozen: Collection[str] = (),
) -> ZeroEngine:
    """Spread a model that was built on the meta device and give it its initial values.

    The order is: compilation or activation checkpointing, rows over ranks, experts over ranks, ZeRO
    from the inside out, memory, values. Nothing is allocated before each rank knows its part. The
    parameters named in `frozen` get no gradients.
    """
    if isinstance(model, CoCa):
        assert not compile_blocks
        assert chunk_tokens is None
        return parallelize_coca(
            model,
            mesh,
            config,
            dtype=dtype,
            activation_checkpointing=activation_checkpointing,
            offload_checkpoints=offload_checkpoints,
            seed=seed,
            frozen=frozen,
        )
    blocks = [block for block in model.layers if isinstance(block, Block)]
    assert len(blocks) == len(model.layers)
    for block in blocks:
        if compile_blocks:
            block.compile()
    # The tower is not compiled: there would be a graph for each number of tiles.
    tower = model.vision_tower if isinstance(model, VisionLanguageModel) else None
    checkpoint_activations(
        blocks,
        [] if tower is None else [cast(VisionBlock, block) for block in tower.layers],
        activation_checkpointing,
        chunk_tokens=chunk_tokens,
        offload=offload_checkpoints,
        over_ranks=mesh.cp > 1,
        device=mesh.device,
    )
    if mesh.cp > 1:
        spread_rows(model, mesh, config)
    check_experts(config, model.config, mesh.world_size)
    for block in blocks:
        spread_moe(block.block_sparse_moe, mesh, num_groups=config.expert_token_groups)
    dense_stage = config.zero_stage
    expert_stage = dense_stage if config.expert_zero_stage is None else config.expert_zero_stage
    engine = ZeroEngine(model, mesh, dtype=dtype, frozen=frozen)
    for block in blocks:
        # In fp32, as its product is: rounded weights would send some tokens to other experts.
        engine.shard(block.block_sparse_moe.gate, dense_stage, dtype=torch.float32)
        engine.shard(block.block_sparse_moe.experts, expert_stage, experts=True)
        engine.shard(block, dense_stage)
    if tower is not None:
        for part in (*tower.layers, tower.vision_model, model.multi_modal_projector):
            engine.shard(part, dense_stage)
    for module in (model.embed_tokens, model.lm_head, model):
        engine.shard(module, dense_stage)

    give_values(engine, model.config, seed)
    return engine


def spread_rows(model: TextModel, mesh: Mesh, config: ParallelConfig) -> None:
    """Give every layer its way to work on a part of a row; a layer without one is an error."""
    softmax_attend, softmax_note = softmax_over_ranks(mesh, config)
    for name, module in model.named_modules():
        if isinstance(module, LightningAttention):
            spread_lightning(module, mesh.cp_group, config.lightning_attention)
        elif isinstance(module, SoftmaxAttention):
            fill_seam(module, "attend", partial(softmax_attend, module.layer), softmax_note)
        elif hasattr(module, "attend"):
            raise TypeError(
                f"{name} ({type(module).__name__}) attends to other tokens, but parallel/plan.py "
                "has no way to spread it over parallel.cp ranks"
            )
        elif isinstance(module, VisionLanguageModel):
            collect = partial(collect_patches, mesh.cp_group)
            fill_seam(module, "collect", collect, "tiles in equal shares, patches to their tokens")
        elif isinstance(module, MoE):
            count = partial(sum_counts, mesh.cp_group)
            fill_seam(module, "count_over_row", count, "sum of the router's counts")


def spread_moe(moe: MoE, mesh: Mesh, *, num_groups: int) -> None:
    """Spread the experts of a layer, and what its router decides together with other ranks."""
    if mesh.spreads_experts:
        spread_experts(moe.experts, mesh, num_groups=num_groups)
    everyone = mesh.shard.get_group()
    if moe.aux_loss_scope == "global":
        fill_seam(moe, "count_over_row", partial(sum_counts, everyone), "counts of all ranks")
    if moe.global_router:
        allowance = partial(shared_allowance, everyone)
        fill_seam(moe, "allowance", allowance, "capacity shared by all ranks")
