"""Groups of parameters: what the configuration says and refuses, and what optimisers make of it."""

from pathlib import Path

import pytest
import torch
from support.tiny import compose_config, text01_data, tiny_config, tiny_engine
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import (
    GroupConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from fulmen.trainer.groups import Settings, resolve_groups
from fulmen.trainer.loop import Trainer
from fulmen.trainer.memory import list_settings
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.stages import check_run, stage_config

LOWER = ("embed_tokens.", "layers.0.", "layers.1.")
BELOW = r"embed_tokens|layers\.[01]\."


@pytest.mark.fast
def test_the_first_group_that_matches_counts() -> None:
    config = OptimConfig(
        lr=1.0,
        groups={
            "head": GroupConfig(match="lm_head", lr_factor=0.5, weight_decay=0.0),
            "lm": GroupConfig(match="layers|lm_", frozen=True),
        },
    )
    names = ["embed.weight", "layers.0.weight", "lm_head.weight", "my_layers.weight"]
    assert resolve_groups(config, names) == {
        "embed.weight": Settings(),
        "layers.0.weight": Settings("lm", frozen=True),
        "lm_head.weight": Settings("head", 0.5, 0.0),
        "my_layers.weight": Settings(),
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            GroupConfig(match="vision_tower"),
            r"optim\.groups\.it\.match=vision_tower: .*norm",
        ),
        (GroupConfig(match="", frozen=True), r"optim\.groups: it freeze every parameter"),
        (GroupConfig(match="layers.("), r"optim\.groups\.it\.match=layers\.\(: no regular"),
        (GroupConfig(match="norm", lr_factor=0.0), r"optim\.groups\.it\.lr_factor=0\.0: .*frozen"),
        (GroupConfig(match="norm", weight_decay=-1.0), r"optim\.groups\.it\.weight_decay=-1\.0"),
    ],
)
def test_mistakes_are_told_by_key(group: GroupConfig, message: str) -> None:
    config = tiny_config("none")
    config.optim.groups = {"it": group}
    with pytest.raises(ValueError, match=message):
        check_run(config, 1)
    staged = tiny_config("none")
    staged.stages = {"only": StageConfig(tokens=4000)}
    staged.stages["only"].optim = {"groups": {"it": vars(group)}}
    with pytest.raises(ValueError, match=r"stages\.only: " + message):
        check_run(staged, 1)


@pytest.mark.fast
def test_a_stage_changes_single_keys_of_a_group() -> None:
    config = tiny_config("none")
    config.optim.groups = {"below": GroupConfig(match=BELOW, frozen=True)}
    config.stages = {
        "first": StageConfig(tokens=4000),
        "second": StageConfig(
            tokens=4000,
            optim={
                "lr": 1e-5,
                "groups": {"below": {"frozen": False, "lr_factor": 0.1}, "head": {"match": "lm_"}},
            },
        ),
    }
    check_run(config, 1)
    first, second = (stage_config(config, index).optim for index in range(2))
    assert first == config.optim
    assert second.groups["below"] == GroupConfig(match=BELOW, lr_factor=0.1)
    assert list(second.groups) == ["below", "head"]
    assert second.lr == 1e-5
    assert list_settings(stage_config(config, 1))["embed_tokens.weight"].lr_factor == 0.1
    for optim, message in [
        ({"groups": {"new": {"frozen": True}}}, r"stages\.second\.optim\.groups: .*match"),
        ({"groups": {"below": {"freeze": True}}}, r"stages\.second\.optim\.groups: .*freeze"),
        ({"rate": 1.0}, r"unknown key stages\.second\.optim\.rate"),
    ]:
        config.stages["second"].optim = optim
        with pytest.raises(ValueError, match=message):
            stage_config(config, 1)


@pytest.mark.fast
def test_groups_come_from_the_command_line() -> None:
    config = compose_config(
        [
            "recipe=text01",
            *text01_data(),
            "+optim.groups={lm: {match: layers, frozen: true}}",
            "+stages.to_128k.optim={groups: {lm: {frozen: false}}}",
        ]
    )
    assert config.optim.groups == {"lm": GroupConfig(match="layers", frozen=True)}
    stages = [stage_config(config, index).optim for index in range(len(config.stages))]
    assert [one.groups["lm"].frozen for one in stages].count(False) == 1


