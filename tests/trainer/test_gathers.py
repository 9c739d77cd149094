"""Bytes of weights and gradients that the planner says come to a rank, against those that do."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.captioned import pairs, tiny_coca
from support.tiny import tiny_config
from support.worlds import run_world

from fulmen.models.coca import CoCa
from fulmen.models.config import MoEConfig, VisionConfig
from fulmen.models.image_layout import Tiling, image_layout, place_images
from fulmen.models.text import TextModel
from fulmen.models.vl import Images, build_model
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.trainer.config import GroupConfig, RunConfig
from fulmen.trainer.memory import frozen_of
from fulmen.trainer.planner import GPUS, Assumptions, predict_step

TOKENS = 320
MICRO_BATCHES = 2
EYES = "multi_modal_projector|image_newline"
CASES: list[tuple[str, int, int, str, str]] = [
    # model, ZeRO stages of dense parameters and experts, checkpointing, what is frozen
    ("text", 0, 1, "none", ""),
    ("text", 2, 3, "selective", ""),
    ("text", 3, 3, "full", ""),
    ("text", 3, 3, "none", r"embed_tokens|layers\.[01]\."),
    ("text", 3, 3, "none", r"embed_tokens|layers\.(0|1\.(?!.*gate))"),
    ("text", 3, 3, "none", r"(?!layers\.1\..*experts)"),
    ("text", 3, 2, "none", "layers|norm|lm_head"),
    ("text", 3, 3, "none", r"(?!lm_head)"),
    ("vl", 3, 3, "none", ""),
    ("vl", 3, 3, "full", f"(?!{EYES})"),
    ("vl", 3, 3, "none", f"vision_tower|{EYES}"),
    ("vl", 3, 3, "none", f"{EYES}|embed_tokens|.*layer_norm|.*embeddings|.*layers\\.0"),
    ("vl", 1, 2, "none", f"(?!{EYES})"),
    ("coca", 3, 3, "none", ""),
    ("coca", 3, 3, "full", "vision_tower"),
    ("coca", 3, 3, "none", r"(?!vision_tower|lm_head)"),
    ("coca", 3, 3, "none", r"(?!layers\.2)"),
]


def config_of(kind: str, dense: int, experts: int, policy: str, frozen: str) -> RunConfig:
    config = tiny_config("none")
    if kind == "vl":
        config.model.vision = VisionConfig(2, 64, 4, 96, 32, 4, image_token_id=7)
    if kind == "coca":
        config.model = tiny_coca()
    config.parallel.zero_stage, config.parallel.expert_zero_stage = dense, experts
    config.trainer.activation_checkpointing = policy
    config.trainer.micro_batch_tokens = TOKENS
    config.trainer.dtype = "float32"
    if frozen:
        config.optim.groups = {"frozen": GroupConfig(frozen, frozen=True)}
    return config


def come_to_a_rank(device: torch.device, cases: list[tuple]) -> list[float]:
    """Bytes of a step without its optimiser."""
    total = 0.0

    def counting(collective: Any, whole: int, times: int) -> Any:
        def counted(*tensors: Any, **options: Any) -> Any:
            nonlocal total
            given = [*tensors, *(v for v in options.values() if isinstance(v, torch.Tensor))]
            size = dist.get_world_size(options.get("group"))
            total += times * given[whole].nbytes * (size - 1) / size
            return collective(*tensors, **options)

        return counted

    # Under the names by which FSDP2 finds them; our own exchanges have theirs already.
    dist.all_gather_single = counting(dist.all_gather_single, 0, 1)
    dist.reduce_scatter_single = counting(dist.reduce_scatter_single, 1, 1)
    dist.all_reduce = counting(dist.all_reduce, 0, 2)
    found = []
    for case in cases:
        total = 0.0
        run_step(device, config_of(*case))
        found.append(total)
    return found


def run_step(device: torch.device, config: RunConfig) -> None:
    with torch.device("meta"):
        model = build_model(config.model, MoEConfig())
    engine = parallelize(
        model,
        build_mesh(config.parallel, device),
        config.parallel,
        dtype=torch.float32,
        activation_checkpointing=config.trainer.activation_checkpointing,
        compile_blocks=False,
        seed=0,
        frozen=frozen_of(config),
    )
    for number in range(MICRO_BATCHES):
        engine.begin_micro_batch(is_last=number == MICRO_BATCHES - 1)
        loss_of(model).backward()


def loss_of(model: TextModel | CoCa) -> torch.Tensor:
    if isinstance(model, CoCa):
        losses: Any = model(*pairs(4))
        return losses.caption_loss_sum + losses.contrastive_loss_sum
    images = None
    if model.config.vision is not None:
        places, sources = place_images([(0, image_layout(64, 64, Tiling(32, 4, 2, 4)))])
        shown = (torch.from_numpy(part[:TOKENS].copy()) for part in (places, sources))
        images = Images(torch.randn(5, 3, 32, 32), *shown)
    ids = torch.randint(8, 300, (1, TOKENS))
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    output: Any = model(ids, labels=ids, cu_seqlens=bounds, num_tokens=TOKENS, images=images)
    return output.loss_sum + output.aux_loss


@pytest.mark.skipif(not hasattr(dist, "all_gather_single"), reason="torch 2.13's names")
def test_bytes_of_weights_and_gradients_are_those_that_ranks_exchange() -> None:
    for case, real in zip(CASES, run_world(come_to_a_rank, 2, CASES)[0], strict=True):
        batch = 2 * MICRO_BATCHES * TOKENS
        step = predict_step(config_of(*case), 2, GPUS["h100"], Assumptions(), batch)
        assert step.micro_batches == MICRO_BATCHES
        assert math.isclose(step.exchange_gb["ZeRO"] * 1e9, real, rel_tol=1e-6), case
