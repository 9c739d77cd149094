"""The tower against transformers' CLIP, and its own facts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig, check_model
from fulmen.models.init import init_model, init_rows, init_std
from fulmen.models.vision import VisionTower

pytestmark = pytest.mark.fast

TOWER = VisionConfig(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=3,
    mlp_hidden_size=80,
    tile_size=42,
    patch_size=14,
    image_token_id=39,
)
TOLERANCE = 1e-5


def make_tower(config: VisionConfig = TOWER) -> VisionTower:
    """Values as large as trained ones, biases and norms too, so that what is left out shows."""
    tower = VisionTower(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tower.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data += float("norm" in name and name.endswith("weight"))
    return tower


def pixels(tiles: int, side: int, seed: int = 1) -> Tensor:
    return torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(seed))


def clip_of(
    tower: VisionTower, config: VisionConfig, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """transformers' model with our weights; its norm behind the last block is not the release's."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.tile_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
            layer_norm_eps=config.layer_norm_eps,
            # Theirs by hand has its softmax in fp32 whatever the type.
            attn_implementation="eager" if dtype == torch.float32 else "sdpa",
        )
    ).eval()
    state = {
        name: value.view(config.hidden_size, 3, config.patch_size, -1)
        if name.endswith("patch_embedding.weight")
        else value
        for name, value in tower.vision_model.state_dict().items()
    }
    result = model.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["post_layernorm.weight", "post_layernorm.bias"]
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [42, 28, 70])
def test_equals_clip(side: int, dtype: torch.dtype) -> None:
    """Values and every gradient, with positions as they are, fewer and more of them."""
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-12
    tower = make_tower().to(dtype)
    theirs = clip_of(tower, TOWER, dtype)
    tiles = pixels(5, side).to(dtype)
    ours = tower(tiles)
    wanted = theirs(tiles, interpolate_pos_encoding=side != 42).last_hidden_state[:, 1:]
    assert ours.shape == (5, (side // 14) ** 2, 48)
    assert (ours - wanted).abs().max() <= tolerance
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (ours * weights).sum().backward()
    (wanted * weights).sum().backward()
    gradients = {
        name: (parameter.grad, dict(theirs.named_parameters())[name].grad.view(parameter.shape))
        for name, parameter in tower.vision_model.named_parameters()
    }
    assert len(gradients) == 5 + 3 * 16
    largest = max(wanted.abs().max() for _, wanted in gradients.values())
    for name, (gradient, wanted) in gradients.items():
        assert (gradient - wanted).abs().max() <= tolerance * largest, name


def test_full_size_equals_clip() -> None:
    """ViT-L/14 at 336, two of its blocks: 576 features a tile."""
    config = VisionConfig(2, 1024, 16, 4096, 336, 14, 0)
    tower = make_tower(config)
    tiles = pixels(1, 336)
    with torch.no_grad():
        ours, theirs = tower(tiles), clip_of(tower, config)(tiles).last_hidden_state[:, 1:]
    assert ours.shape == (1, 576, 1024)
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_tiles_are_seen_alone() -> None:
    tower = make_tower().double()
    tiles = pixels(4, 42).double()
    alone = torch.cat([tower(tile) for tile in tiles.split(1)])
    torch.testing.assert_close(tower(tiles), alone, rtol=0, atol=1e-12)


def test_no_tiles_are_a_batch_too() -> None:
    """A rank without images takes part in every collective: all weights get a gradient, of zero."""
    tower = make_tower()
    features = tower(pixels(0, 42))
    assert features.shape == (0, 9, 48)
    features.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_tiles_of_another_shape_are_refused() -> None:
    for tiles in (torch.zeros(1, 3, 42, 28), torch.zeros(1, 3, 40, 40)):
        with pytest.raises(ValueError, match=r"model\.vision\.patch_size=14"):
            make_tower()(tiles)


def test_parameters_of_the_full_tower() -> None:
    with torch.device("meta"):
        tower = VisionTower(VisionConfig(24, 1024, 16, 4096, 336, 14, 200_025))
    assert sum(parameter.numel() for parameter in tower.parameters()) == 303_505_408


# Initial weights.

VL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=2,
    num_experts_per_token=1,
    expert_hidden_size=12,
    vocab_size=40,
    vision=replace(TOWER, hidden_size=96),
)


def test_initial_values() -> None:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            assert VL.vision is not None
            self.vision_tower = VisionTower(VL.vision)

    model = Whole()
    init_model(model, VL, 0)
    prefix = "vision_tower.vision_model."
    block = f"{prefix}encoder.layers.1."
    small = 6**-0.5
    want = {
        f"{prefix}embeddings.patch_embedding.weight": (2 / (588 + 96)) ** 0.5,
        f"{prefix}embeddings.position_embedding.weight": 96**-0.5,
        f"{prefix}embeddings.class_embedding": 96**-0.5,
        f"{block}self_attn.q_proj.weight": (2 / 192) ** 0.5,
        f"{block}self_attn.out_proj.weight": small * (2 / 192) ** 0.5,
        f"{block}mlp.fc1.weight": (2 / 176) ** 0.5,
        f"{block}mlp.fc2.weight": small * (2 / 176) ** 0.5,
    }
    for name, std in want.items():
        values = model.get_parameter(name)
        # Five standard errors of a standard deviation from n draws.
        assert values.std().item() == pytest.approx(std, rel=5 / (2 * values.numel()) ** 0.5), name
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.unique().numel() > 0.9 * parameter.numel(), name


def test_initial_values_of_one_dim_do_not_depend_on_the_sharding() -> None:
    """A parameter of one dim has rows of one element."""

    def part(first: int, end: int, name: str = "image_newline") -> Tensor:
        values = torch.empty(end - first)
        size = torch.Size([64])
        init_rows(values, name, size, config=VL, seed=3, first_row=first)
        return values

    whole = part(0, 64)
    assert init_std("image_newline", torch.Size([64]), VL) == 64**-0.5
    assert torch.equal(torch.cat([part(0, 7), part(7, 7), part(7, 64)]), whole)
    assert whole.unique().numel() == 64
    assert not part(0, 64, "multi_modal_projector.linear_1.bias").any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, r"model\.vision\.num_layers=0"),
        (
            {"num_attention_heads": 5},
            r"model\.vision\.hidden_size=48 .*num_attention_heads=5",
        ),
        ({"patch_size": 16}, r"model\.vision\.tile_size=42 .* model\.vision\.patch_size=16"),
        ({"image_token_id": 40}, r"model\.vision\.image_token_id=40: .* model\.vocab_size=40"),
        ({"image_token_id": -1}, r"model\.vision\.image_token_id=-1"),
        ({"max_tiles": 0}, r"model\.vision\.max_tiles=0"),
    ],
)
def test_impossible_towers_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(replace(VL, vision=replace(TOWER, **change)), MoEConfig())


def test_gelu_is_exact() -> None:
    tower = make_tower(replace(TOWER, num_layers=1))
    mlp = tower.layers[0].mlp
    x = torch.linspace(-4, 4, 48)[None]
    wanted = mlp.fc2(0.5 * mlp.fc1(x) * (1 + torch.erf(mlp.fc1(x) / 2**0.5)))
    assert (mlp(x) - wanted).abs().max() <= TOLERANCE
    approximate = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    assert (approximate - wanted).abs().max() > 5 * TOLERANCE
