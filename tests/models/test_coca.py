"""CoCa against a reference by hand, image by image and caption by caption, in fp64."""

from dataclasses import replace

import pytest
import torch
from support.captioned import pairs, tiny_coca
from torch import Tensor

from fulmen.models.coca import Captions, CoCa, CoCaLosses
from fulmen.models.config import CoCaConfig, ModelConfig, MoEConfig, check_model
from fulmen.models.init import init_model
from fulmen.models.vl import build_model

pytestmark = pytest.mark.fast


def make_coca(config: ModelConfig | None = None) -> CoCa:
    """Values as large as trained ones, biases and norms too, so that what is left out shows."""
    model = CoCa(config or tiny_coca()).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = scale * values + float("norm" in name and name.endswith("weight"))
    return model


class Reference:
    """The losses as the paper has them, from a table of weights."""

    def __init__(self, weights: dict[str, Tensor], config: ModelConfig) -> None:
        assert config.vision is not None
        assert config.coca is not None
        self.w, self.config, self.vision, self.coca = weights, config, config.vision, config.coca

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.w.get(f"{name}.bias")
        return x @ self.w[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, name: str, x: Tensor, source: Tensor, heads: int, causal: bool) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.{part}_proj", one)
            for part, one in (("q", x), ("k", source), ("v", source))
        )
        outputs = []
        for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            scores = qh @ kh.T / qh.shape[1] ** 0.5
            if causal:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            outputs.append(scores.softmax(-1) @ vh)
        return self.linear(f"{name}.out_proj", torch.cat(outputs, 1))

    def mlp(self, first: str, second: str, x: Tensor) -> Tensor:
        h = self.linear(first, x)
        return self.linear(second, h * (1 + torch.erf(h / 2**0.5)) / 2)

    def patches(self, image: Tensor) -> Tensor:
        name, size = "vision_tower.vision_model", self.vision.patch_size
        rows = [
            image[:, y : y + size, x : x + size].flatten()
            for y in range(0, image.shape[1], size)
            for x in range(0, image.shape[2], size)
        ]
        x = self.linear(f"{name}.embeddings.patch_embedding", torch.stack(rows))
        x = torch.cat([self.w[f"{name}.embeddings.class_embedding"][None], x])
        x = x + self.w[f"{name}.embeddings.position_embedding.weight"]
        x = self.norm(f"{name}.pre_layrnorm", x)
        for layer in range(self.vision.num_layers):
            block, heads = f"{name}.encoder.layers.{layer}", self.vision.num_attention_heads
            h = self.norm(f"{block}.layer_norm1", x)
            x = x + self.attend(f"{block}.self_attn", h, h, heads, False)
            h = self.norm(f"{block}.layer_norm2", x)
            x = x + self.mlp(f"{block}.mlp.fc1", f"{block}.mlp.fc2", h)
        return x[1:]

    def image(self, patches: Tensor) -> Tensor:
        source = self.norm("pooler.norm", patches)
        heads = self.vision.num_attention_heads
        x = self.attend("pooler.attn", self.w["pooler.query"], source, heads, False)[0]
        x = self.linear("pooler.projection", self.norm("pooler.post_norm", x))
        return x / x.square().sum().sqrt()

    def block(self, layer: int, x: Tensor, patches: Tensor | None) -> Tensor:
        name, heads = f"layers.{layer}", self.config.num_attention_heads
        h = self.norm(f"{name}.self_attn_norm", x)
        x = x + self.attend(f"{name}.self_attn", h, h, heads, True)
        if patches is not None:
            h, seen = (
                self.norm(f"{name}.cross_attn_norm", x),
                self.norm(f"{name}.patch_norm", patches),
            )
            x = x + self.attend(f"{name}.cross_attn", h, seen, heads, False)
        return x + self.mlp(f"{name}.fc1", f"{name}.fc2", self.norm(f"{name}.mlp_norm", x))

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.w["embed_tokens.weight"][ids] + self.w["position_embedding.weight"][: len(ids)]
        x = torch.cat([x, self.w["class_embedding"][None]])
        for layer in range(self.coca.num_unimodal_layers):
            x = self.block(layer, x, None)
        e = self.linear("text_head.projection", self.norm("text_head.norm", x[-1]))
        return x[:-1], e / e.square().sum().sqrt()

    def losses(self, pixels: Tensor, captions: Captions) -> tuple[Tensor, Tensor, int]:
        images, texts, caption_loss = [], [], torch.zeros((), dtype=torch.float64)
        assert captions.labels is not None
        for number, length in enumerate(captions.lengths.tolist()):
            patches = self.patches(pixels[number])
            x, text = self.text(captions.input_ids[number, :length])
            for layer in range(self.coca.num_unimodal_layers, self.config.num_layers):
                x = self.block(layer, x, patches)
            chances = self.linear("lm_head", self.norm("norm", x)).log_softmax(-1)
            for place, label in enumerate(captions.labels[number, :length].tolist()):
                caption_loss = caption_loss - chances[place, label]
            images.append(self.image(patches))
            texts.append(text)
        scores = torch.stack(images) @ torch.stack(texts).T * self.w["contrast.log_scale"].exp()
        by_image, by_text = scores.log_softmax(1).diag(), scores.log_softmax(0).diag()
        own = torch.arange(len(images))
        right = (scores.argmax(0) == own).sum() + (scores.argmax(1) == own).sum()
        return caption_loss, -(by_image + by_text).sum() / 2, int(right)


