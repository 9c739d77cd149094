"""A tower with its captioner on a GPU."""

from dataclasses import replace

import pytest
import torch
from support.captioned import pairs, tiny_coca
from torch import Tensor

from fulmen.models.coca import CoCa, CoCaLosses
from fulmen.models.init import init_model
from fulmen.trainer.caption_inputs import move_captions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model() -> CoCa:
    """Heads of 64, for the kernels that a full-size model takes."""
    config = replace(tiny_coca(), hidden_size=128, num_attention_heads=2, vocab_size=64)
    model = CoCa(config)
    init_model(model, config, seed=1)
    return model


def losses_of(model: CoCa, *, check: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients; with `check`, an error where the host would wait for the device."""
    weight = model.lm_head.weight
    pixels, captions = pairs(6)
    pixels, captions = pixels.to(weight.device), move_captions(captions, weight.device)
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error" if check else "default")
    try:
        output = model(pixels, replace(captions, count=5), room=8)
        assert isinstance(output, CoCaLosses)
        (output.caption_loss_sum / 20 + output.contrastive_loss_sum / 5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return [output.caption_loss_sum.detach(), output.contrastive_loss_sum.detach()], gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_as_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    wanted, wanted_gradients = losses_of(make_model().double())
    model = make_model().to("cuda", dtype)
    model.contrast.float()  # as its ZeRO unit is
    losses_of(model)
    found, gradients = losses_of(model, check=True)
    for one, want in zip(found, wanted, strict=True):
        assert float(one) == pytest.approx(float(want), rel=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in wanted_gradients.values())
    for name, want in wanted_gradients.items():
        assert (gradients[name].cpu() - want).abs().max() < tolerance * largest, name
