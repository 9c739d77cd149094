"""The tower and the image tokens on a GPU."""

import pytest
import torch

from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig
from fulmen.models.image_layout import Tiling, image_layout, place_images, token_sources
from fulmen.models.init import init_model
from fulmen.models.vl import Images, VisionLanguageModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    rotary_dim=32,
    num_experts=4,
    num_experts_per_token=2,
    expert_hidden_size=64,
    vocab_size=64,
    vision=VisionConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=2,
        mlp_hidden_size=256,
        tile_size=56,
        patch_size=14,
        image_token_id=63,
    ),
)


def make_model() -> VisionLanguageModel:
    model = VisionLanguageModel(CONFIG, MoEConfig())
    init_model(model, CONFIG, seed=1)
    return model


def embed_gradients(
    model: VisionLanguageModel, sizes: list[tuple[int, int]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a row of some images is embedded as, and every gradient of its square."""
    weight = model.embed_tokens.weight
    assert CONFIG.vision is not None
    layouts = [image_layout(*size, CONFIG.vision.tiling) for size in sizes]
    firsts = [10]
    for layout in layouts:
        firsts.append(firsts[-1] + layout.num_tokens)
    places, sources = place_images(zip(firsts, layouts, strict=False))
    ids = torch.full((1, firsts[-1] + 10), 5)
    ids[0, places] = 63
    tiles = sum(layout.num_tiles for layout in layouts)
    generator = torch.Generator().manual_seed(tiles)
    pixels = torch.randn(tiles, 3, 56, 56, generator=generator)
    images = Images(
        pixels.to(weight.device, weight.dtype),
        torch.from_numpy(places).to(weight.device),
        torch.from_numpy(sources).to(weight.device),
    )
    embedded = model.embed(ids.to(weight.device), images)
    model.zero_grad()
    embedded.square().sum().backward()
    names = ("vision_tower.", "multi_modal_projector.", "image_newline", "embed_tokens.")
    gradients = [p.grad for name, p in model.named_parameters() if name.startswith(names)]
    assert all(gradient is not None for gradient in gradients)
    return embedded, [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_as_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    sizes = [(200, 100), (50, 60)]
    wanted, wanted_gradients = embed_gradients(make_model().double(), sizes)
    found, gradients = embed_gradients(make_model().to("cuda", dtype), sizes)
    assert (found.cpu() - wanted).abs().max() < tolerance * wanted.abs().max()
    largest = max(gradient.abs().max() for gradient in wanted_gradients)
    for gradient, want in zip(gradients, wanted_gradients, strict=True):
        assert (gradient.cpu() - want).abs().max() < tolerance * largest


def test_no_tiles() -> None:
    _, gradients = embed_gradients(make_model().to("cuda", torch.bfloat16), [])
    assert [bool(gradient.any()) for gradient in gradients].count(True) == 1  # the embedding's


def test_gradients_repeat_bit_for_bit() -> None:
    """Those of gathering patches and of resizing positions; attention's are torch's affair."""
    model = make_model().cuda()
    tower = model.vision_tower.vision_model.embeddings
    layout = image_layout(200, 100, Tiling(28, 14))
    sources = torch.from_numpy(token_sources(layout)).cuda()
    pixels = torch.randn(layout.num_tiles, 3, 28, 28, device="cuda")
    results = []
    for _ in range(2):
        model.zero_grad()
        patches = tower(pixels)[:, 1:].flatten(0, 1)
        model.image_features(patches, sources).square().sum().backward()
        found = [tower.position_embedding.weight.grad, model.image_newline.grad]
        results.append(
            torch.cat([gradient.flatten() for gradient in found if gradient is not None])
        )
    assert results[0].numel() > 128
    assert torch.equal(*results)
