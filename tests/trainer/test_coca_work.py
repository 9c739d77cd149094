"""Bytes that ops bound by memory move in a tower and its captioner, against a step's ops."""

from dataclasses import replace

import pytest
import torch
from support.captioned import VIT_DATA
from support.meta import MovedBytes
from support.tiny import compose_config
from torch.utils.flop_counter import FlopCounterMode

from fulmen.models.coca import Captions, CoCa, CoCaLosses
from fulmen.models.config import MoEConfig, VisionConfig
from fulmen.models.vision import VisionTower
from fulmen.models.vl import build_model
from fulmen.parallel import checkpointing
from fulmen.trainer.caption_inputs import most_pairs
from fulmen.trainer.coca_work import captioner_flops, captioner_moved
from fulmen.trainer.config import GroupConfig, RunConfig
from fulmen.trainer.flops import forward_flops
from fulmen.trainer.memory import frozen_of
from fulmen.trainer.planner import GPUS, Assumptions, passes_by_part, predict_step
from fulmen.trainer.tower_memory import count_pairs, tower_moved

pytestmark = pytest.mark.fast

OPS = {"native_layer_norm", "native_layer_norm_backward", "gelu", "gelu_backward", "add", "sum"}
OPS |= {"cat", "slice_backward"}
"""Not what attention does inside on the CPU, nor copies of pixels."""
VISION = VisionConfig(3, 256, 4, 512, 64, 8, image_token_id=1)


def config_of(policy: str = "none") -> RunConfig:
    """A captioner of which little lies outside of the blocks."""
    config = compose_config(["recipe=vl01_vit", *VIT_DATA])
    config.model.vision = replace(VISION)
    config.model.num_layers, config.model.hidden_size = 5, 192
    config.model.num_attention_heads = config.model.num_key_value_heads = 3
    config.model.expert_hidden_size, config.model.vocab_size = 768, 128
    assert config.model.coca is not None
    config.model.coca.num_unimodal_layers = 2
    config.trainer.activation_checkpointing = policy
    config.trainer.micro_batch_tokens = 8 * (64 + 38)
    return config


def put_checkpoints(tower: VisionTower, others: list, policy: str) -> None:
    checkpointing.checkpoint_activations(
        [], [*tower.layers, *others], policy, chunk_tokens=None, offload=False, over_ranks=False,
        device=torch.device("meta"),
    )  # fmt: skip


def run_step(config: RunConfig) -> None:
    with torch.device("meta"):
        model = build_model(config.model, MoEConfig()).bfloat16()
        assert isinstance(model, CoCa)
        for name in frozen_of(config):
            model.get_parameter(name).requires_grad_(False)
        policy = config.trainer.activation_checkpointing
        put_checkpoints(model.vision_tower, list(model.layers), policy)
        ids = torch.zeros(8, 76, dtype=torch.int64)
        pixels = torch.zeros(8, 3, 64, 64)
        losses = model(pixels, Captions(ids, torch.ones(8, dtype=torch.int64), ids))
        assert isinstance(losses, CoCaLosses)
        (losses.caption_loss_sum + losses.contrastive_loss_sum).backward()


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_captioners_step_moves_what_is_predicted(policy: str) -> None:
    config = config_of(policy)
    assert count_pairs(config.model, config.trainer.micro_batch_tokens) == 8
    with MovedBytes(OPS, most_dims=3) as moved:
        run_step(config)
    predicted = captioner_moved(config)
    # Copies of pixels are not among the ops that were counted.
    predicted -= 8 * 64 * 3 * 8**2 * (3 * 4 + 2)
    assert moved.total == pytest.approx(predicted, rel=0.04)


@pytest.mark.parametrize("trains", [True, False])
def test_a_tower_moves_what_is_predicted(trains: bool) -> None:
    config = config_of("full")
    with torch.device("meta"):
        tower = VisionTower(VISION).bfloat16().requires_grad_(trains)
        put_checkpoints(tower, [], "full")
        with MovedBytes(OPS, most_dims=3) as moved:
            output = tower(torch.zeros(5, 3, 64, 64))
            if trains:
                output.backward(torch.zeros_like(output))
    predicted = tower_moved(config, 5, trains=trains) - 5 * 64 * 3 * 8**2 * (3 * 4 + 2)
    assert moved.total == pytest.approx(predicted, rel=0.03)


def test_padding_is_computed_and_not_credited() -> None:
    """Captions of 38 tokens in rows of 76: what only the text's blocks and the head do is double,
    but for the class token, whose place is there once."""
    config = config_of()
    tokens = config.trainer.micro_batch_tokens
    real = forward_flops(
        config.model, num_tokens=tokens, sum_squared_lengths=8 * (64 + 38) ** 2,
        num_assignments=0, num_tiles=8, num_image_tokens=8 * 64,
    )  # fmt: skip
    done = captioner_flops(config, {})
    assert done["head"] == 2 * 3 * real["head"]
    assert done["vision_tower"] == 3 * real["vision_tower"]
    assert done["unimodal_layers"] > 1.9 * 3 * real["unimodal_layers"]


@pytest.mark.parametrize("frozen", ["", "vision_tower"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_operations_are_those_of_a_step(policy: str, frozen: str) -> None:
    config = config_of(policy)
    if frozen:
        config.optim.groups = {"frozen": GroupConfig(frozen, frozen=True)}
    with FlopCounterMode(display=False) as counted:
        run_step(config)
    predicted = captioner_flops(config, passes_by_part(config))
    # Counted by torch: all of the square of causal attention, less what the first products leave
    # out, as nothing trains below them, and with a frozen tower keys' and values' gradients.
    assert counted.get_total_flops() == pytest.approx(sum(predicted.values()), rel=0.04)


def test_a_frozen_tower_has_no_backward_pass() -> None:
    config = config_of("full")
    config.optim.groups = {"tower": GroupConfig("vision_tower", frozen=True)}
    trained = passes_by_part(config)
    assert trained["vision_tower"] == 1
    assert captioner_flops(config, trained)["vision_tower"] == pytest.approx(
        captioner_flops(config_of(), {})["vision_tower"] / 3
    )
    assert captioner_moved(config) < 0.8 * captioner_moved(config_of("full"))


def test_embeddings_of_all_ranks_come_to_each() -> None:
    config = config_of()
    step = predict_step(config, 4, GPUS["h100"], Assumptions(), 2 * 4 * 8 * (64 + 38))
    assert step.micro_batches == 2
    # Room for 12 pairs, an image's and a text's embedding of 768 and a mark, in fp32, both ways.
    assert most_pairs(config.model, config.trainer.micro_batch_tokens) == 12
    assert step.exchange_gb["embeddings"] * 1e9 == 2 * 2 * 3 * 12 * (2 * 768 + 1) * 4
    assert step.work_s["memory-bound ops"] > 0.1 * step.work_s["vision tower"]
