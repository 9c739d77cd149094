"""The mesh: what is refused, and by which key."""

import pytest
import torch

from fulmen.parallel.config import ParallelConfig, check_parallel
from fulmen.parallel.mesh import build_mesh

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("axis", ["ep", "etp"])
@pytest.mark.parametrize("value", [0, 2])
def test_unsupported_axes_are_named(axis: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.{axis}={value}: only 1 is supported"):
        check_parallel(ParallelConfig(**{axis: value}), 4)


@pytest.mark.parametrize("value", [-1, 0, 3, 8])
def test_rows_that_cannot_be_shared_are_named(value: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.cp={value} does not divide the 4 process"):
        check_parallel(ParallelConfig(cp=value), 4)


@pytest.mark.parametrize("key", ["zero_stage", "expert_zero_stage"])
@pytest.mark.parametrize("value", [-1, 4])
def test_unknown_stages_are_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.{key}={value}: must be 0, 1, 2 or 3"):
        check_parallel(ParallelConfig(**{key: value}), 1)


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
@pytest.mark.parametrize("expert", [None, 0, 1, 2, 3])
def test_every_pair_of_stages_is_accepted(dense: int, expert: int | None) -> None:
    check_parallel(ParallelConfig(zero_stage=dense, expert_zero_stage=expert), 3)


def test_no_environment_is_a_world_of_one(one_rank: torch.device) -> None:
    mesh = build_mesh(ParallelConfig(), one_rank)
    assert (mesh.world_size, mesh.rank, mesh.dp, mesh.dp_rank) == (1, 0, 1, 0)
    assert mesh.shard.size() == 1
    assert tuple(mesh.replicate.shape) == (1, 1)


def test_a_mesh_checks_its_configuration(one_rank: torch.device) -> None:
    with pytest.raises(ValueError, match=r"parallel\.ep=2"):
        build_mesh(ParallelConfig(ep=2), one_rank)
