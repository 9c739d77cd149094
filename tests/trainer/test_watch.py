"""A run in which one rank does not go on: what the log and the error of the other say."""

import time
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_config
from support.worlds import free_port, rank_environment, run_processes

from fulmen.parallel import progress
from fulmen.parallel.progress import ExchangeError
from fulmen.parallel.rendezvous import join_world
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.run import run

pytestmark = pytest.mark.slow


def stalled_run(config: RunConfig) -> str:
    """Rank 1 sleeps in its third step for longer than the time limit."""
    progress.INTERVAL_S = 0.3
    device = join_world(timeout_s=60)
    train_step = Trainer.train_step

    def sleepy(self: Trainer, batch: Any) -> Any:
        if self.step == 2 and self.mesh.rank == 1:
            time.sleep(15)
        return train_step(self, batch)

    Trainer.train_step = sleepy  # type: ignore[method-assign]
    try:
        run(config, device, "recipe")
    except ExchangeError as error:
        return str(error)
    return "ended"


def test_a_stalled_rank_is_named_in_the_log_and_the_error(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data)
    config.run_root, config.run_id = str(tmp_path), "stalls"
    config.parallel.cp, config.parallel.timeout_s = 2, 8.0
    port = free_port()
    environments = [rank_environment(rank, 2, port) for rank in range(2)]
    error, _ = run_processes(stalled_run, environments, config)
    log = (tmp_path / "recipe" / "stalls" / "train.log").read_text()
    for text in (error, log):
        assert "rank 1: behind, in data (step 2, position 1)" in text
        assert "missing: rank 1" in text
    assert error.startswith("forward (step 2, position 2) failed")
    assert log.index("rank 0 is in forward (step 2, position 2) for") < log.index("the run stops")
    (dumps,) = (tmp_path / "recipe" / "stalls" / "dumps").iterdir()
    assert f"stacks: {dumps}" in error
    assert "test_watch.py" in (dumps / "rank1.txt").read_text()  # where it sleeps
    said = (dumps / "rank0.txt").read_text()
    assert "forward" in said.splitlines()[0]
    assert "HAS NOT ENDED" in said
    assert (dumps / "gloo_trace_rank_1").stat().st_size > 1000
    assert "layers.*.self_attn.qkv_proj.weight" in log  # of the audit
