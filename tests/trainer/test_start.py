"""Where a run begins: a text model, a tower of its own pretraining, the stage of another run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.captioned import tiny_coca
from support.seeing import seeing_config, write_conversations
from support.tiny import VOCAB_SIZE, read_checkpoint, tiny_config
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import GroupConfig, RunConfig, StageConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.start import EYES
from fulmen.trainer.weights import Piece, save_weights

LANGUAGE = GroupConfig("embed_tokens|layers|norm|lm_head", frozen=True)


def run(device: torch.device, config: RunConfig, run_dir: Path) -> dict[str, Tensor]:
    """All tensors at the end of a run on one rank, whole; of the trainer's own, without a file."""
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return held(trainer)


def held(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
        for name, one in trainer._tensors().items()
    }


def begin(config: RunConfig, run_dir: Path) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer that has not trained yet, and its tensors."""
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu")), run_dir)
    trainer.close()
    return trainer, held(trainer)


def write_weights(folder: Path, model: ModelConfig, *, seed: int, without: str = "?") -> Path:
    """A checkpoint of initial weights alone."""
    made = build_model(model, MoEConfig())
    init_model(made, model, seed)
    weights = {name: one.detach() for name, one in made.named_parameters()}
    pieces = [
        Piece(name, tuple(one.shape), (0, one.shape[0]), lambda one=one: one)
        for name, one in weights.items()
        if not name.startswith(without)
    ]
    group = OmegaConf.to_container(OmegaConf.structured(model))
    save_weights(folder, pieces, {"model": group})
    return folder


def is_of_the_eyes(name: str) -> bool:
    return name.removeprefix("model.").startswith(EYES)


@pytest.fixture(scope="module")
def folders(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`images` to train on; a `text` run's checkpoint, and a `tower`'s; all read only."""
    root = tmp_path_factory.mktemp("start")
    images = write_conversations(root / "conversations", count=24)
    text = tiny_config(tiny_data, max_steps=2)
    run_world(run, 1, text, root / "text")
    vision = seeing_config(images).model.vision
    captioner = tiny_coca(VOCAB_SIZE)
    captioner.vision = vision
    tower = write_weights(root / "tower", captioner, seed=7)
    return {"images": images, "text": root / "text/checkpoints/step_2", "tower": tower}


def aligning(folders: dict[str, Path], **checkpoint: Any) -> RunConfig:
    """VL-01's stage I: two steps in which the language model is frozen."""
    config = seeing_config(folders["images"])
    config.optim.groups = {"language": LANGUAGE}
    config.trainer.max_steps = 2
    config.checkpoint.resume = str(folders["text"])
    for key, value in checkpoint.items():
        setattr(config.checkpoint, key, str(value))
    return config


def test_alignment_changes_no_weight_of_the_language_model(
    folders: dict[str, Path], one_rank: torch.device, tmp_path: Path, messages: list[str]
) -> None:
    config = aligning(folders, tower=folders["tower"])
    after = run(one_rank, config, tmp_path / "new")
    text, tower = read_checkpoint(folders["text"]), read_checkpoint(folders["tower"])
    language = [name for name in text if name.startswith("model.")]
    assert len(language) > 20
    for name in language:
        assert torch.equal(after[name], text[name]), name  # bit for bit
    trained = [name for name in after if is_of_the_eyes(name)]
    # Of the tower's class token nothing is shown, so its last value has no gradient to speak of.
    assert sum(not torch.equal(after[name], tower.get(name, after[name])) for name in trained) > 20
    # What is frozen has no moments, here and in the checkpoint.
    stored = read_checkpoint(tmp_path / "new" / "checkpoints" / "step_2")
    for tensors in (after, stored):
        moments = {name.split(".", 1)[1] for name in tensors if name.startswith("exp_avg.")}
        assert moments == {name.removeprefix("model.") for name in trained}
    told = "\n".join(messages)
    assert f"vision tower: {len(tower_names(tower))} tensors of {folders['tower']}" in told
    assert "multi_modal_projector: 4 tensors have their initial values" in told
    assert "image_newline: 1 tensors have their initial values" in told
    assert f"starting at step 0 from the weights of {folders['text']}" in told
    # A requeued job repeats its command line, and goes on from its own.
    config.trainer.max_steps = 3
    trainer, _ = begin(config, tmp_path / "new")
    assert trainer.step == 2


def tower_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith("model.vision_tower.")]