@pytest.mark.fast
@pytest.mark.parametrize("steps_before", [0, 2])
def test_updates_are_counted_by_parameter(steps_before: int, one_rank: torch.device) -> None:
    """Against Adam by hand: what joins later has the bias correction of its own first step."""
    _, engine = tiny_engine(one_rank, ParallelConfig())
    config = OptimConfig(lr=1.0, weight_decay=0.0)
    settings = dict.fromkeys(engine.parameters, Settings()) | {"lm_head.weight": Settings("h", 0.5)}
    optimizer = Optimizer(engine, config, settings)
    optimizer.set_steps({"lm_head.weight": steps_before})
    before = {name: p.full_tensor().clone() for name, p in engine.parameters.items()}
    for parameter in engine.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step(1e-2)
    for name, parameter in engine.parameters.items():
        steps = steps_before + 1 if name == "lm_head.weight" else 1
        rate = 0.5e-2 if name == "lm_head.weight" else 1e-2
        first = 0.3 * (1 - config.beta1) / (1 - config.beta1**steps)
        second = 0.3**2 * (1 - config.beta2) / (1 - config.beta2**steps)
        moved = rate * first / (second**0.5 + config.eps)
        torch.testing.assert_close(parameter.full_tensor(), before[name] - moved, msg=name)
        assert optimizer.steps[name] == steps


# ---- from stage to stage, through checkpoints ----


def staged(data: str, stages: tuple[int, int | None] = (1, None)) -> RunConfig:
    """The lower half is frozen in the second stage of three."""
    config = tiny_config(data, max_steps=100)
    config.parallel = ParallelConfig(zero_stage=stages[0], expert_zero_stage=stages[1])
    config.schedule = ScheduleConfig(phases=[PhaseConfig(tokens=500, lr_factor=1.0)])
    config.optim.groups = {"below": GroupConfig(match=BELOW)}
    frozen = {"groups": {"below": {"frozen": True}}}
    config.stages = {"all": StageConfig(), "above": StageConfig(optim=frozen), "end": StageConfig()}
    return config


def run_stage(
    device: torch.device, data: str, folder: Path, stages: tuple[int, int | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int], dict[str, int]]:
    """Weights and moments before and after the next stage, and the updates counted."""
    config = staged(data, stages)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    before, counted = whole(trainer), trainer.optimizer.steps
    trainer.fit()
    trainer.close()
    return before, whole(trainer), counted, trainer.optimizer.steps


def whole(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in trainer._tensors().items()
        if not name.startswith("rng.")
    }


@pytest.mark.slow
def test_moments_go_and_come_back_over_stages_and_meshes(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    data = str(tiny_data)
    _, end_of_all, _, updates = run_world(run_stage, 2, data, folder, (2, 0))[0]
    steps = updates["lm_head.weight"]
    assert set(updates.values()) == {steps}
    assert steps > 1

    before, after, counted, updates = run_world(run_stage, 1, data, folder, (1, None))[0]
    lower = {name for name in end_of_all if name.split(".", 1)[1].startswith(tuple(LOWER))}
    assert {n for n in lower if n.startswith("model.")} == lower & set(before)
    assert set(counted.values()) == {steps}
    for name, tensor in before.items():
        assert torch.equal(tensor, end_of_all[name]), name
        assert torch.equal(tensor, after[name]) == (name in lower), name
    second = updates["lm_head.weight"]
    assert second > steps
    assert not any(name.startswith(tuple(LOWER)) for name in updates)

    before, end, counted, updates = run_world(run_stage, 2, data, folder, (3, None))[0]
    for name, tensor in before.items():
        if name in after:
            assert torch.equal(tensor, after[name]), name
        else:
            assert name in lower, name
            assert not tensor.any(), name
        assert not torch.equal(tensor, end[name]), name
    third = updates["lm_head.weight"] - second
    for name, number in counted.items():
        assert number == (0 if name.startswith(tuple(LOWER)) else second), name
        assert updates[name] == number + third > number
