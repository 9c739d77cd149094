"""Runs of a model that sees, on prepared images: equal losses on any mesh."""

from pathlib import Path

import pytest
from support.seeing import seeing_config, write_conversations
from support.worlds import run_world
from test_sequence import held_out_losses, losses_of

from fulmen.trainer.config import RunConfig

MESHES = [(2, 2, 1), (4, 2, 3)]
"""(processes, cp, ZeRO stage)."""


def config_of(images: Path, cp: int, zero_stage: int) -> RunConfig:
    config = seeing_config(images, cp, zero_stage)
    config.log.every_steps, config.evaluation.every_steps = 1, 2
    return config


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("pictures"))


@pytest.mark.slow
def test_runs_on_images_equal_one_rank(images: Path, tmp_path: Path) -> None:
    wanted = run_world(losses_of, 1, config_of(images, 1, 1), tmp_path / "one")[0]
    assert len(wanted) == 4
    for size, cp, stage in MESHES:
        name = f"{size}-{cp}-{stage}"
        config = config_of(images, cp, stage)
        config.data.image_workers = size % 4
        got = run_world(losses_of, size, config, tmp_path / name)[0]
        for mine, one in zip(got, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-5), name
        ours, theirs = (held_out_losses(tmp_path / folder) for folder in (name, "one"))
        assert len(theirs) == 2
        assert ours == pytest.approx(theirs, rel=1e-5)
