"""Images in the text model: what each image token shows, packed rows, gradients, names, sizes."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.tiny import ROOT
from torch import Tensor

from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig, check_model
from fulmen.models.hf import from_hf_config, released_layout, to_hf_config, to_preprocessor_config
from fulmen.models.image_layout import RELEASED, ImageLayout, Tiling, image_layout, place_images
from fulmen.models.init import init_model
from fulmen.models.layers import Cache
from fulmen.models.text import LossOutput, TextModel, count_active_parameters, count_parameters
from fulmen.models.vl import Images, VisionLanguageModel, build_model

pytestmark = pytest.mark.fast

IMAGE = 39
TEXT = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    num_experts_per_token=2,
    expert_hidden_size=12,
    vocab_size=40,
    softmax_every=2,
)
VISION = VisionConfig(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=2,
    mlp_hidden_size=20,
    tile_size=8,
    patch_size=4,
    image_token_id=IMAGE,
    max_tiles_per_side=2,
    max_tiles=2,
)
VL = replace(TEXT, vision=VISION)
SIZES = [(16, 8), (8, 20), (5, 5)]
"""(width, height): two tiles beside each other, two above each other with padding, one."""


def make_model(config: ModelConfig = VL) -> Any:
    """fp64, so that equalities are sharp; routers scaled up, so that they are not all alike."""
    model = build_model(config, MoEConfig())
    init_model(model, config, 0)
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            parameter.data *= 5
        elif name.endswith(".bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.double()


Document = tuple[int, list[ImageLayout]]
"""Tokens of text before, between and behind the images, and these."""


def batch_of(documents: list[Document]) -> tuple[Tensor, Images, list[int]]:
    """One packed row, its images, and the lengths of its documents."""
    draw = np.random.default_rng(0)
    ids: list[int] = []
    placed, lengths = [], []
    for text, layouts in documents:
        before = len(ids)
        ids += draw.integers(0, IMAGE, text).tolist()
        for layout in layouts:
            placed.append((len(ids), layout))
            ids += [IMAGE] * layout.num_tokens + draw.integers(0, IMAGE, text).tolist()
        lengths.append(len(ids) - before)
    places, sources = place_images(placed)
    tiles = sum(layout.num_tiles for _, layout in placed)
    generator, side = torch.Generator().manual_seed(0), VISION.tile_size
    pixels = torch.randn(tiles, 3, side, side, generator=generator, dtype=torch.float64)
    images = Images(pixels, torch.from_numpy(places), torch.from_numpy(sources))
    return torch.tensor([ids]), images, lengths


def some_layouts() -> list[ImageLayout]:
    return [image_layout(*size, VISION.tiling) for size in SIZES]


def some_batch() -> tuple[Tensor, Images, list[int]]:
    """One row: a document with two images, one without, one that is an image, and lengths."""
    layouts = some_layouts()
    return batch_of([(5, layouts[:2]), (1, []), (0, layouts[2:])])


def labels_of(ids: Tensor) -> Tensor:
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    return torch.where(labels == IMAGE, -100, labels)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


# What each image token shows.


def draw_features(layout: ImageLayout, tiles: Tensor, newline: Tensor, size: Any) -> Tensor:
    """The released assembly, from scratch: patches are looked up by where they lie in the picture.

    Half of the padding's patches, rounded down, are cut off at each edge.
    """
    width, height = size
    side = layout.tiling.patches_per_side
    down, across = layout.rows * side, layout.columns * side
    if width * down > height * across:  # as wide as the grid
        cut = ((down - int(round(height * (across / width), 7))) // 2, 0)
    else:
        cut = (0, (across - int(round(width * (down / height), 7))) // 2)
    tokens = list(tiles[0])
    for y in range(cut[0], down - cut[0]):
        for x in range(cut[1], across - cut[1]):
            tile = 1 + (y // side) * layout.columns + x // side
            tokens.append(tiles[tile, (y % side) * side + x % side])
        tokens.append(newline)
    return torch.stack(tokens)


def assembled(layouts: list[ImageLayout], tiles: list[Tensor], newline: Tensor) -> Tensor:
    """By the model's own path: a projector that changes nothing."""
    model = SimpleNamespace(image_newline=newline, multi_modal_projector=lambda x: x)
    firsts = np.cumsum([0, *(layout.num_tokens for layout in layouts)]).tolist()
    places, sources = place_images(zip(firsts, layouts, strict=False))
    assert places.tolist() == list(range(firsts[-1]))
    patches = torch.cat(tiles).flatten(0, 1)
    features = VisionLanguageModel.image_features
    return features(model, patches, torch.from_numpy(sources))  # type: ignore[arg-type]


