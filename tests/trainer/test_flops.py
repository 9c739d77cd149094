"""FLOPs against a count by hand for Text-01, with numbers instead of formulas.

Per token and layer, a matrix of n elements being 2 n operations:

  softmax     q 6144 x 8192 and o 8192 x 6144:  100,663,296 each
              k and v 6144 x 1024:               12,582,912 each   together    226,492,416
  lightning   q, k, v, gate, out 6144 x 8192:   100,663,296 each   together    503,316,480
              k v^T and q S, 64 heads of 128 x 128, 32,768 each    together      4,194,304
  router      6144 x 32:                                                           393,216
  expert      w1, w2, w3 6144 x 9216:           113,246,208 each   together    339,738,624
  head        6144 x 200064 (once):                                          2,458,386,432

A pair of tokens in a softmax layer: 64 heads, 256 for q k and 256 for p v:         32,768

Per tile of 336 x 336 in VL-01's tower, 576 patches of 14 x 14 x 3 and a class token:

  patches     588 x 1024, 1,204,224 each:                              together    693,633,024
  block       q, k, v, out 1024 x 1024: 2,097,152 each; MLP 1024 x 4096 twice: 8,388,608 each;
              25,165,824 for each of 577 tokens                                 14,520,680,448
              577^2 = 332,929 pairs, 2 x 1024 for q k and for p v                1,363,677,184
  24 blocks                                                                    381,224,583,168

Per image token, projector: 1024 x 6144 and 6144 x 6144:                            88,080,384
"""

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model

from fulmen.models.config import ModelConfig, VisionConfig
from fulmen.trainer import flops
from fulmen.trainer.flops import (
    Throughput,
    count_passes_by_part,
    device_peak,
    forward_flops,
    palm_training_flops,
    tile_flops,
    training_flops,
)
from fulmen.trainer.memory import count_model
from fulmen.trainer.planner import find_gpu

pytestmark = pytest.mark.fast

TEXT01 = ModelConfig(
    num_layers=80,
    hidden_size=6144,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rotary_dim=64,
    num_experts=32,
    num_experts_per_token=2,
    expert_hidden_size=9216,
    vocab_size=200064,
)
TOKENS = 8192
PAIRS = 33_554_432  # half of 8192^2: one document, causal
ASSIGNMENTS = 1_310_720  # 8192 tokens x 80 layers x 2 experts


def test_text01_by_hand() -> None:
    parts = forward_flops(
        TEXT01, num_tokens=TOKENS, sum_squared_lengths=67_108_864, num_assignments=ASSIGNMENTS
    )
    assert parts == {
        "softmax_projections": 10 * 8192 * 226_492_416,
        "softmax_core": 10 * PAIRS * 32_768,
        "lightning_projections": 70 * 8192 * 503_316_480,
        "lightning_core": 70 * 8192 * 4_194_304,
        "router": 80 * 8192 * 393_216,
        "experts": 80 * 8192 * 2 * 339_738_624,
        "head": 8192 * 2_458_386_432,
    }
    # Per token, all of it but the softmax core: 94.6 G, twice the 47.17 G parameters it passes
    # through (45,944,920,064 - 981,... norms aside) plus the lightning cores' 0.29 G.
    rest = sum(parts.values()) - parts["softmax_core"]
    assert rest / 8192 == 94_638_702_592
    assert training_flops(
        TEXT01, num_tokens=TOKENS, sum_squared_lengths=67_108_864, num_assignments=ASSIGNMENTS
    ) == 3 * (8192 * 94_638_702_592 + 10 * PAIRS * 32_768)


VISION = VisionConfig(
    num_layers=24,
    hidden_size=1024,
    num_attention_heads=16,
    mlp_hidden_size=4096,
    tile_size=336,
    patch_size=14,
    image_token_id=200025,
)


def test_the_tower_by_hand() -> None:
    model = replace(TEXT01, vision=VISION)
    assert tile_flops(VISION) == 693_633_024 + 381_224_583_168
    text = {"num_tokens": 3000, "sum_squared_lengths": 9_000_000, "num_assignments": 480_000}
    # 640 x 480: five tiles, 2,340 image tokens.
    parts = forward_flops(model, **text, num_tiles=5, num_image_tokens=2340)
    assert parts["vision_tower"] == 5 * 381_918_216_192
    assert parts["projector"] == 2340 * 88_080_384
    assert training_flops(model, **text, num_tiles=5, num_image_tokens=2340) == training_flops(
        TEXT01, **text
    ) + 3 * (5 * 381_918_216_192 + 2340 * 88_080_384)


