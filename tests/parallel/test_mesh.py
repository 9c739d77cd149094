"""The mesh: what is refused, and by which key."""

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_model
from support.worlds import run_world

from fulmen.parallel.config import ParallelConfig, check_experts, check_parallel
from fulmen.parallel.mesh import build_mesh


@pytest.mark.fast
@pytest.mark.parametrize(("ep", "etp"), [(0, 1), (1, 0), (3, 1), (3, 2), (4, 2), (-2, -2)])
def test_experts_that_cannot_be_spread_are_named(ep: int, etp: int) -> None:
    told = rf"parallel\.ep={ep} x parallel\.etp={etp} does not divide the 4 process"
    with pytest.raises(ValueError, match=told):
        check_parallel(ParallelConfig(ep=ep, etp=etp), 4)


@pytest.mark.fast
def test_no_groups_of_tokens_are_named() -> None:
    with pytest.raises(ValueError, match=r"parallel\.expert_token_groups=0: must be at least 1"):
        check_parallel(ParallelConfig(expert_token_groups=0), 4)


SHAPES = [
    ({"ep": 8}, {}, r"model\.num_experts=4 is not a multiple of parallel\.ep=8"),
    ({"etp": 16}, {}, r"model\.expert_hidden_size=24 is not a multiple of parallel\.etp=16"),
    (
        {"ep": 2},
        {"hidden_size": 30, "expert_hidden_size": 26},
        r"8 ranks hold the same .* model\.hidden_size=30 nor model\.expert_hidden_size=26: change "
        r".*parallel\.expert_zero_stage=0",
    ),
    (
        {},
        {"hidden_size": 36, "expert_hidden_size": 24},
        r"16 ranks hold the same .* model\.hidden_size=36 nor model\.expert_hidden_size=24",
    ),
    ({"etp": 2}, {"hidden_size": 36}, r"8 ranks hold the same .* model\.hidden_size=36: change"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("axes", "model", "told"), SHAPES)
def test_experts_that_do_not_divide_are_named(
    axes: dict[str, int], model: dict[str, int], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        check_experts(ParallelConfig(**axes), tiny_model(**model), 16)
    if "hold the same" in told:
        check_experts(ParallelConfig(expert_zero_stage=0, **axes), tiny_model(**model), 16)
    check_experts(ParallelConfig(), tiny_model(**model), 4)  # whole experts on each rank


def _coordinates(device: torch.device, config: ParallelConfig) -> tuple[tuple, dict, str]:
    mesh = build_mesh(config, device)
    groups = {
        name: dist.get_process_group_ranks(getattr(mesh, f"{name}_group"))
        for name in ("cp", "ep", "etp", "expert")
    }
    groups["edp"] = mesh.experts["edp"].mesh.tolist()
    numbers = (mesh.dp, mesh.dp_rank, mesh.cp_rank, mesh.edp, mesh.ep_rank, mesh.etp_rank)
    return numbers, groups, mesh.table()


@pytest.mark.slow
def test_groups_of_eight_ranks() -> None:
    by_rank = run_world(_coordinates, 8, ParallelConfig(cp=4, ep=2, etp=2))
    assert by_rank[6][0] == (2, 1, 2, 2, 1, 0)
    assert by_rank[6][1] == {
        "cp": [4, 5, 6, 7],
        "ep": [4, 6],
        "etp": [6, 7],
        "expert": [4, 5, 6, 7],
        "edp": [2, 6],
    }
    for rank, (_, groups, table) in enumerate(by_rank):
        assert table == by_rank[0][2]
        lines = {line.split()[0]: line for line in table.splitlines()[1:]}
        assert list(lines) == ["dp", "cp", "edp", "ep", "etp"]
        for name, line in lines.items():
            if name in groups:
                assert rank in groups[name]
                assert f"[{' '.join(map(str, groups[name]))}]" in line
    assert by_rank[0][2].splitlines()[0] == "8 rank(s) = dp x cp = edp x ep x etp"


@pytest.mark.fast
@pytest.mark.parametrize("value", [-1, 0, 3, 8])
def test_rows_that_cannot_be_shared_are_named(value: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.cp={value} does not divide the 4 process"):
        check_parallel(ParallelConfig(cp=value), 4)


@pytest.mark.fast
@pytest.mark.parametrize("key", ["zero_stage", "expert_zero_stage"])
@pytest.mark.parametrize("value", [-1, 4])
def test_unknown_stages_are_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel\.{key}={value}: must be 0, 1, 2 or 3"):
        check_parallel(ParallelConfig(**{key: value}), 1)


@pytest.mark.fast
@pytest.mark.parametrize("dense", [0, 1, 2, 3])
@pytest.mark.parametrize("expert", [None, 0, 1, 2, 3])
def test_every_pair_of_stages_is_accepted(dense: int, expert: int | None) -> None:
    check_parallel(ParallelConfig(zero_stage=dense, expert_zero_stage=expert), 3)


@pytest.mark.fast
def test_no_environment_is_a_world_of_one(one_rank: torch.device) -> None:
    mesh = build_mesh(ParallelConfig(), one_rank)
    assert (mesh.world_size, mesh.rank, mesh.dp, mesh.dp_rank) == (1, 0, 1, 0)
    assert mesh.shard.size() == 1
    assert tuple(mesh.replicate.shape) == (1, 1)


@pytest.mark.fast
def test_a_mesh_checks_its_configuration(one_rank: torch.device) -> None:
    with pytest.raises(ValueError, match=r"parallel\.ep=2"):
        build_mesh(ParallelConfig(ep=2), one_rank)
