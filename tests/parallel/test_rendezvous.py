"""Processes that meet, and those that do not: one message, the same on all, that names who."""

import os
import re
import socket
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import HANG_S
from support.worlds import free_port, rank_environment, run_processes

from fulmen.parallel import rendezvous
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.rendezvous import RendezvousError, join_world, name_ranks, set_timeout

RENDEZVOUS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def told(settings: dict[str, dict[str, float]] | None = None, meeting_s: float = 30) -> str:
    """What joining says, or that it worked."""
    try:
        join_world((settings or {}).get(os.environ["RANK"]), meeting_s=meeting_s)
    except RendezvousError as error:
        return str(error)
    total = torch.ones(())
    dist.all_reduce(total)
    dist.barrier()
    dist.destroy_process_group()
    return f"joined {int(total)}"


def environments(ranks: list[int], size: int) -> list[dict[str, str]]:
    port = free_port()
    return [rank_environment(rank, size, port) for rank in ranks]


@pytest.mark.fast
@pytest.mark.parametrize("lost", sorted(RENDEZVOUS))
def test_half_an_environment_is_refused(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RENDEZVOUS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(lost)
    with pytest.raises(
        ValueError, match=r"environment sets .* but not all of .* torchrun"
    ) as error:
        join_world()
    assert lost not in str(error.value).split(" but ")[0]
    assert not dist.is_initialized()


@pytest.mark.fast
def test_ranks_are_named_shortly() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([5, 0, 1, 2, 7]) == "ranks 0-2, 5, 7"


@pytest.mark.slow
def test_ranks_with_the_same_settings_meet() -> None:
    same = {"seed": 1, "optim": {"lr": 0.1}}
    assert run_processes(told, environments([0, 1], 2), {"0": same, "1": same}) == ["joined 2"] * 2


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_to_all() -> None:
    environment = environments([0, 1, 3], 4)
    first, *others = run_processes(told, environment, None, 2)
    assert others == [first] * 2
    assert first.startswith(
        "3 of WORLD_SIZE=4 processes came to MASTER_ADDR:MASTER_PORT=127.0.0.1:"
    )
    port = environment[0]["MASTER_PORT"]
    # Who speaks first may have begun to wait late.
    assert re.search(rf"{port} within [12] s\. Missing: rank 2\. Came: ranks 0-1, 3", first)


@pytest.mark.slow
def test_a_master_that_nobody_can_reach() -> None:
    for said in run_processes(told, environments([1, 2], 3), None, 1):
        assert "of WORLD_SIZE=3" in said
        assert "cannot reach MASTER_ADDR:MASTER_PORT=127.0.0.1:" in said
        assert "after 1 s (Connection refused)" in said
        assert "rank 0 was started" in said


@pytest.mark.slow
def test_a_port_that_is_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        (said,) = run_processes(told, [rank_environment(0, 2, port)], None, 2)
    assert f"rank 0 cannot listen on MASTER_PORT={port}" in said
    assert "choose another port" in said


@pytest.mark.slow
def test_other_settings_are_named_with_their_ranks() -> None:
    settings = {rank: {"seed": 1, "optim": {"lr": 0.1}} for rank in ("0", "1", "2")}
    settings["1"] = {"seed": 1, "optim": {"lr": 0.2}}
    first, *others = run_processes(told, environments([0, 1, 2], 3), settings)
    assert others == [first] * 2
    assert first.splitlines()[1:] == ["  optim.lr: 0.1 on ranks 0, 2, 0.2 on rank 1"]


@pytest.mark.slow
def test_another_number_of_processes_is_named() -> None:
    first, second = environments([0, 1], 2)
    second["WORLD_SIZE"] = "4"
    said = run_processes(told, [first, second], None, 10)
    assert said[0] == said[1]
    assert sorted(said[0].removeprefix("WORLD_SIZE is ").split(" and ")) == [
        "2 on rank 0",
        "4 on rank 1",
    ]


@pytest.mark.slow
def test_a_rank_that_comes_twice_is_named() -> None:
    said = run_processes(told, environments([0, 1, 1], 3), None, 10)
    assert len(set(said)) == 1
    assert said[0].startswith("two processes came with RANK=1")


@pytest.mark.fast
def test_a_rank_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = [rendezvous._facts(torch.device("cuda", index), {}) for index in range(3)]
    assert rendezvous._disagreement(dict(enumerate(facts[:2]))) == ""
    said = rendezvous._disagreement(dict(enumerate(facts)))
    assert said.startswith("rank 2: LOCAL_RANK=2, but the process sees 2 GPU(s)")


@pytest.mark.fast
def test_many_differences_are_cut_short() -> None:
    facts = rendezvous._facts(torch.device("cpu"), asdict(ParallelConfig()))
    assert {"torch", "source code", "cp", "device"} <= facts.keys()
    other = dict.fromkeys(facts, "x") | {"fault": ""}
    lines = rendezvous._disagreement({0: facts, 1: other}).splitlines()
    assert len(lines) == 10
    assert lines[1] == "  device: cpu on rank 0, x on rank 1"
    assert lines[-1].strip() == f"and {len(facts) - 2 - 8} more"


def gives_up(over: Path, *, of_a_mesh: bool) -> bool:
    """Whether a group has the time limit that was asked for; rank 1 never answers."""
    device = join_world(timeout_s=2 * HANG_S if of_a_mesh else 2.0)
    group = build_mesh(ParallelConfig(cp=2), device).cp_group if of_a_mesh else None
    if of_a_mesh:
        set_timeout(0.5)
    if os.environ["RANK"] == "1":
        while not over.exists():
            time.sleep(0.1)
        return False
    with pytest.raises(RuntimeError, match="Timed out"):
        dist.all_reduce(torch.zeros(1), group=group)
    over.touch()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("of_a_mesh", [False, True])
def test_groups_have_the_time_limit(of_a_mesh: bool, tmp_path: Path) -> None:
    function = partial(gives_up, tmp_path / "over", of_a_mesh=of_a_mesh)
    assert run_processes(function, environments([0, 1], 2)) == [True, False]