def test_throughput_counts_tiles_and_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(flops.time, "perf_counter", lambda: now[0])
    rows = []
    for tiles, tokens in ((0, 0), (5, 2340)):
        speed = Throughput(replace(TEXT01, vision=VISION), seq_len=1, world_size=1, peak=None)
        speed.add_step(
            num_tokens=3000, sum_squared_lengths=1, num_tiles=tiles, num_image_tokens=tokens
        )
        now[0] += 1.0
        rows.append(speed.read(num_dropped=0))
    with_images, without = (row["flops_per_token"] or 0.0 for row in reversed(rows))
    added = 3 * (5 * 381_918_216_192 + 2340 * 88_080_384) / 3000
    assert with_images - without == pytest.approx(added)


def test_softmax_attention_counts_each_document_apart() -> None:
    def core(lengths: list[int]) -> float:
        squares = sum(length * length for length in lengths)
        return forward_flops(
            TEXT01, num_tokens=sum(lengths), sum_squared_lengths=squares, num_assignments=0
        )["softmax_core"]

    assert core([1000]) == 10 * 500_000 * 32_768
    assert core([500, 500]) == 10 * 250_000 * 32_768
    assert core([250, 250, 250, 250]) == core([1000]) / 4


def test_lightning_attention_is_linear_in_the_tokens() -> None:
    def core(tokens: int, squares: int) -> float:
        return forward_flops(
            TEXT01, num_tokens=tokens, sum_squared_lengths=squares, num_assignments=0
        )["lightning_core"]

    assert core(1, 1) == 70 * 4_194_304
    assert core(10**6, 10**12) == 10**6 * core(1, 1)
    assert core(10**6, 10**6) == core(10**6, 10**12)


def test_dropped_expert_work_is_not_counted() -> None:
    whole = training_flops(
        TEXT01, num_tokens=TOKENS, sum_squared_lengths=0, num_assignments=ASSIGNMENTS
    )
    dropped = training_flops(
        TEXT01, num_tokens=TOKENS, sum_squared_lengths=0, num_assignments=ASSIGNMENTS - 1000
    )
    assert whole - dropped == 3 * 1000 * 339_738_624


def test_palm_convention() -> None:
    # 6 N with N = active parameters and head, norms aside: 45,944,920,064 - 1,562,624 (989,184 on
    # the residual stream, 70 x 8192 in lightning layers) + 1,229,193,216 = 47,172,550,656; and
    # 12 x 10 layers x 64 heads x 128 x 8192 for attention.
    expected = 6 * 47_172_550_656 + 12 * 10 * 64 * 128 * 8192
    assert palm_training_flops(TEXT01, num_tokens=1, seq_len=8192) == expected
    assert palm_training_flops(TEXT01, num_tokens=7, seq_len=8192) == 7 * expected


