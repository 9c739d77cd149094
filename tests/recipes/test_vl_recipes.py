"""The recipes of VL-01's curriculum: what each stage trains, on what, and where it fits."""

import re

import pytest
from support.tiny import compose_config

from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import frozen_of
from fulmen.trainer.planner import GPUS, Assumptions, make_plan
from fulmen.trainer.stages import check_run, drawn_sources, list_stages, shares_at

pytestmark = pytest.mark.fast

STAGES = ["alignment", "understanding", "experience", "preference"]
SOURCES = ["descriptions", "instructions", "texts", "experience", "image_pairs", "text_pairs"]
GIVEN = [f"data.sources.{name}.path=none" for name in SOURCES]
NEEDED = {"vl01": GIVEN, "vl01_1b": GIVEN, "vl01_tiny": []}
"""What the recipes cannot know, as overrides."""


def composed(name: str, *without: str) -> RunConfig:
    return compose_config([f"recipe={name}", *NEEDED[name], *(f"~stages.{one}" for one in without)])


@pytest.mark.parametrize("name", NEEDED)
def test_the_four_stages(name: str) -> None:
    config = composed(name)
    stages = list_stages(config)
    if name == "vl01_tiny":
        assert stages.pop(0).name == "language"  # it stands for Text-01
    assert [stage.name for stage in stages] == STAGES
    aligned, understood, experienced, preferred = stages
    language = re.compile("embed_tokens|layers|norm|lm_head")
    frozen = frozen_of(aligned.config)
    assert frozen
    assert all(language.match(one) for one in frozen)
    assert not any(frozen_of(stage.config) for stage in stages[1:])
    assert [stage.config.objective for stage in stages[:3]] == ["language_modelling"] * 3
    assert preferred.config.objective == "preference"
    ratio = shares_at(config, understood.start).sources
    assert ratio.pop("texts") == pytest.approx(1 / 21)
    assert max(ratio.values()) == pytest.approx(20 / 21)
    assert len(drawn_sources(config, aligned.index)) == 1
    assert drawn_sources(config, experienced.index) == {"experience"}
    for group in config.optim.groups.values():
        assert not group.frozen


def test_published_amounts() -> None:
    tokens = {stage.name: stage.end - stage.start for stage in list_stages(composed("vl01"))}
    multimodal = tokens["understanding"] * 20 / 21
    assert (tokens["alignment"], multimodal, tokens["experience"]) == (80e9, 420e9, 44.8e9)


def test_the_full_recipe_is_planned_on_the_processes_that_it_is_for() -> None:
    # The job ends before the last stage, whose steps would be too few on so many GPUs.
    check_run(composed("vl01"), 2048)
    with pytest.raises(ValueError, match=r"stages\.preference: data\.global_batch_tokens"):
        check_run(composed("vl01"), 2048, all_here=True)
    for gpus, without in ((2048, ["preference"]), (256, STAGES[:3])):
        plan = make_plan(composed("vl01", *without), gpus, GPUS["h800"], Assumptions())
        assert plan.fits, [(stage.name, stage.memory) for stage in plan.stages]


def test_the_recipe_of_one_gpu_fits() -> None:
    config = composed("vl01_1b")
    check_run(config, 1, all_here=True)
    assert make_plan(config, 1, GPUS["h100"], Assumptions()).fits


def test_the_tiny_recipe_runs_whole_on_one_or_two_processes() -> None:
    config = composed("vl01_tiny")
    for world_size in (1, 2):
        check_run(config, world_size, all_here=True)
    # A stage alone, as all recipes can.
    check_run(composed("vl01_tiny", "language", *STAGES[1:]), 2, all_here=True)
