"""Every recipe composes, is valid for the processes it is meant for, and has the size it says."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from support.tiny import ROOT, compose_config, text01_data

from fulmen.models.config import MoEConfig
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.trainer.config import RunConfig
from fulmen.trainer.stages import check_run, list_stages, run_tokens, shares_at

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Recipe:
    """What a recipe is known by."""

    name: str
    world_sizes: tuple[int, ...]
    parameters: int
    active_parameters: int
    tokens: int


RECIPES = [
    Recipe("text01", (1024, 2048), 456_089_655_296, 45_944_920_064, 11_758_000_000_000),
    Recipe("text01_tiny", (1, 2), 6_401_024, 1_813_504, 1_050_000),
    Recipe("text01_1b", (1, 2, 8, 32), 993_402_368, 287_186_432, 20_000_000_000),
    Recipe("text01_3b", (1, 2, 8, 32), 2_990_897_152, 916_813_824, 60_000_000_000),
    Recipe("text01_tiny_1m", (1, 2), 6_401_024, 1_813_504, 440_000),
    Recipe("text01_1b_1m", (1, 2), 993_402_368, 287_186_432, 20_900_000_000),
]


TINY = ("text01_tiny", "text01_tiny_1m")
STAGED = ("text01", "text01_tiny_1m", "text01_1b_1m")


def composed(name: str) -> RunConfig:
    config = compose_config([f"recipe={name}", *needed(name)])
    assert isinstance(config, RunConfig)
    return config


def needed(name: str) -> list[str]:
    """The keys that a recipe cannot know."""
    if name in TINY:
        return []
    return text01_data("somewhere")[: 2 if name in STAGED else 1]


def test_no_recipe_is_left_out() -> None:
    files = {path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")}
    files.remove("scaling")  # many sizes, no model of its own: test_scaling_recipes.py
    files -= {"vl01_vit", "vl01_vit_336", "vl01_vit_tiny"}  # test_vit_recipes.py
    assert files == {recipe.name for recipe in RECIPES}
    models = {path.stem for path in (ROOT / "recipes" / "model").glob("*.yaml")}
    models -= {"vl01", "vl01_1b", "vl01_tiny"}  # tests/models/test_vl.py
    models -= {"vl01_vit", "vl01_vit_tiny"}
    assert models == {name.removesuffix("_1m") for name in files}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe(recipe: Recipe) -> None:
    config = composed(recipe.name)
    for world_size in recipe.world_sizes:
        check_run(config, world_size)
    assert run_tokens(config) == recipe.tokens
    with torch.device("meta"):
        model = TextModel(config.model, config.moe)
    assert count_parameters(model) == recipe.parameters
    assert count_active_parameters(model) == recipe.active_parameters
    assert OmegaConf.to_yaml(OmegaConf.structured(config))


@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES if recipe.name not in TINY])
def test_the_source_of_a_real_recipe_must_be_given(name: str) -> None:
    with pytest.raises(ValueError, match=r"no value for data\.sources\.corpus\.path"):
        compose_config([f"recipe={name}"])


def keys(tree: Any, prefix: str = "") -> set[str]:
    """Dotted names of all values; lists and the names of sources do not count."""
    if not isinstance(tree, dict):
        return {prefix}
    if prefix == "data.sources":
        return {f"{prefix}.NAME.{key}" for entry in tree.values() for key in entry}
    if prefix.endswith("late_weights"):
        return {f"{prefix}.NAME"} if tree else set()
    return {
        found
        for name, branch in tree.items()
        for found in keys(branch, f"{prefix}.{name}" if prefix else name)
    }


def test_the_tiny_recipe_differs_from_the_full_one_in_values_only() -> None:
    tiny, full = (
        OmegaConf.to_container(OmegaConf.structured(composed(name)))
        for name in ("text01_tiny_1m", "text01")
    )
    assert keys(tiny) == keys(full)
    assert len(keys(tiny)) > 50
    # What makes it a Text-01: the pattern of layers, the router and the shape of the schedule.
    assert isinstance(tiny, dict)
    assert isinstance(full, dict)
    for same in ("softmax_every", "num_experts_per_token", "residual_alpha", "residual_beta"):
        assert tiny["model"][same] == full["model"][same]
    assert tiny["moe"]["aux_loss_coef"] == full["moe"]["aux_loss_coef"]
    assert tiny["model"]["num_layers"] == 8
    assert [phase["decay"] for phase in tiny["schedule"]["phases"]][-1] == "exponential"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_holds_values_only(recipe: Recipe) -> None:
    for name in (f"recipe/{recipe.name}", f"model/{recipe.name.removesuffix('_1m')}"):
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        assert "${" not in text
        assert "_target_" not in text
        assert isinstance(yaml.safe_load(text), dict)


def test_capacity_of_the_full_recipe_is_a_drop() -> None:
    moe = composed("text01").moe
    assert isinstance(moe, MoEConfig)
    assert moe.capacity_factor is not None
    assert composed("text01_tiny").moe.capacity_factor is None


def test_the_twins_have_the_stages_of_the_full_recipe() -> None:
    full, *twins = (composed(name) for name in STAGED)
    for twin in twins:
        assert list(twin.stages) == list(full.stages)
        for small, large in zip(list_stages(twin), list_stages(full), strict=True):
            starts = shares_at(twin, small.start), shares_at(full, large.start)
            assert starts[0].lengths == starts[1].lengths
            end, at_the_end = shares_at(twin, small.end - 1), shares_at(full, large.end - 1)
            assert sorted(end.sources.values()) == pytest.approx(
                sorted(at_the_end.sources.values())
            )
            assert small.config.data.seq_len <= large.config.data.seq_len


def test_the_twins_run_whole_on_the_processes_they_are_for() -> None:
    check_run(composed("text01_tiny_1m"), 2, all_here=True)
    for world_size in (1, 2):
        check_run(composed("text01_1b_1m"), world_size, all_here=True)