def test_an_unknown_device_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None
    for name in ("Voodoo 2", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(torch.device("cuda"), torch.bfloat16) is None
        assert find_gpu(name) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_known_devices(name: str, tera: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda"), torch.bfloat16) == tera * 1e12
    assert device_peak(torch.device("cuda"), torch.float32) is None


def test_throughput_divides_by_time_devices_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(flops.time, "perf_counter", lambda: now[0])
    speed = Throughput(TEXT01, seq_len=8192, world_size=4, peak=1e15)
    for _ in range(2):
        speed.add_step(num_tokens=TOKENS, sum_squared_lengths=67_108_864)
    now[0] += 10.0
    row = speed.read(num_dropped=ASSIGNMENTS // 2)
    dense = 94_638_702_592 - 80 * 2 * 339_738_624
    hand = 3 * 2 * (8192 * dense + 0.75 * ASSIGNMENTS * 339_738_624 + 10 * PAIRS * 32_768)
    assert row["step_time_s"] == 5.0
    assert row["tokens_per_s"] == 2 * 8192 / 10
    assert row["flops_per_token"] == pytest.approx(hand / (2 * 8192))
    assert row["tflops_per_device"] == pytest.approx(hand / 10 / 4 / 1e12)
    assert row["mfu"] == pytest.approx(hand / 10 / 4 / 1e15)
    palm = 2 * 8192 * (6 * 47_172_550_656 + 12 * 10 * 64 * 128 * 8192)
    assert row["mfu_palm"] == pytest.approx(palm / 10 / 4 / 1e15)
    # A new interval begins with each reading.
    speed.add_step(num_tokens=100, sum_squared_lengths=0)
    now[0] += 2.0
    assert speed.read(num_dropped=0)["tokens_per_s"] == 50.0


def test_without_a_peak_the_utilisation_is_left_out() -> None:
    speed = Throughput(TEXT01, seq_len=8192, world_size=1, peak=None)
    speed.add_step(num_tokens=1, sum_squared_lengths=1)
    row = speed.read(num_dropped=0)
    assert row["mfu"] is None
    assert row["mfu_palm"] is None
    assert row["tflops_per_device"] is not None


def passes(*frozen: str) -> dict[str, float]:
    """By part, if the parameters of `tiny_model` (lightning, softmax, lightning) that begin so are
    frozen."""
    shapes = count_model(tiny_model()).shapes
    return count_passes_by_part(shapes, {n for n, _ in shapes if n.startswith(frozen)})


def test_three_passes_of_everything_that_trains() -> None:
    parts = forward_flops(tiny_model(), num_tokens=1, sum_squared_lengths=1, num_assignments=1)
    assert count_passes_by_part(count_model(tiny_model()).shapes, ()) == dict.fromkeys(parts, 3)


def test_frozen_parts_have_no_weight_gradients_and_nothing_below_them_no_backward() -> None:
    everything = forward_flops(tiny_model(), num_tokens=1, sum_squared_lengths=1, num_assignments=1)
    # Below a head that trains there is no backward pass, and the head's input needs none.
    assert passes("embed", "layers", "norm") == dict.fromkeys(everything, 1) | {"head": 2}
    # With the last norm it does.
    assert passes("embed", "layers")["head"] == 3
    # As under a frozen language model: gradients of inputs alone, and attention's cores whole.
    above = dict.fromkeys(everything, 2) | {"softmax_core": 3, "lightning_core": 3}
    assert passes("layers", "norm", "lm_head") == above


def test_passes_within_a_layer() -> None:
    rest = ("embed", "layers.0", "layers.2", "norm", "lm_head")
    one = "layers.1."
    norms = (f"{one}input_layernorm", f"{one}post_attention_layernorm")
    # Keys alone: 32 x 32 of 3072 numbers get no gradient of their input or themselves but
    # 16 x 32 of themselves; what is behind attention only of their inputs.
    keys = passes(
        *rest, *norms, f"{one}self_attn.q", f"{one}self_attn.v", f"{one}self_attn.o", f"{one}block"
    )
    assert keys["softmax_projections"] == (1 * 1024 + 2 * 512 + 1 * 512 + 2 * 1024) / 3072
    assert keys["softmax_core"] == 3
    # The first layer has nothing to do, the last one gradients of inputs.
    assert keys["experts"] == keys["router"] == pytest.approx((1 + 2 + 2) / 3)
    assert keys["lightning_core"] == (1 + 3) / 2
    # The router alone: the experts beside it have nothing to do.
    router = passes(*rest, *norms, f"{one}self_attn", f"{one}block_sparse_moe.experts")
    assert router["router"] == pytest.approx((1 + 2 + 2) / 3)
    assert router["experts"] == pytest.approx((1 + 1 + 2) / 3)
    # Gate and up projections: through the last of an expert's three matrices.
    moe = f"{one}block_sparse_moe."
    first = passes(*rest, *norms, f"{one}self_attn", f"{moe}gate", f"{moe}experts.w2")
    assert first["experts"] == pytest.approx((1 + 2 + 2) / 3)
    assert first["softmax_core"] == 1


def test_passes_of_a_frozen_language_model_or_tower() -> None:
    model = replace(
        tiny_model(),
        vision=VisionConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, mlp_hidden_size=24, tile_size=28,
            patch_size=14, image_token_id=7,
        ),
    )  # fmt: skip
    shapes = count_model(model).shapes
    language = ("embed_tokens", "layers", "norm", "lm_head")
    parts = forward_flops(model, num_tokens=1, sum_squared_lengths=1, num_assignments=1)

    def frozen(*begin: str) -> dict[str, float]:
        return count_passes_by_part(shapes, {n for n, _ in shapes if n.startswith(begin)})

    # Stage I: gradients of inputs alone all the way down to the projector.
    aligned = frozen(*language)
    assert (aligned.pop("vision_tower"), aligned.pop("projector")) == (3, 3)
    cores = {"softmax_core": 3, "lightning_core": 3}
    rest = set(parts) - {"vision_tower", "projector"}
    assert aligned == dict.fromkeys(rest, 2) | cores

    # A frozen tower runs forward only. Of the projector, 16 x 32 then 32 x 32, the first matrix
    # needs no gradient of its input.
    fixed = frozen("vision_tower")
    assert fixed.pop("vision_tower") == 1
    assert fixed.pop("projector") == pytest.approx((2 * 512 + 3 * 1024) / 1536)
    assert set(fixed.values()) == {3}
    # With the projector frozen too nothing of it has a backward pass.
    text = frozen("vision_tower", "multi_modal_projector", "image_newline")
    assert (text["vision_tower"], text["projector"], text["head"]) == (1, 1, 3)


def test_frozen_parts_are_left_out_of_the_utilisation() -> None:
    parts = {"num_tokens": 7, "sum_squared_lengths": 49, "num_assignments": 42}
    forward = forward_flops(tiny_model(), **parts)
    counted = training_flops(tiny_model(), **parts, passes=passes("embed", "layers", "norm"))
    assert counted == sum(forward.values()) + forward["head"]
