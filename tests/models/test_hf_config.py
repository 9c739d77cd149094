"""config.json of both kinds, to and from our configuration, and what is refused in it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fulmen.models.config import ModelConfig
from fulmen.models.hf import FORMATS, from_hf_config, to_hf_config

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=3,
    num_experts_per_token=2,
    expert_hidden_size=12,
    vocab_size=40,
    softmax_every=2,
)


@pytest.mark.fast
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(MODEL, softmax_every=0),
        replace(MODEL, softmax_every=1, rotary_dim=0),
        replace(MODEL, num_layers=12, softmax_every=8, rope_theta=1.0e7, rms_norm_eps=1.0e-6),
        replace(MODEL, head_dim=24, rotary_dim=10, residual_alpha=1.5, residual_beta=0.5),
    ],
)
def test_config_there_and_back(model: ModelConfig, format: str) -> None:
    values = to_hf_config(model, format, max_position_embeddings=64, dtype="bfloat16")
    assert from_hf_config(json.loads(json.dumps(values))) == model


@pytest.mark.fast
def test_released_config_of_text01() -> None:
    """Against the facts of the released file (reference/minimax01.md, 1.5)."""
    values: dict[str, Any] = {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        "attention_dropout": 0.0,
        "attn_type_list": ([0] * 7 + [1]) * 10,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 10_240_000,
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10_000_000,
        "rotary_dim": 64,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 200_064,
    }
    for kind in ("full_attention", "linear_attention", "mlp"):
        values[f"layernorm_{kind}_alpha"] = 3.5565588200778455
        values[f"layernorm_{kind}_beta"] = 1.0
    model = from_hf_config(values)
    assert model.residual_alpha is None  # the DeepNorm value for 80 layers
    assert model.softmax_every == 8
    written = to_hf_config(model, "released", max_position_embeddings=10_240_000, dtype="bfloat16")
    assert written == values | {"torch_dtype": "bfloat16"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("released", {"model_type": "mixtral"}, "model_type=mixtral: must be one of"),
        ("released", {"postnorm": False}, "postnorm: must be true"),
        ("released", {"postnorm": "deleted"}, "postnorm: must be true"),
        ("released", {"shared_intermediate_size": 512}, "shared_intermediate_size=512"),
        ("released", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("released", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("released", {"sliding_window": 4096}, "sliding_window=4096"),
        ("released", {"attention_bias": True}, "attention_bias=True: .* no biases"),
        ("released", {"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ("released", {"quantization_config": {"bits": 8}}, "quantization_config="),
        ("released", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("released", {"attn_type_list": [0, 1, 1, 0]}, "attn_type_list: entry 2 breaks"),
        ("released", {"attn_type_list": [1, 0, 1, 0]}, "attn_type_list: entry 1 breaks"),
        ("released", {"attn_type_list": [0, 1]}, "attn_type_list: has 2 entries"),
        ("released", {"attn_type_list": [0, 1, 2, 1]}, "attn_type_list: 2 is no kind"),
        ("released", {"attn_type_list": "deleted"}, "attn_type_list: missing"),
        ("released", {"vocab_size": "deleted"}, "vocab_size: missing from config.json"),
        ("released", {"layernorm_mlp_alpha": 1.0}, "layernorm_mlp_alpha=1.0: .* one value"),
        ("released", {"layernorm_mlp_beta": 0.5}, "layernorm_mlp_beta=0.5: .* one value"),
        ("released", {"rotary_dim": 3}, "model.rotary_dim=3: must be even"),
        ("released", {"partial_rotary_factor": 1.0}, "rotary_dim, partial_rotary_factor: contrad"),
        ("released", {"num_attention_heads": 6}, "power of two"),
        ("transformers", {"sliding_window": 4096}, "sliding_window=4096"),
        ("transformers", {"layer_types": "deleted"}, "layer_types: missing"),
        (
            "transformers",
            {"layer_types": ["full_attention", "linear_attention"] * 2},
            "layer_types: entry 1 breaks",
        ),
        (
            "transformers",
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types: sliding_attention is no kind",
        ),
        ("transformers", {"mlp_beta_factor": 0.5}, "mlp_beta_factor=0.5: .* one value"),
        (
            "transformers",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters.rope_type=yarn",
        ),
        ("transformers", {"rope_parameters": None}, "rope_theta: missing"),
        (
            "transformers",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.3}},
            "rope_parameters.partial_rotary_factor: gives 2.4 dims",
        ),
    ],
)
def test_what_fulmen_cannot_do_is_refused_by_name(
    format: str, changes: dict[str, Any], message: str
) -> None:
    values = to_hf_config(MODEL, format, max_position_embeddings=64, dtype="bfloat16") | changes
    with pytest.raises(ValueError, match=message):
        from_hf_config({key: value for key, value in values.items() if value != "deleted"})


@pytest.mark.fast
def test_a_model_that_config_json_cannot_say_is_refused() -> None:
    odd = replace(MODEL, lightning_norm_eps=1.0e-5)
    with pytest.raises(ValueError, match=r"model.lightning_norm_eps=1e-05"):
        to_hf_config(odd, "released", max_position_embeddings=64, dtype="bfloat16")
