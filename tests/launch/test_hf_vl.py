"""Export and import of a model with a vision tower; what is common to all is in test_hf.py."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from fulmen.launch.export_hf import INDEX, ExportConfig, export
from fulmen.launch.import_hf import ImportConfig, import_released
from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig
from fulmen.models.hf import parameter_shapes, released_layout
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.trainer.manifest import verify
from fulmen.trainer.weights import CheckpointWeights, Piece, load_model_config, save_weights

pytestmark = pytest.mark.fast

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
    vision=VisionConfig(
        num_layers=2,
        hidden_size=12,
        num_attention_heads=2,
        mlp_hidden_size=20,
        tile_size=12,
        patch_size=4,
        image_token_id=39,
        max_tiles_per_side=3,
        max_tiles=4,
    ),
)
QUIET = Console(quiet=True)
TOWER = "vision_tower.vision_model."


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(MODEL)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its export, in several files."""
    root = tmp_path_factory.mktemp("hf_vl")
    pieces = [
        Piece(name, tuple(t.shape), (0, t.shape[0]), lambda t=t: t)
        for name, t in random_weights().items()
    ]
    config = {"model": asdict(MODEL), "data": {"seq_len": 64}}
    save_weights(root / "checkpoint", pieces, config)
    run_export(root / "checkpoint", root / "released")
    return root


def run_export(checkpoint: Path, output: Path, **changes: str) -> None:
    settings = ExportConfig(
        str(checkpoint), str(output), dtype="float32", max_shard_gib=9000 / 2**30
    )
    export(replace(settings, **changes), QUIET)  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_there_and_back(written: Path, tmp_path: Path) -> None:
    """Bit for bit, and the files of a second export byte for byte."""
    import_released(ImportConfig(str(written / "released"), str(tmp_path / "imported")), QUIET)
    verify(tmp_path / "imported")
    assert load_model_config(tmp_path / "imported") == MODEL
    weights = CheckpointWeights(tmp_path / "imported")
    assert weights.shapes == parameter_shapes(MODEL)
    for name, tensor in random_weights().items():
        assert torch.equal(weights.read(name), tensor), name
    run_export(tmp_path / "imported", tmp_path / "again")
    files = sorted(path.name for path in (written / "released").iterdir())
    assert {"config.json", "preprocessor_config.json", INDEX} < set(files)
    assert len(files) > 6
    for name in files:
        first, second = (written / "released" / name), (tmp_path / "again" / name)
        assert first.read_bytes() == second.read_bytes(), name


def test_names_shapes_and_values(written: Path) -> None:
    tensors, ours = read(written / "released"), random_weights()
    layout = released_layout(MODEL)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        k: s.shape for k, s in layout.items()
    }
    equal = {
        "language_model.lm_head.weight": "lm_head.weight",
        "language_model.model.embed_tokens.weight": "embed_tokens.weight",
        "image_newline": "image_newline",
        "multi_modal_projector.linear_2.bias": "multi_modal_projector.linear_2.bias",
        f"{TOWER}pre_layrnorm.bias": f"{TOWER}pre_layrnorm.bias",
    }
    for key, name in equal.items():
        assert torch.equal(tensors[key], ours[name]), key
    expert = "layers.2.block_sparse_moe.experts"
    for number in range(3):
        key = f"language_model.model.{expert}.{number}.w2.weight"
        assert torch.equal(tensors[key], ours[f"{expert}.w2"][number])
    patch = f"{TOWER}embeddings.patch_embedding.weight"
    assert tensors[patch].shape == (12, 3, 4, 4)
    assert torch.equal(tensors[patch].flatten(1), ours[patch])


def test_the_files_are_a_tower_of_transformers(written: Path) -> None:
    """Their model, made from the config and the tensors of an export alone, sees the same."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    values = json.loads((written / "released" / "config.json").read_text())
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**values["vision_config"])
    ).eval()
    tensors = {
        key.removeprefix(TOWER): tensor
        for key, tensor in read(written / "released").items()
        if key.startswith(TOWER)
    }
    assert theirs.load_state_dict(tensors, strict=False).unexpected_keys == []
    with torch.no_grad():
        model = build_model(MODEL, MoEConfig())
        init_model(model, MODEL, 0)
        model.load_state_dict(random_weights())
        tiles = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        wanted = theirs(tiles).last_hidden_state[:, 1:]
        found = model.get_submodule("vision_tower")(tiles)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_decay_buffers_of_the_text_model_are_ignored(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "released", tmp_path / "released"))
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["language_model.model.layers.0.self_attn.slope_rate"] = torch.zeros(4)
    save_file(tensors, path)
    import_released(ImportConfig(str(folder), str(tmp_path / "imported")), QUIET)
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(12)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 unexpected: .*post_layernorm\.weight"):
        import_released(ImportConfig(str(folder), str(tmp_path / "refused")), QUIET)


def test_the_length_of_the_text_model_is_kept(written: Path, tmp_path: Path) -> None:
    import_released(ImportConfig(str(written / "released"), str(tmp_path / "imported")), QUIET)
    assert "seq_len: 64" in (tmp_path / "imported" / "config.yaml").read_text()
    values = json.loads((written / "released" / "config.json").read_text())
    assert values["text_config"]["max_position_embeddings"] == 64
    assert "max_position_embeddings" not in values


def test_transformers_format_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format=transformers: a model with model\.vision"):
        run_export(written / "checkpoint", tmp_path / "out", format="transformers")
    assert list(tmp_path.iterdir()) == []
