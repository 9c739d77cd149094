"""Our model against transformers' MiniMaxForCausalLM: values, gradients, files.

That class rotates whole heads whatever the config says, so here rotary_dim = head_dim; partial RoPE
has its own reference in test_text.py.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fulmen.launch.export_hf import ExportConfig, export
from fulmen.launch.import_hf import ImportConfig, import_released
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.hf import DECAY_BUFFERS, from_hf_config, released_layout, to_hf_config
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.trainer.weights import CheckpointWeights, Piece, save_weights

transformers = pytest.importorskip("transformers", minversion="5.0")

TOLERANCE = 1e-4  # max |a - b| / max |b| of each tensor, fp32
QUIET = Console(quiet=True)

BASE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=16,
    num_experts=4,
    num_experts_per_token=2,
    expert_hidden_size=24,
    vocab_size=97,
    softmax_every=2,
)
CASES = {
    "1:1": (BASE, 65),
    "7:1": (replace(BASE, num_layers=8, softmax_every=8), 33),
    "3:1, one kv head, top 1": (
        replace(BASE, softmax_every=4, num_key_value_heads=1, num_experts_per_token=1),
        70,
    ),
    "9 layers, as many kv heads, 8 experts": (
        replace(BASE, num_layers=9, softmax_every=4, num_key_value_heads=4, num_experts=8),
        19,
    ),
    "softmax only": (replace(BASE, num_layers=2, softmax_every=1, rope_theta=1.0e6), 21),
    "lightning only, alpha 1, beta 1/2": (
        replace(BASE, softmax_every=0, residual_alpha=1.0, residual_beta=0.5),
        129,
    ),
    "8 heads of 8, alpha 2, beta 0.7, eps": (
        replace(
            BASE,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=8,
            rotary_dim=8,
            residual_alpha=2.0,
            residual_beta=0.7,
            rms_norm_eps=1.0e-3,
        ),
        1,
    ),
}


def make_model(config: ModelConfig, seed: int = 0) -> TextModel:
    """Random weights, those of the norms too, so that a norm which is left out shows."""
    model = TextModel(config, MoEConfig())
    init_model(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_theirs(model: TextModel, experts: str = "eager") -> torch.nn.Module:
    """Their class with our weights, set in memory."""
    config = model.config
    values = to_hf_config(config, "transformers", max_position_embeddings=512, dtype="float32")
    theirs = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**values)).eval()
    theirs.set_experts_implementation(experts)
    state = {
        key: tensor for key, tensor in theirs.state_dict().items() if key.endswith(DECAY_BUFFERS)
    }
    for name, parameter in model.named_parameters():
        renamed = name.replace("block_sparse_moe", "mlp")
        if name.endswith("experts.w1"):
            up = model.get_parameter(name.replace("w1", "w3"))
            state[f"model.{renamed[:-3]}.gate_up_proj"] = torch.cat([parameter, up], dim=1)
        elif name.endswith("experts.w2"):
            state[f"model.{renamed[:-3]}.down_proj"] = parameter
        elif not name.endswith("experts.w3"):
            state[renamed if name.startswith("lm_head") else f"model.{renamed}"] = parameter
    theirs.load_state_dict(state, strict=True)
    return theirs


def their_gradient(theirs: torch.nn.Module, name: str) -> Tensor:
    """The gradient that belongs to our parameter `name`."""
    renamed = name.replace("block_sparse_moe", "mlp")
    matrix = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}.get(name[-2:])
    if matrix:
        renamed = renamed[:-2] + matrix
    if not name.startswith("lm_head"):
        renamed = f"model.{renamed}"
    gradient = theirs.get_parameter(renamed).grad
    assert gradient is not None
    if matrix == "gate_up_proj":
        return gradient.chunk(2, dim=1)[0 if name.endswith("w1") else 1]
    return gradient


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def tokens_of(config: ModelConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient(case: str) -> None:
    config, length = CASES[case]
    implementations = ("eager", "grouped_mm", "batched_mm")
    for seed, experts in enumerate(implementations if case == "1:1" else ("eager",)):
        ours = make_model(config, seed)
        theirs = make_theirs(ours, experts)
        ids = tokens_of(config, 2, length + 1, seed)
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        targets[0, : length // 3] = -100

        # Their loss shifts by itself unless it is given targets that are shifted already.
        result = theirs(inputs, labels=inputs, shift_labels=targets, use_cache=False)
        assert difference(ours(inputs), result.logits) <= TOLERANCE

        losses = ours(inputs, labels=targets)
        assert isinstance(losses, LossOutput)
        mean = losses.loss_sum / (targets != -100).sum()
        assert difference(mean, result.loss) <= TOLERANCE

        mean.backward()
        result.loss.backward()
        for name, parameter in ours.named_parameters():
            assert parameter.grad is not None, name
            if name.endswith("moe.gate.weight") and config.num_experts_per_token == 1:
                assert parameter.grad.abs().max() <= 1e-8  # its weight is 1 whatever the logits
                continue
            assert difference(parameter.grad, their_gradient(theirs, name)) <= TOLERANCE, name


def save(model: TextModel, target: Path) -> None:
    pieces = [
        Piece(name, tuple(p.shape), (0, p.shape[0]), lambda p=p: p.detach())
        for name, p in model.named_parameters()
    ]
    save_weights(target, pieces, {"model": asdict(model.config), "data": {"seq_len": 512}})


def export_to(checkpoint: Path, output: Path, format: str) -> None:
    settings = ExportConfig(
        str(checkpoint), str(output), format, dtype="float32", max_shard_gib=60e3 / 2**30
    )
    export(settings, QUIET)


def assert_same_weights(model: TextModel, checkpoint: Path) -> None:
    weights = CheckpointWeights(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.read(name), parameter), name


def test_there_and_back_is_bit_exact(tmp_path: Path) -> None:
    """Ours -> files -> their class -> their files -> ours, in fp32."""
    config, _ = CASES["7:1"]
    ours = make_model(config)
    save(ours, tmp_path / "checkpoint")
    export_to(tmp_path / "checkpoint", tmp_path / "exported", "transformers")
    theirs, info = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert info["unexpected_keys"] == info["mismatched_keys"] == set()
    lightning = [layer for layer in range(8) if not config.is_softmax(layer)]
    recomputed = {
        f"model.layers.{layer}.self_attn.{buffer}"
        for layer in lightning
        for buffer in DECAY_BUFFERS
    }
    assert info["missing_keys"] == recomputed
    assert theirs.dtype == torch.float32

    # The buffers reported missing have the right values, so the logits are those of our model.
    fresh = transformers.MiniMaxForCausalLM(theirs.config)
    for key in recomputed:
        assert torch.equal(theirs.get_buffer(key), fresh.get_buffer(key)), key
    ids = tokens_of(config, 1, 77)
    assert difference(theirs(ids).logits, ours(ids)) <= TOLERANCE

    theirs.save_pretrained(tmp_path / "theirs")
    imported = ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "imported"))
    import_released(imported, QUIET)
    assert_same_weights(ours, tmp_path / "imported")


def test_the_formats_differ_in_config_json_alone(tmp_path: Path) -> None:
    """The same tensor files, byte for byte; both import to the same weights."""
    config, _ = CASES["1:1"]
    ours = make_model(config)
    save(ours, tmp_path / "checkpoint")
    for format in ("released", "transformers"):
        export_to(tmp_path / "checkpoint", tmp_path / format, format)
    names = sorted(path.name for path in (tmp_path / "released").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "transformers").iterdir())
    for name in names:
        same = (tmp_path / "released" / name).read_bytes() == (
            tmp_path / "transformers" / name
        ).read_bytes()
        assert same == (name != "config.json"), name
    settings = ImportConfig(str(tmp_path / "released"), str(tmp_path / "imported"))
    import_released(settings, QUIET)
    assert_same_weights(ours, tmp_path / "imported")


@pytest.mark.fast
def test_their_config_saved_by_themselves_is_read() -> None:
    for config, _ in CASES.values():
        values = to_hf_config(config, "transformers", max_position_embeddings=512, dtype="float32")
        theirs = transformers.MiniMaxConfig(**values)
        for use_diff in (False, True):
            written = theirs.to_dict() if not use_diff else theirs.to_diff_dict()
            assert from_hf_config(written) == config


@pytest.mark.fast
def test_their_own_names_and_shapes_are_the_released_ones(tmp_path: Path) -> None:
    """Keys as their save_pretrained writes them, from their class, not from our code."""
    from safetensors import safe_open

    config, _ = CASES["1:1"]
    make_theirs(make_model(config)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {key: slot.shape for key, slot in released_layout(config).items()}
    assert {k: v for k, v in found.items() if not k.endswith(DECAY_BUFFERS)} == expected