def test_losses_and_gradients_equal_a_reference() -> None:
    model = make_coca()
    pixels, captions = pairs(5, torch.float64)
    output = model(pixels, captions)
    assert isinstance(output, CoCaLosses)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    caption_loss, contrastive_loss, right = Reference(weights, tiny_coca()).losses(pixels, captions)
    torch.testing.assert_close(output.caption_loss_sum, caption_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.contrastive_loss_sum, contrastive_loss, rtol=1e-12, atol=0)
    assert output.num_right == right
    (2 * output.caption_loss_sum + 0.7 * output.contrastive_loss_sum).backward()
    (2 * caption_loss + 0.7 * contrastive_loss).backward()
    largest = max(float(w.grad.abs().max()) for w in weights.values() if w.grad is not None)
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        assert (parameter.grad - wanted).abs().max() <= 1e-11 * largest, name
        assert wanted.abs().max() > 1e-6 or name.endswith("k_proj.bias"), name


def test_either_alone_gives_embeddings() -> None:
    model = make_coca()
    pixels, captions = pairs(4, torch.float64)
    reference = Reference(dict(model.state_dict()), tiny_coca())
    images, texts = model(pixels), model(None, captions)
    for number, length in enumerate(captions.lengths.tolist()):
        wanted = reference.image(reference.patches(pixels[number]))
        torch.testing.assert_close(images[number], wanted, rtol=1e-11, atol=1e-12)
        wanted = reference.text(captions.input_ids[number, :length])[1]
        torch.testing.assert_close(texts[number], wanted, rtol=1e-11, atol=1e-12)


def test_rows_that_do_not_count_change_nothing() -> None:
    """What is contrasted are the pairs that count, whatever room there is."""
    model = make_coca()
    pixels, captions = pairs(5, torch.float64)
    assert captions.labels is not None
    few = replace(
        captions,
        input_ids=captions.input_ids[:3],
        lengths=captions.lengths[:3],
        labels=captions.labels[:3],
    )
    wanted = model(pixels[:3], few, room=3)
    labels = captions.labels.clone()
    labels[3:] = -100
    got = model(pixels, replace(captions, labels=labels, count=3), room=7)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    nothing = model(pixels, replace(captions, labels=torch.full_like(labels, -100), count=0))
    assert [part.item() for part in nothing[:3]] == [0.0, 0.0, 0.0]
    (nothing.caption_loss_sum + nothing.contrastive_loss_sum).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_temperature_has_a_least() -> None:
    model = make_coca()
    pixels, captions = pairs(4, torch.float64)
    scores = []
    for value in (4.6, 4.60517018599, 9.0):
        model.contrast.log_scale.data.fill_(value)
        scores.append(model(pixels, captions).contrastive_loss_sum.item())
    assert scores[0] != scores[1] == pytest.approx(scores[2], rel=1e-9)


def test_the_tower_begins_as_that_of_a_vl_model() -> None:
    coca, config = CoCa(tiny_coca()), tiny_coca()
    config.coca, config.num_attention_heads, config.num_key_value_heads = None, 2, 2
    other = build_model(config, MoEConfig())
    for model, shapes in ((coca, tiny_coca()), (other, config)):
        init_model(model, shapes, seed=4)
    towers = [
        {name: p for name, p in model.named_parameters() if name.startswith("vision_tower.")}
        for model in (coca, other)
    ]
    assert towers[0].keys() == towers[1].keys()
    for name, parameter in towers[0].items():
        assert torch.equal(parameter, towers[1][name]), name
    assert float(coca.contrast.log_scale.detach().exp()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": None}, r"model\.coca needs model\.vision"),
        ({"num_experts": 4}, r"model\.num_experts=4: .* set it to 1"),
        ({"rotary_dim": 4}, r"model\.rotary_dim=4: .* set it to 0"),
        ({"num_key_value_heads": 1}, r"model\.num_key_value_heads=1: .* set it to 3"),
        ({"coca": CoCaConfig(3, 12)}, r"num_unimodal_layers=3: .*below model\.num_layers=3"),
        ({"coca": CoCaConfig(1, 0)}, r"model\.coca\.embedding_size=0: must be at least 1"),
        ({"coca": CoCaConfig(1, 12, caption_weight=-1.0)}, r"caption_weight=-1\.0: must not"),
        ({"coca": CoCaConfig(1, 12, initial_temperature=0.001)}, r"must be at least 0\.01"),
    ],
)
def test_mistakes_are_told_by_key(changes: dict, message: str) -> None:
    check_model(tiny_coca(), MoEConfig())
    with pytest.raises(ValueError, match=message):
        check_model(replace(tiny_coca(), **changes), MoEConfig())