def test_what_is_missing_keeps_its_initial_values(
    folders: dict[str, Path], one_rank: torch.device, tmp_path: Path, messages: list[str]
) -> None:
    initial = begin(seeing_config(folders["images"]), tmp_path / "initial")[1]
    text, tower = read_checkpoint(folders["text"]), read_checkpoint(folders["tower"])
    trainer, alone = begin(aligning(folders), tmp_path / "alone")
    assert (trainer.step, trainer.tokens, set(trainer.optimizer.steps.values())) == (0, 0, {0})
    both = begin(aligning(folders, tower=folders["tower"]), tmp_path / "both")[1]
    names = [name for name in alone if name.startswith("model.")]
    for name in names:
        assert torch.equal(alone[name], (initial if is_of_the_eyes(name) else text)[name]), name
        assert torch.equal(both[name], tower[name] if name in tower_names(tower) else alone[name])
    # The tower alone, before a frozen language model of initial values, which is no use.
    assert not any("have initial values" in message for message in messages)
    only = begin(aligning(folders, resume="auto", tower=folders["tower"]), tmp_path / "only")[1]
    for name in names:
        assert torch.equal(only[name], (tower if name in tower_names(tower) else initial)[name])
    assert any("frozen have initial values, the first is" in line for line in messages)


def test_a_tower_takes_the_place_of_another(
    folders: dict[str, Path], one_rank: torch.device, tmp_path: Path
) -> None:
    config = seeing_config(folders["images"])
    model = write_weights(tmp_path / "vl", config.model, seed=9)
    found = begin(aligning(folders, resume=model, tower=folders["tower"]), tmp_path / "new")[1]
    first, tower = read_checkpoint(model), read_checkpoint(folders["tower"])
    for name, value in first.items():
        assert torch.equal(found[name], tower[name] if name in tower_names(tower) else value)


def test_mistakes_are_told(
    folders: dict[str, Path], one_rank: torch.device, tmp_path: Path
) -> None:
    text = tiny_config("none").model
    lacking = write_weights(tmp_path / "lacking", text, seed=1, without="layers.1.self_attn.q")
    with pytest.raises(CheckpointError, match=r"lacking is of another model: it has no model\.lay"):
        begin(aligning(folders, resume=lacking), tmp_path / "a")
    other = write_weights(tmp_path / "other", replace(text, rope_theta=5e5), seed=1)
    with pytest.raises(CheckpointError, match=r"other is of another model: model\.rope_theta"):
        begin(aligning(folders, resume=other), tmp_path / "b")
    captioner = tiny_coca(VOCAB_SIZE)
    captioner.vision = replace(captioner.vision, mlp_hidden_size=24, tile_size=56)  # type: ignore[type-var]
    large = write_weights(tmp_path / "large", captioner, seed=1)
    with pytest.raises(CheckpointError, match=r"tower=.*tile_size is 56 there, 28 here; .*resize"):
        begin(aligning(folders, tower=large), tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"checkpoint\.tower=.* has no vision tower"):
        begin(aligning(folders, tower=folders["text"]), tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"checkpoint\.tower=nowhere: nowhere is not a whole"):
        begin(aligning(folders, tower="nowhere"), tmp_path / "e")


def staged(folders: dict[str, Path], *names: str) -> RunConfig:
    config = seeing_config(folders["images"])
    config.trainer.max_steps = None
    config.stages = {name: StageConfig(tokens=900, global_batch_tokens=256) for name in names}
    return config


def test_a_stage_alone_begins_from_the_end_of_the_one_before(
    folders: dict[str, Path], one_rank: torch.device, tmp_path: Path
) -> None:
    run(one_rank, staged(folders, "one"), tmp_path / "one")
    (end,) = (tmp_path / "one" / "checkpoints").glob("step_*")
    config = staged(folders, "two")
    config.checkpoint.resume = str(end)
    trainer, found = begin(config, tmp_path / "two")
    assert (trainer.step, trainer.tokens, trainer.stage.name) == (0, 0, "two")
    stored = read_checkpoint(end)
    for name, value in found.items():
        if name.startswith("model."):
            assert torch.equal(value, stored[name]), name
        else:
            assert name.startswith("rng.") or not value.any(), name
    run(one_rank, config, tmp_path / "two")
    trainer, _ = begin(config, tmp_path / "two")
    assert trainer.tokens >= 900
    # With that stage in the run it is gone on with, and needs no tower.
    config = staged(folders, "one", "two")
    config.checkpoint.resume = str(end)
    trainer, _ = begin(config, tmp_path / "three")
    assert (trainer.stage.name, trainer.tokens >= 900) == ("two", True)
    config.checkpoint.tower = str(folders["tower"])
    with pytest.raises(ValueError, match=r"checkpoint\.tower=.* goes on from step"):
        begin(config, tmp_path / "four")
    shutil.rmtree(tmp_path / "one")
