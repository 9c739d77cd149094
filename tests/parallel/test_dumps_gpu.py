"""A collective of NCCL that one rank does not join: dumps of all ranks before torch ends them."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.worlds import free_port, rank_environment, run_processes

from fulmen.parallel import progress
from fulmen.parallel.progress import phase, watched
from fulmen.parallel.rendezvous import join_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LIMIT_S = 15.0


def hang(folder: Path) -> None:
    """Three steps of one sum each; in the last one rank 1 sleeps."""
    with (folder / f"stderr{os.environ['RANK']}").open("wb") as file:
        os.dup2(file.fileno(), 2)
    progress.INTERVAL_S = 0.5
    device = join_world(timeout_s=LIMIT_S)
    with watched(dist.get_rank(), 2, LIMIT_S, run_dir=folder):
        for step in range(1, 4):
            phase("forward", step)
            if step == 3 and dist.get_rank() == 1:
                time.sleep(120)
            x = torch.ones(2**20, device=device)
            dist.all_reduce(x)
            phase("statistics")
            assert x[0].item() == 2


def test_a_rank_that_does_not_join_is_in_the_dumps(tmp_path: Path) -> None:
    port = free_port()
    environments = [rank_environment(rank, 2, port) for rank in range(2)]
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="died: "):
        run_processes(hang, environments, tmp_path, timeout_s=150)
    assert time.monotonic() - begun < 100
    (folder,) = (tmp_path / "dumps").iterdir()
    for rank, place in ((0, "in statistics"), (1, "in forward")):
        said = (folder / f"rank{rank}.txt").read_text()
        assert "in hang" in said
        assert place in said.splitlines()[0] or "another rank stands still" in said.splitlines()[0]
        assert (folder / f"nccl_trace_rank_{rank}").stat().st_size > 500
    assert "HAS NOT ENDED" in (folder / "rank0.txt").read_text()
    # Rank 1 is in no exchange, and only the others' report names it.
    assert "missing: rank 1" in "".join(
        (tmp_path / f"stderr{rank}").read_text() for rank in range(2)
    )