ASSEMBLED = [(336, 336), (640, 480), (1280, 720), (1920, 1080), (333, 1000), (2016, 400), (50, 40)]


@pytest.mark.parametrize("tiling", [RELEASED, Tiling(28, 7, 3, 4)])
def test_assembly_by_hand(tiling: Tiling) -> None:
    layouts = [image_layout(*size, tiling) for size in ASSEMBLED]
    tiles = [torch.randn(x.num_tiles, tiling.patches_per_tile, 2) for x in layouts]
    newline = torch.randn(2)
    wanted = [
        draw_features(layout, own, newline, size)
        for layout, own, size in zip(layouts, tiles, ASSEMBLED, strict=True)
    ]
    assert torch.equal(assembled(layouts, tiles, newline), torch.cat(wanted))


def test_assembly_equals_llava_next() -> None:
    transformers = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    layouts = [image_layout(*size) for size in ASSEMBLED]
    tiles = [torch.randn(x.num_tiles, 576, 3) for x in layouts]
    newline = torch.randn(3)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=14),
        image_grid_pinpoints=[list(pair) for pair in RELEASED.pinpoints],
    )
    wanted, lengths = transformers.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        tiles,
        [(height, width) for width, height in ASSEMBLED],
        vision_feature_select_strategy="default",
        image_newline=newline,
    )
    assert lengths.tolist() == [layout.num_tokens for layout in layouts]
    assert torch.equal(assembled(layouts, tiles, newline), torch.cat(wanted))


def test_projector_is_two_maps_and_an_exact_gelu() -> None:
    projector = make_model().multi_modal_projector
    x = torch.randn(7, 12, dtype=torch.float64)
    inner = x @ projector.linear_1.weight.T + projector.linear_1.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    wanted = inner @ projector.linear_2.weight.T + projector.linear_2.bias
    torch.testing.assert_close(projector(x), wanted, rtol=0, atol=1e-13)


def test_features_are_written_over_image_tokens_only() -> None:
    model = make_model()
    ids, images, _ = some_batch()
    embedded = model.embed(ids, images)[0]
    is_image = ids[0] == IMAGE
    assert torch.equal(embedded[~is_image], model.embed_tokens(ids)[0, ~is_image])
    patches = model.multi_modal_projector(model.vision_tower(images.pixels)).flatten(0, 1)
    wanted = [model.image_newline if s < 0 else patches[s] for s in images.sources.tolist()]
    torch.testing.assert_close(embedded[is_image], torch.stack(wanted), rtol=0, atol=1e-13)


def test_places_and_sources_of_any_part() -> None:
    layouts = some_layouts()
    ids, images, _ = some_batch()
    assert torch.equal(images.places, (ids[0] == IMAGE).nonzero()[:, 0])
    firsts = [5, 10 + layouts[0].num_tokens, ids.shape[1] - layouts[2].num_tokens]
    placed = list(zip(firsts, layouts, strict=True))
    for cuts in ([0, 23, 30], [0, 5, 6, 10], [0, 1, 2, 3]):
        parts = [
            (first, *place_images(placed, first, end))
            for first, end in pairwise([*cuts, ids.shape[1]])
        ]
        assert (
            np.concatenate([p + first for first, p, _ in parts]).tolist() == images.places.tolist()
        )
        assert np.concatenate([s for _, _, s in parts]).tolist() == images.sources.tolist()
    places, sources = place_images(placed, 0, 5)
    assert places.dtype == sources.dtype == np.int64
    assert len(places) == len(sources) == 0


