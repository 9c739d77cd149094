"""What the planner says of a vision tower, against what a forward pass keeps and by hand."""

from typing import Any

import pytest
import torch
from support.captioned import VIT_DATA
from support.kept import KeptBytes
from support.tiny import compose_config, tiny_config, tiny_model

from fulmen.models.config import MoEConfig, VisionConfig
from fulmen.models.image_layout import Tiling, image_layout, place_images
from fulmen.models.init import init_model
from fulmen.models.vl import Images, VisionLanguageModel, build_model
from fulmen.parallel import checkpointing
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.coca_memory import coca_moments
from fulmen.trainer.config import GroupConfig
from fulmen.trainer.memory import count_model, find_peak, host_bytes, list_units, moments
from fulmen.trainer.planner import GPUS, Assumptions, predict_step, step_flops
from fulmen.trainer.tower_memory import tower_activations

pytestmark = pytest.mark.fast

VISION = VisionConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    mlp_hidden_size=96,
    tile_size=32,
    patch_size=4,
    image_token_id=7,
)


def vl_model() -> Any:
    config = tiny_model()
    config.vision = VISION
    return config


@pytest.mark.parametrize(
    ("policy", "trains"), [("none", True), ("selective", True), ("full", True), ("none", False)]
)
def test_the_tower_keeps_what_is_predicted(
    policy: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tower that is frozen, as in stage I, only the projector keeps anything."""
    config = vl_model()
    model = build_model(config, MoEConfig())
    assert isinstance(model, VisionLanguageModel)
    init_model(model, config, 0)
    model.vision_tower.requires_grad_(trains)
    kept = KeptBytes(model, monkeypatch)
    checkpointing.checkpoint_activations(
        [],
        list(model.vision_tower.layers),
        policy,
        chunk_tokens=None,
        offload=False,
        over_ranks=False,
        device=torch.device("cpu"),
    )
    layout = image_layout(64, 64, Tiling(32, 4, 2, 4))  # a thumbnail and four tiles
    assert layout.num_tiles == 5
    tokens = 5 * 64
    places, sources = place_images([(0, layout)])
    images = Images(
        torch.randn(5, 3, 32, 32),
        torch.from_numpy(places[:tokens].copy()),
        torch.from_numpy(sources[:tokens].copy()),
    )
    with kept.watch():
        embedded = model.embed(torch.zeros(1, tokens, dtype=torch.int64), images)
    assert embedded.requires_grad
    # With pixels, which inputs hold, and without ids, which are counted with the text model.
    # Of a frozen tower's patches it is not kept which one each token shows.
    pixels = 5 * 3 * 32 * 32 * 4 if trains else 8 * tokens
    predicted = tower_activations(config, tokens, 4, policy, trains=trains)
    assert kept.total + pixels - 8 * tokens == pytest.approx(predicted, rel=0.002)


def test_memory_and_work_of_a_model_that_sees() -> None:
    config = tiny_config("none")
    config.trainer.dtype = "bfloat16"
    config.parallel = ParallelConfig(zero_stage=1, cp=2)
    text, text_flops = find_peak(config, 4, 1), step_flops(config, 640)
    step = predict_step(config, 4, GPUS["h100"], Assumptions(), 128)
    config.model = vl_model()
    units = {unit.name: unit for unit in list_units(config, 4)}
    blocks = [unit for name, unit in units.items() if ".layers." in name]
    assert len(blocks) == 3
    block = 4 * (64 * 64 + 64) + 2 * 64 * 96 + 96 + 64 + 4 * 64
    assert all(unit.whole == block for unit in blocks)
    total = count_model(config.model).total
    assert sum(unit.whole for unit in list_units(config, 4)) == total
    seeing, last = find_peak(config, 4, 1), list(moments(config, 4, 1))[-1]
    assert last["gradients"] == last["weights"]  # each unit is reduced once
    assert sum(seeing.values()) > sum(text.values())

    # 640 tokens are ten tiles.
    tile = 2 * 64 * 48 * 64 + 3 * (2 * 65 * (4 * 64**2 + 2 * 64 * 96) + 4 * 64 * 65**2)
    projector = 2 * (64 * 32 + 32 * 32)
    assert step_flops(config, 640) - text_flops == 3 * (10 * tile + 640 * projector)
    with_images = predict_step(config, 4, GPUS["h100"], Assumptions(), 128)
    assert with_images.work_s["vision tower"] > 0
    # A micro-batch of 32 tokens a rank, half of them elsewhere, there and back in bf16.
    assert with_images.exchange_gb["patches"] * 1e9 == pytest.approx(2 * 32 * 64 * 2 / 2)
    assert "patches" not in step.exchange_gb


def test_frozen_parts_have_no_gradients_and_no_moments() -> None:
    config = tiny_config("none")
    config.parallel = ParallelConfig(zero_stage=1)
    config.model = vl_model()
    # By hand: patches 48 x 64; class token and 65 positions of 64; the first norm; three blocks.
    block = 4 * (64 * 64 + 64) + 2 * 64 * 96 + 96 + 64 + 4 * 64
    tower = 48 * 64 + 66 * 64 + 2 * 64 + 3 * block
    projector = 64 * 32 + 32 + 32 * 32 + 32
    newline = 32
    total = count_model(config.model).total
    groups = {
        "eyes": GroupConfig("vision_tower|multi_modal_projector|image_newline"),
        "language": GroupConfig("embed_tokens|layers|norm|lm_head"),
    }

    def trained() -> int:
        return sum(unit.trained_whole for unit in list_units(config, 1))

    def state() -> int:
        """Bytes of weights, and of moments of what trains."""
        return find_peak(config, 1, 1)["moments"]

    config.optim.groups = groups
    assert (trained(), state()) == (total, 8 * total)
    groups["language"].frozen = True
    eyes = tower + projector + newline
    assert (trained(), state()) == (eyes, 8 * eyes)
    groups["language"].frozen, groups["eyes"].frozen = False, True
    assert (trained(), state()) == (total - eyes, 8 * (total - eyes))


def test_inputs_of_the_tower_lie_on_the_host_too() -> None:
    """Three blocks of 65 tokens a tile, a tile for 64 tokens, 64 numbers each."""
    config = tiny_config("none")
    config.trainer.micro_batch_tokens = 640
    config.trainer.activation_checkpointing = "full"
    config.trainer.offload_checkpoints = True
    text = host_bytes(config)
    config.model = vl_model()
    assert host_bytes(config) - text == 3 * 4 * 10 * 65 * 64
    config.parallel.ep = 2
    assert host_bytes(config) - text == 3 * 4 * 10 * 65 * 64
    config.parallel.ep = 1
    there = next(moments(config, 1, 1))["activations"]
    config.trainer.offload_checkpoints = False
    here = next(moments(config, 1, 1))["activations"]
    # Two of the tower's three inputs are on the GPU at a time, and one of the text's three.
    assert here - there == 4 * (10 * 65 * 64 + 2 * 640 * 32)
    config.optim.groups = {"tower": GroupConfig("vision_tower", frozen=True)}
    config.trainer.offload_checkpoints = True
    assert host_bytes(config) == text


def test_inputs_of_a_captioner_lie_on_the_host() -> None:
    config = compose_config(["recipe=vl01_vit", *VIT_DATA])
    config.trainer.activation_checkpointing = "full"
    here = next(coca_moments(config, 8, 1))
    config.trainer.offload_checkpoints = True
    pairs = -(-config.trainer.micro_batch_tokens // (256 + 38))
    text = (12 * 77 + 12 * 76) * 768
    assert host_bytes(config) == 2 * pairs * (24 * 257 * 1024 + text)
    there = next(coca_moments(config, 8, 1))
    assert here["activations"] - there["activations"] == host_bytes(config) - 4 * pairs * 257 * 1024
