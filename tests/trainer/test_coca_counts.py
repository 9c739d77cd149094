"""What planner and MFU say of a tower with its captioner, by hand and against a forward pass.

VL-01's tower at 224 with 12 + 12 layers of 768, a caption of 40 tokens, its start included; a
matrix of n elements being 2 n operations a token:

  tower        256 patches of 588 x 1024:                               308,281,344
               block: 25,165,824 for each of 257 tokens, and
               257^2 pairs of 4,096: 6,738,153,472; 24 of them:     161,715,683,328
  pooler       k, v of 256 patches and q, out of one query 1024 x 1024:
               2,097,152 each, 514 of them:                           1,077,936,128
               256 pairs of 4,096, 1024 x 768 and, of the text, 768 x 768: 3,801,088 together
  block        q, k, v, out 768 x 768: 1,179,648 each; MLP 768 x 3072 twice: 4,718,592 each:
               14,155,776 a token
  unimodal     41 tokens with the class token, 41^2 pairs of 3,072, half: 582,968,832; 12 of them
  multimodal   40 tokens, 40^2 pairs of 3,072, half:                    568,688,640
               q, out for 40 tokens:                                     94,371,840
               40 x 256 pairs of 3,072:                                  31,457,280
               k, v of 256 patches 1024 x 768: 1,572,864 each:          805,306,368
               12 of them
  head         768 x 200064: 307,298,304, 40 tokens
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.captioned import VIT_DATA, pairs, tiny_coca
from support.kept import KeptBytes
from support.tiny import compose_config

from fulmen.models.coca import CaptionBlock, CoCa
from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.parallel import checkpointing
from fulmen.trainer.coca_memory import caption_block, coca_moments, ends
from fulmen.trainer.config import RunConfig
from fulmen.trainer.flops import Throughput, forward_flops
from fulmen.trainer.memory import count_model, list_units
from fulmen.trainer.planner import GPUS, Assumptions, predict_memory, predict_step, step_flops
from fulmen.trainer.tower_memory import tile_activations

pytestmark = pytest.mark.fast


def vit() -> RunConfig:
    return compose_config(["recipe=vl01_vit", *VIT_DATA])


def test_parameters_by_hand() -> None:
    count = count_model(vit().model)
    by_part: dict[str, int] = {}
    for name, shape in count.shapes:
        part = name.partition(".")[0]
        by_part[part] = by_part.get(part, 0) + torch.Size(shape).numel()
    attention, mlp = 4 * (768 * 768 + 768), 2 * 768 * 3072 + 3072 + 768
    cross = 2 * (768 * 768 + 768) + 2 * (768 * 1024 + 768) + 2 * 768 + 2 * 1024
    assert by_part == {
        "class_embedding": 768,
        "embed_tokens": 200064 * 768,
        "position_embedding": 76 * 768,
        "layers": 24 * (attention + mlp + 4 * 768) + 12 * cross,
        "norm": 2 * 768,
        "lm_head": 200064 * 768,
        "text_head": 2 * 768 + 768 * 768,
        # At 336 there are 320 more positions.
        "vision_tower": 303_505_408 - 320 * 1024,
        "pooler": 1024 + 4 * (1024 * 1024 + 1024) + 4 * 1024 + 1024 * 768,
        "contrast": 1,
    }
    assert sum(unit.whole for unit in list_units(vit(), 8)) == count.total


def test_flops_by_hand() -> None:
    """Of two equal documents: an image, 39 words and an end."""
    length = 256 + 40
    parts = forward_flops(
        vit().model,
        num_tokens=2 * length,
        sum_squared_lengths=2 * length**2,
        num_assignments=0,
        num_tiles=2,
        num_image_tokens=2 * 256,
    )
    assert parts == {
        "vision_tower": 2 * (308_281_344 + 161_715_683_328),
        "pooler": 2 * (1_077_936_128 + 3_801_088),
        "unimodal_layers": 2 * 12 * 582_968_832,
        "multimodal_layers": 2 * 12 * (568_688_640 + 94_371_840 + 31_457_280 + 805_306_368),
        "head": 2 * 40 * 307_298_304,
    }
    speed = Throughput(vit().model, seq_len=2 * length, world_size=1, peak=1e12)
    speed.add_step(
        num_tokens=2 * length,
        sum_squared_lengths=2 * length**2,
        num_tiles=2,
        num_image_tokens=512,
    )
    row = speed.read(num_dropped=0)
    assert row["flops_per_token"] == 3 * sum(parts.values()) / (2 * length)
    assert row["mfu"] is not None
    assert row["mfu_palm"] is None


def test_the_planner_counts_pairs() -> None:
    """Captions are taken to be half as long as the longest."""
    config = vit()
    tokens = 1000 * (256 + 38)
    parts = forward_flops(
        config.model,
        num_tokens=tokens,
        sum_squared_lengths=1000 * (256 + 38) ** 2,
        num_assignments=0,
        num_tiles=1000,
        num_image_tokens=256_000,
    )
    assert step_flops(config, tokens) == pytest.approx(3 * sum(parts.values()))
    batch = config.data.global_batch_tokens
    step = predict_step(config, 64, GPUS["h100"], Assumptions(), batch)
    assert step.mfu is not None
    assert 0.2 < step.mfu < 0.8
    assert step.work_s["vision tower"] > step.work_s["unimodal layers"] > 0
    config.parallel.zero_stage = 1
    last = list(coca_moments(config, 8, 1))[-1]
    assert last["gradients"] == last["weights"]  # each unit is reduced once
    whole = predict_memory(config, 64)
    config.trainer.micro_batch_tokens //= 2
    half = predict_memory(config, 64)
    assert sum(half.values()) < sum(whole.values())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("ranks", [1, 9])
def test_a_forward_pass_keeps_what_is_predicted(
    policy: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_coca(), hidden_size=48, num_attention_heads=3)
    model = build_model(config, MoEConfig())
    init_model(model, config, 0)
    assert isinstance(model, CoCa)
    monkeypatch.setattr(model.contrast, "gather", lambda rows: (rows.repeat(ranks, 1), 0))
    kept = KeptBytes(model, monkeypatch, lambda x: x.is_floating_point())
    blocks: list[Any] = [*model.vision_tower.layers, *model.layers]
    assert sum(isinstance(block, CaptionBlock) for block in blocks) == 3
    checkpointing.checkpoint_activations(
        [], blocks, policy, chunk_tokens=None, offload=False, over_ranks=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    number, room, tokens = 40, 45, 20
    pixels, captions = pairs(number)
    captions = replace(
        captions,
        input_ids=torch.ones(number, tokens, dtype=torch.int64),
        labels=torch.ones(number, tokens, dtype=torch.int64),
        lengths=torch.full((number,), tokens),
    )
    with kept.watch():
        output: Any = model(pixels, captions, room=room)
    assert output.caption_loss_sum.requires_grad
    assert config.vision is not None
    rest = ends(config, number, tokens, room * ranks, 4)
    predicted = tile_activations(config.vision, number, 4, policy) + sum(rest.values())
    for sees in (False, True, True):
        with_class = tokens + (not sees)
        predicted += caption_block(config, number, with_class, 4, policy, sees)
    head = 4 * (number * tokens + config.vocab_size) * config.hidden_size
    # With pixels, which inputs hold, without ids and labels; class tokens are a row more.
    measured = kept.total + pixels.nbytes - head
    predicted -= 2 * 8 * number * tokens
    assert measured == pytest.approx(predicted, rel=0.005)
