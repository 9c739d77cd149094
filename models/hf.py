"""Names, shapes and config.json of the released checkpoints, mapped to ours and back.

No file is read or written here. Two kinds of config.json describe one set of Text-01's tensors: the
release's own (`minimax_text_01`) and that of transformers' MiniMax class (`minimax`). VL-01 has its
own alone (`minimax_vl_01`), around that of its text model. Of a tower with its captioner the tower
is written, as transformers' CLIPVisionModel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig, check_model
from fulmen.models.image_layout import PIXEL_MEAN, PIXEL_STD
from fulmen.models.vision import CHANNELS
from fulmen.models.vl import build_model

FORMATS = ("released", "transformers")
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Constants that transformers' lightning layers save; they follow from the config."""

_LIGHTNING_NORM_EPS = 1.0e-6  # hard-coded by the released code and by transformers
_ALPHA_KEYS = {
    "released": [
        f"layernorm_{kind}_alpha" for kind in ("full_attention", "linear_attention", "mlp")
    ],
    "transformers": [f"{kind}_alpha_factor" for kind in ("full_attn", "linear_attn", "mlp")],
}
_SIZE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "expert_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "quantization_config": None,
}
"""What fulmen's model can not vary: key -> the only value."""
_VISION_SIZE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "mlp_hidden_size": "intermediate_size",
    "tile_size": "image_size",
    "patch_size": "patch_size",
}
_VISION_FIXED = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "num_channels": CHANNELS,
    "attention_dropout": 0.0,
}
_VL_FIXED = {
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
_VISION_NAMES = ("vision_tower.", "multi_modal_projector.", "image_newline")
"""Beginnings of our names that are the released ones; the others are the text model's."""


class Slot(NamedTuple):
    """Where one released tensor lives among ours."""

    name: str
    """Our parameter."""
    expert: int | None
    """Its index along the first dim, or None if it is the whole parameter."""
    shape: tuple[int, ...]
    """Shape of the released tensor."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, in the model's order; no memory is taken."""
    with torch.device("meta"):
        model = build_model(config, MoEConfig())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def released_layout(config: ModelConfig) -> dict[str, Slot]:
    """Released key -> where it lives; keys of one stacked parameter follow each other.

    Of a tower with its captioner, those of a CLIPVisionModel.
    """
    if config.coca is not None:
        return {
            name.removeprefix("vision_tower."): Slot(name, None, _vision_shape(name, shape))
            for name, shape in parameter_shapes(config).items()
            if name.startswith("vision_tower.")
        }
    text = "" if config.vision is None else "language_model."
    layout = {}
    for name, shape in parameter_shapes(config).items():
        if name.startswith(_VISION_NAMES):
            layout[name] = Slot(name, None, _vision_shape(name, shape))
            continue
        stem, _, matrix = name.rpartition(".experts.")
        if stem:
            for expert in range(shape[0]):
                key = f"{text}model.{stem}.experts.{expert}.{matrix}.weight"
                layout[key] = Slot(name, expert, shape[1:])
        else:
            key = name if name.startswith("lm_head.") else f"model.{name}"
            layout[text + key] = Slot(name, None, shape)
    return layout


def _vision_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Released shape: the patches' linear map is a convolution there, the same numbers in order."""
    if not name.endswith("patch_embedding.weight"):
        return shape
    side = math.isqrt(shape[1] // CHANNELS)
    return shape[0], CHANNELS, side, side


def is_decay_buffer(key: str, config: ModelConfig) -> bool:
    """Whether `key` is one of the decay buffers of a lightning layer of this model."""
    if config.vision is not None:
        key = key.removeprefix("language_model.")
    parts = key.split(".")
    return (
        len(parts) == 5
        and parts[:2] == ["model", "layers"]
        and parts[2].isdecimal()
        and int(parts[2]) < config.num_layers
        and not config.is_softmax(int(parts[2]))
        and parts[3] == "self_attn"
        and parts[4] in DECAY_BUFFERS
    )


def check_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str
) -> None:
    """Raise `ValueError`, counting all differences, unless keys and shapes are as expected."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    kinds = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
    complaints = [_some(kind, items) for kind, items in kinds if items]
    if complaints:
        raise ValueError(f"{where} does not hold this model: " + "; ".join(complaints))


def _some(kind: str, items: list[str], shown: int = 5) -> str:
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {kind}: {', '.join(items[:shown])}{more}"


def to_hf_config(
    config: ModelConfig, format: str, *, max_position_embeddings: int, dtype: str
) -> dict[str, Any]:
    """config.json of the given format; `ValueError` for a model that it can not describe."""
    if format not in FORMATS:
        raise ValueError(f"format={format}: must be one of {', '.join(FORMATS)}")
    if config.coca is not None:
        assert config.vision is not None
        tower = _tower_config(config.vision, config.coca.embedding_size)
        return tower | {"architectures": ["CLIPVisionModel"], "torch_dtype": dtype}
    if config.vision is not None:
        if format != "released":
            raise ValueError(
                f"format={format}: a model with model.vision is no MiniMax of transformers, which "
                "is a text model: use format=released"
            )
        text = to_hf_config(
            replace(config, vision=None),
            format,
            max_position_embeddings=max_position_embeddings,
            dtype=dtype,
        )
        return _vl_config(config.vision, text)
    if config.lightning_norm_eps != _LIGHTNING_NORM_EPS:
        raise ValueError(
            f"model.lightning_norm_eps={config.lightning_norm_eps}: config.json has no key for it, "
            f"and its readers use {_LIGHTNING_NORM_EPS}"
        )
    softmax = [config.is_softmax(layer) for layer in range(config.num_layers)]
    values: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": max_position_embeddings,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        "router_aux_loss_coef": 0.001,  # the release's; fulmen's own is in the `moe` group
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    values |= {theirs: getattr(config, ours) for ours, theirs in _SIZE_KEYS.items()}
    for key in _ALPHA_KEYS[format]:
        values[key] = config.alpha
        values[key.replace("alpha", "beta")] = config.residual_beta
    if format == "released":
        values |= {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "attn_type_list": [int(is_softmax) for is_softmax in softmax],
            "postnorm": True,
            "rope_theta": config.rope_theta,
            "rotary_dim": config.rotary_dim,
            "shared_intermediate_size": 0,
            "shared_moe_mode": "sigmoid",
        }
    else:
        values |= {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            "block_size": 256,
            "layer_types": [
                "full_attention" if is_softmax else "linear_attention" for is_softmax in softmax
            ],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.rotary_dim / config.head_dim,
            },
        }
    return dict(sorted(values.items()))


def _tower_config(vision: VisionConfig, projection_dim: int) -> dict[str, Any]:
    sizes = {theirs: getattr(vision, ours) for ours, theirs in _VISION_SIZE_KEYS.items()}
    values = {
        **_VISION_FIXED,
        **sizes,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": vision.layer_norm_eps,
        "projection_dim": projection_dim,
    }
    return dict(sorted(values.items()))


def _vl_config(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of VL-01 around that of its text model."""
    values = {
        **_VL_FIXED,
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [list(pair) for pair in vision.tiling.pinpoints],
        "image_seq_length": vision.tiling.patches_per_tile,
        "image_token_index": vision.image_token_id,
        "model_type": "minimax_vl_01",
        "text_config": dict(text),
        "torch_dtype": text["torch_dtype"],
        "vision_config": _tower_config(vision, text["hidden_size"]),
    }
    return dict(sorted(values.items()))


def to_preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json: how tiles are made of an image, in the words of transformers."""
    side = {"height": vision.tile_size, "width": vision.tile_size}
    return {
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": False,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [list(pair) for pair in vision.tiling.pinpoints],
        "image_mean": list(PIXEL_MEAN),
        "image_processor_type": "MiniMaxVL01ImageProcessor",
        "image_std": list(PIXEL_STD),
        "patch_size": vision.patch_size,
        "process_image_mode": "anyres",
        "processor_class": "MiniMaxVL01Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": side,
    }


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the text model: all of it but for VL-01."""
    if values.get("model_type") != "minimax_vl_01":
        return values
    text = _required(values, "text_config")
    if not isinstance(text, Mapping):
        raise ValueError("text_config: is not a JSON object")
    # Written as a list of one in VL-01's.
    listed = text.get("shared_intermediate_size") == [0]
    return {**text, "shared_intermediate_size": 0} if listed else text


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes; `ValueError` naming the key if fulmen has no such."""
    model_type = values.get("model_type")
    if model_type == "minimax_vl_01":
        config = from_hf_config(text_values(values))
        config.vision = _from_vl_config(values)
        check_model(config, MoEConfig())
        return config
    formats = {"minimax_text_01": "released", "minimax": "transformers"}
    if model_type not in formats:
        known = ", ".join([*formats, "minimax_vl_01"])
        raise ValueError(f"model_type={model_type}: must be one of {known}")
    format = formats[model_type]
    _refuse_what_differs(values, format)
    if values.get("head_dim") is None:
        share = _required(values, "hidden_size") // _required(values, "num_attention_heads")
        values = {**values, "head_dim": share}
    sizes: dict[str, Any] = {
        ours: int(_required(values, theirs)) for ours, theirs in _SIZE_KEYS.items()
    }
    alphas = _ALPHA_KEYS[format]
    alpha = _shared_value(values, alphas)
    config = ModelConfig(
        **sizes,
        rotary_dim=_rotary_dim(values, sizes["head_dim"]),
        rope_theta=_rope_theta(values),
        softmax_every=_softmax_every(values, format, sizes["num_layers"]),
        rms_norm_eps=float(_required(values, "rms_norm_eps")),
        lightning_norm_eps=_LIGHTNING_NORM_EPS,
        residual_alpha=alpha,
        residual_beta=_shared_value(values, [key.replace("alpha", "beta") for key in alphas]),
    )
    if alpha == (2 * config.num_layers) ** 0.25:
        config.residual_alpha = None
    check_model(config, MoEConfig())
    return config


def _from_vl_config(values: Mapping[str, Any]) -> VisionConfig:
    """The tower and the images of VL-01's config.json."""
    _refuse_other_values(values, {**_VL_FIXED, "quantization_config": None})
    vision = _required(values, "vision_config")
    if not isinstance(vision, Mapping):
        raise ValueError("vision_config: is not a JSON object")
    _refuse_other_values(vision, _VISION_FIXED, "vision_config.")
    try:
        sizes = {ours: int(_required(vision, key)) for ours, key in _VISION_SIZE_KEYS.items()}
    except ValueError as error:
        raise ValueError(f"vision_config.{error}") from None
    tile = sizes["tile_size"]
    pinpoints = [(int(high), int(wide)) for high, wide in _required(values, "image_grid_pinpoints")]
    sides = [side / tile for pair in pinpoints for side in pair]
    tiles = [high * wide // tile**2 for high, wide in pinpoints]
    config = VisionConfig(
        **sizes,
        image_token_id=int(_required(values, "image_token_index")),
        layer_norm_eps=float(vision.get("layer_norm_eps", 1.0e-5)),
        max_tiles_per_side=int(max(sides, default=0)),
        max_tiles=max(tiles, default=0),
    )
    if sorted(pinpoints) != sorted(config.tiling.pinpoints):
        raise ValueError(
            f"image_grid_pinpoints: not all grids of {tile} pixels a tile with up to "
            f"{config.max_tiles_per_side} tiles a side and {config.max_tiles} in all"
        )
    return config


def _refuse_other_values(
    values: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str = ""
) -> None:
    for key, only in fixed.items():
        if key in values and values[key] != only:
            raise ValueError(
                f"{prefix}{key}={values[key]}: fulmen's model has {only} and nothing else"
            )


def _refuse_what_differs(values: Mapping[str, Any], format: str) -> None:
    _refuse_other_values(values, _FIXED)
    for key, value in values.items():
        if "bias" in key and value:
            raise ValueError(f"{key}={value}: fulmen's model has no biases")
    if format == "released" and not values.get("postnorm", False):
        raise ValueError("postnorm: must be true, fulmen's residual is the normalised input")


def _required(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise ValueError(f"{key}: missing from config.json")
    return values[key]


def _shared_value(values: Mapping[str, Any], keys: list[str]) -> float:
    found = {key: float(_required(values, key)) for key in keys}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{key}={value}" for key, value in found.items())
        raise ValueError(f"{listed}: fulmen's model has one value for all of them")
    return found[keys[0]]


def _rope_parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = values.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"rope_parameters.rope_type={rope_type}: fulmen has default only")
    return rope


def _rope_theta(values: Mapping[str, Any]) -> float:
    theta = _rope_parameters(values).get("rope_theta")
    return float(_required(values, "rope_theta") if theta is None else theta)


def _rotary_dim(values: Mapping[str, Any], head_dim: int) -> int:
    """Given as a size or as a share of the head; the whole head if neither is there."""
    found = {}
    if values.get("rotary_dim") is not None:
        found["rotary_dim"] = float(values["rotary_dim"])
    for where, prefix in ((_rope_parameters(values), "rope_parameters."), (values, "")):
        share = where.get("partial_rotary_factor")
        if share is not None:
            found[f"{prefix}partial_rotary_factor"] = round(share * head_dim, 6)
    if len(set(found.values())) > 1:
        raise ValueError(f"{', '.join(found)}: contradict each other ({list(found.values())} dims)")
    dim = next(iter(found.values()), float(head_dim))
    if not dim.is_integer():
        raise ValueError(f"{next(iter(found))}: gives {dim} dims of head_dim={head_dim}")
    return int(dim)


def _softmax_every(values: Mapping[str, Any], format: str, num_layers: int) -> int:
    key, softmax, lightning = (
        ("attn_type_list", 1, 0)
        if format == "released"
        else ("layer_types", "full_attention", "linear_attention")
    )
    kinds = list(_required(values, key))
    if len(kinds) != num_layers:
        raise ValueError(f"{key}: has {len(kinds)} entries for num_hidden_layers={num_layers}")
    unknown = sorted({str(kind) for kind in kinds if kind not in (softmax, lightning)})
    if unknown:
        raise ValueError(f"{key}: {', '.join(unknown)} is no kind of layer that fulmen has")
    every = kinds.index(softmax) + 1 if softmax in kinds else 0
    for layer, kind in enumerate(kinds):
        if (kind == softmax) != (every > 0 and (layer + 1) % every == 0):
            raise ValueError(
                f"{key}: entry {layer} breaks the pattern (softmax in every n-th layer, n={every})"
            )
    return every