# The text model around them.


def test_without_images_it_is_the_text_model() -> None:
    text, model = make_model(TEXT), make_model()
    assert type(text) is TextModel
    assert type(model) is VisionLanguageModel
    ours = dict(model.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in text.named_parameters())
    ids = torch.randint(IMAGE, (1, 50))
    _, none, _ = batch_of([(50, [])])
    for arguments in ({}, {"cu_seqlens": bounds([20, 29, 1])}):
        wanted = text(ids, labels=labels_of(ids), **arguments)
        for images in (None, none):
            found = model(ids, labels=labels_of(ids), images=images, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    model(ids, labels=labels_of(ids), images=none).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # every rank takes part in every collective
        assert name in dict(text.named_parameters()) or not parameter.grad.any(), name


def test_packed_documents_see_their_own_images_only() -> None:
    model = make_model()
    ids, images, lengths = some_batch()
    packed = model(ids, images=images, cu_seqlens=bounds(lengths))
    layouts = some_layouts()
    starts = ([(5, layouts[0]), (10 + layouts[0].num_tokens, layouts[1])], [], [(0, layouts[2])])
    first_token, first_tile = 0, 0
    for length, own in zip(lengths, starts, strict=True):
        alone = ids[:, first_token : first_token + length]
        tiles = sum(layout.num_tiles for _, layout in own)
        places, sources = place_images(own)
        pixels = images.pixels[first_tile : first_tile + tiles]
        of_one = Images(pixels, torch.from_numpy(places), torch.from_numpy(sources))
        logits = model(alone, images=of_one)
        wanted = packed[:, first_token : first_token + length]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
        first_token, first_tile = first_token + length, first_tile + tiles


def test_every_pixel_reaches_the_answer() -> None:
    """But not the tokens in front of the image."""
    model = make_model()
    layout = image_layout(8, 20, VISION.tiling)
    assert (layout.rows, layout.columns, layout.map_columns) == (2, 1, 2)
    ids, images, _ = batch_of([(4, [layout])])
    pixels = images.pixels.requires_grad_()
    logits = model(ids, images=images)
    (before,) = torch.autograd.grad(logits[0, 3].sum(), pixels, retain_graph=True)
    assert not before.any()
    (behind,) = torch.autograd.grad(logits[0, -1].square().sum(), pixels)
    assert behind.all()


def test_several_passes_of_one_text_with_a_cache() -> None:
    model = make_model().eval()
    ids, images, _ = batch_of([(3, some_layouts())])
    with torch.no_grad():
        whole = model(ids, images=images)
        cache, parts = Cache(), []
        for first in range(0, ids.shape[1], 11):
            own = (images.places >= first) & (images.places < first + 11)
            # The same tiles each time; what a pass shows of them is its own tokens' sources.
            some = Images(images.pixels, images.places[own] - first, images.sources[own])
            parts.append(model(ids[:, first : first + 11], images=some, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_a_row_spread_over_ranks() -> None:
    """Each rank sees some tiles and embeds some tokens; `collect` joins the patches."""
    model = make_model()
    ids, images, _ = some_batch()
    weights = torch.randn(ids.shape[1], 16, dtype=torch.float64)

    def gradients(loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    whole = model.embed(ids, images)
    wanted = gradients((whole[0] * weights).sum())
    patches = torch.cat([model.vision_tower(t) for t in images.pixels.split(3)]).flatten(0, 1)
    model.collect = lambda own, images: patches
    embedded, cut = [], 23
    for first, end in ((0, cut), (cut, ids.shape[1])):
        own = (images.places >= first) & (images.places < end)
        part = Images(images.pixels[:0], images.places[own] - first, images.sources[own])
        embedded.append(model.embed(ids[:, first:end], part))
    joined = torch.cat(embedded, dim=1)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-13)
    for a, b in zip(gradients((joined[0] * weights).sum()), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    """Of the loss of a packed row, along a random direction of each parameter."""
    model = make_model()
    ids, images, lengths = some_batch()

    def loss() -> Tensor:
        output = model(ids, labels=labels_of(ids), images=images, cu_seqlens=bounds(lengths))
        assert isinstance(output, LossOutput)
        return output.loss_sum

    loss().backward()
    generator, step, checked = torch.Generator().manual_seed(0), 1e-5, 0
    for name, parameter in model.named_parameters():
        if name.startswith("layers."):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append(loss().item())
                parameter -= sign * step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        exact = (parameter.grad * direction).sum().item()
        assert numeric == pytest.approx(exact, rel=1e-5, abs=1e-7), name
        # Keys' biases add the same to all scores of a query.
        assert "k_proj.bias" in name or abs(exact) > 1e-6, name
        checked += 1
    assert checked == 3 + 1 + 4 + 5 + 2 * 16
    assert not model.embed_tokens.weight.grad[IMAGE].any()


# Names, sizes, config.json.


def full() -> ModelConfig:
    values = OmegaConf.load(ROOT / "recipes/model/vl01.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(config, ModelConfig)
    return config


def test_full_model() -> None:
    config = full()
    check_model(config, MoEConfig())
    with torch.device("meta"):
        model = build_model(config, MoEConfig())
    assert count_parameters(model) == 456_437_219_328
    assert count_active_parameters(model) == 45_944_920_064
    projector = sum(p.numel() for p in model.multi_modal_projector.parameters())
    assert projector == 44_052_480


def test_released_names_and_shapes() -> None:
    """The release's own list of keys is known by its hash (reference/minimax01.md, 1.6)."""
    layout = released_layout(full())
    assert len(layout) == 8_637
    digest = hashlib.sha256("\n".join(sorted(layout)).encode()).hexdigest()
    assert digest == "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"
    assert sum(torch.Size(slot.shape).numel() for slot in layout.values()) == 456_437_219_328
    shapes = {
        "language_model.model.embed_tokens.weight": (200_064, 6144),
        "language_model.lm_head.weight": (200_064, 6144),
        "language_model.model.layers.7.self_attn.k_proj.weight": (1024, 6144),
        "language_model.model.layers.79.block_sparse_moe.experts.31.w2.weight": (6144, 9216),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "multi_modal_projector.linear_1.weight": (6144, 1024),
        "multi_modal_projector.linear_2.weight": (6144, 6144),
        "image_newline": (6144,),
    }
    assert {key: layout[key].shape for key in shapes} == shapes


def test_tower_names_and_shapes_are_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    values = to_hf_config(full(), "released", max_position_embeddings=8192, dtype="bfloat16")
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**values["vision_config"])
        )
    prefix = "vision_tower.vision_model."
    wanted = {
        prefix + name: tuple(value.shape)
        for name, value in theirs.state_dict().items()
        if not name.startswith("post_layernorm.")  # not in the release
    }
    layout = released_layout(full())
    assert wanted == {k: slot.shape for k, slot in layout.items() if k.startswith(prefix)}


def test_released_config() -> None:
    values = to_hf_config(full(), "released", max_position_embeddings=8192, dtype="bfloat16")
    text = values.pop("text_config")
    without = to_hf_config(
        replace(full(), vision=None), "released", max_position_embeddings=8192, dtype="bfloat16"
    )
    assert text == without
    assert values.pop("image_grid_pinpoints")[:7] == [
        *([336, 336 * columns] for columns in range(1, 7)),
        [672, 336],
    ]
    assert values == {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 200_025,
        "model_type": "minimax_vl_01",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 336,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 6144,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


@pytest.mark.parametrize(
    "config", [VL, replace(VL, vision=replace(VISION, max_tiles_per_side=1, max_tiles=1))]
)
def test_config_there_and_back(config: ModelConfig) -> None:
    values = to_hf_config(config, "released", max_position_embeddings=64, dtype="float32")
    listed = json.loads(json.dumps(values))
    assert from_hf_config(listed) == config
    listed["text_config"]["shared_intermediate_size"] = [0]  # as some of the release's files
    assert from_hf_config(listed) == config


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "",
            {"projector_hidden_act": "relu"},
            "projector_hidden_act=relu: fulmen's model has gelu",
        ),
        ("", {"vision_feature_layer": -2}, "vision_feature_layer=-2"),
        ("", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy=full"),
        ("", {"image_grid_pinpoints": [[8, 8], [16, 8]]}, "image_grid_pinpoints: not all grids"),
        ("", {"image_grid_pinpoints": None}, "image_grid_pinpoints: missing"),
        ("", {"image_token_index": 40}, r"model\.vision\.image_token_id=40"),
        ("", {"image_token_index": None}, "image_token_index: missing"),
        ("", {"vision_config": None}, "vision_config: missing"),
        ("", {"text_config": None}, "text_config: missing"),
        ("", {"quantization_config": {"bits": 8}}, "quantization_config="),
        ("vision_config", {"hidden_act": "quick_gelu"}, r"vision_config\.hidden_act=quick_gelu"),
        ("vision_config", {"model_type": "siglip"}, r"vision_config\.model_type=siglip"),
        ("vision_config", {"patch_size": None}, r"vision_config\.patch_size: missing"),
        ("text_config", {"postnorm": False}, "postnorm: must be true"),
        ("text_config", {"shared_intermediate_size": [512]}, "shared_intermediate_size="),
    ],
)
def test_what_fulmen_cannot_do_is_refused_by_name(
    part: str, changes: dict[str, Any], message: str
) -> None:
    values = to_hf_config(VL, "released", max_position_embeddings=64, dtype="float32")
    (values[part] if part else values).update(changes)
    with pytest.raises(ValueError, match=message):
        from_hf_config(values)


def test_only_the_release_has_a_config_of_it() -> None:
    with pytest.raises(ValueError, match=r"format=transformers: a model with model\.vision"):
        to_hf_config(VL, "transformers", max_position_embeddings=64, dtype="float32")


def test_preprocessor_config() -> None:
    """Read by transformers' LLaVA-NeXT processor, whose numbers these are."""
    values = to_preprocessor_config(full().vision)  # type: ignore[arg-type]
    processing = pytest.importorskip(
        "transformers.models.llava_next.image_processing_pil_llava_next"
    )
    theirs = processing.LlavaNextImageProcessorPil()
    assert values["image_mean"] == list(theirs.image_mean)
    assert values["image_std"] == list(theirs.image_std)
    assert values["resample"] == theirs.resample
    assert values["rescale_factor"] == theirs.rescale_factor
    assert len(values["image_grid_pinpoints"]) == 28
    assert values["size"] == {"height": 336, "width": 336}


@pytest.mark.parametrize("name", ["vl01", "vl01_1b"])
def test_recipes_are_text_models_with_eyes(name: str) -> None:
    folder = ROOT / "recipes" / "model"
    values = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    text = OmegaConf.to_container(OmegaConf.load(folder / f"{name.replace('vl', 'text')}.yaml"))
    assert isinstance(values, dict)
    assert isinstance(text, dict)
    vision = values.pop("vision")
    if name == "vl01":
        text["rope_theta"] = 10_000_000.0  # where Text-01's own training ends
    assert values == text
    config = ModelConfig(**values, vision=VisionConfig(**vision))
    check_model(config, MoEConfig())
