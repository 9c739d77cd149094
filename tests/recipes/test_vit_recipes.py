"""The recipes of the tower's own pretraining: size, tokens, and the VL model's tower."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from support.captioned import VIT_DATA
from support.tiny import ROOT, compose_config

from fulmen.models.config import ModelConfig
from fulmen.trainer.memory import GIB, count_model
from fulmen.trainer.planner import predict_memory
from fulmen.trainer.stages import check_run, run_tokens
from fulmen.trainer.tower_memory import count_pairs

pytestmark = pytest.mark.fast


def model_of(name: str) -> ModelConfig:
    group = OmegaConf.load(ROOT / "recipes" / "model" / f"{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), group))
    assert isinstance(config, ModelConfig)
    return config


@pytest.mark.parametrize(
    ("recipe", "worlds", "pairs", "parameters"),
    [("vl01_vit", (8, 64), 37e9, 819_336_961), ("vl01_vit_336", (8, 64), 1.2e9, 819_664_641)],
)
def test_full_size(recipe: str, worlds: tuple[int, ...], pairs: float, parameters: int) -> None:
    config = compose_config([f"recipe={recipe}", *VIT_DATA])
    for world_size in worlds:
        check_run(config, world_size)
    assert count_pairs(config.model, run_tokens(config)) == pytest.approx(pairs, rel=0.01)
    assert count_model(config.model).total == parameters
    # On 64 GPUs one micro-batch is a step, and fits.
    assert config.trainer.micro_batch_tokens * 64 == config.data.global_batch_tokens
    assert sum(predict_memory(config, 64).values()) < 70 * GIB


@pytest.mark.parametrize(
    ("recipe", "model", "data"),
    [("vl01_vit_336", "vl01", VIT_DATA), ("vl01_vit_tiny", "vl01_tiny", [])],
)
def test_the_tower_is_that_of_the_vl_model(recipe: str, model: str, data: list[str]) -> None:
    ours, theirs = compose_config([f"recipe={recipe}", *data]).model.vision, model_of(model).vision
    assert ours is not None
    assert theirs is not None
    # Grids are those of stage II.
    same = {"max_tiles": theirs.max_tiles, "max_tiles_per_side": theirs.max_tiles_per_side}
    assert replace(ours, **same) == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.coca=null"], r"objective=coca does not go with model\.coca null"),
        (["objective=language_modelling"], r"does not go with model\.coca given"),
        (["parallel.cp=2"], r"parallel\.cp=2: .*set it to 1"),
        (["trainer.compile=true"], r"trainer\.compile is not for objective=coca"),
        (["trainer.chunk_tokens=8"], r"trainer\.chunk_tokens is not for objective=coca"),
        (["evaluation.long_context.every_steps=1"], r"long_context\.every_steps is not for"),
        (["+optim.groups={a: {match: vision_tower, frozen: true}}"], r"frozen is not for"),
    ],
)
def test_mistakes_are_told_by_key(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(compose_config(["recipe=vl01_vit_tiny", *changes]), 2)
