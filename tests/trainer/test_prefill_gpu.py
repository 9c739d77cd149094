"""Texts in pieces on a GPU, with its kernels."""

import pytest
import torch
from support.tiny import tiny_model

from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.text import TextModel
from fulmen.trainer.prefill import Reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_as_in_one_piece(dtype: torch.dtype, tolerance: float) -> None:
    config = tiny_model(num_layers=5, num_attention_heads=4, head_dim=64, hidden_size=128)
    model = TextModel(config, MoEConfig())
    init_model(model, config, seed=1)
    model = model.to("cuda", dtype).requires_grad_(False).eval()
    for layer in model.layers:
        layer.block_sparse_moe.gate.to(torch.float32)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (5000,), generator=generator)
    whole = model(ids[None].cuda())[0, -20:].float()
    for chunk_tokens in (333, 1024, 4096):
        logits, _ = Reader(model, chunk_tokens=chunk_tokens).read(ids, num_logits=20)
        error = (logits.float() - whole).abs()
        # A token that another expert takes in bf16 may stand out; most do not.
        assert error.median() < tolerance * whole.abs().max()
        if dtype == torch.float32:
            assert error.max() < tolerance * whole.abs().max()


def test_memory_does_not_grow_with_the_text_but_for_keys() -> None:
    config = tiny_model(num_attention_heads=4, head_dim=64, hidden_size=128)
    model = TextModel(config, MoEConfig())
    init_model(model, config, seed=1)
    model = model.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    reader, peaks = Reader(model, chunk_tokens=4096), []
    for tokens in (65_536, 262_144):
        ids = torch.zeros(tokens, dtype=torch.long)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, cache = reader.read(ids)
        keys = sum(x.nbytes for kv in cache.keys_values.values() for x in kv.views())
        peaks.append(torch.cuda.max_memory_allocated() - before - keys)
        del cache
    assert peaks[1] < 1.2 * peaks[0]
