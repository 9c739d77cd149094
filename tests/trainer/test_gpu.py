"""A run on a GPU: bf16 with fp32 masters, close to the CPU, saved and gone on with, no waiting."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch
from support.pairs import preference_config, prepare_pairs
from support.tiny import tiny_config
from torch import Tensor

from fulmen.data.packing import PackedBatch
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.profile_memory import watch_memory
from fulmen.trainer.restore import trained_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config_of(data: Path, dtype: str, *, max_steps: int) -> RunConfig:
    config = tiny_config(data, max_steps=max_steps)
    config.trainer.dtype = dtype
    config.checkpoint.every_steps = 2
    return config


def losses_of(config: RunConfig, run_dir: Path, device: torch.device) -> list[float]:
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def test_a_run_is_near_fp32_and_resumes(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    exact = losses_of(config_of(tiny_data, "float32", max_steps=4), tmp_path / "a", one_rank)
    low = losses_of(config_of(tiny_data, "bfloat16", max_steps=4), tmp_path / "b", one_rank)
    assert low == pytest.approx(exact, rel=5e-3)
    losses_of(config_of(tiny_data, "bfloat16", max_steps=2), tmp_path / "c", one_rank)
    resumed = losses_of(config_of(tiny_data, "bfloat16", max_steps=4), tmp_path / "c", one_rank)
    assert resumed == pytest.approx(low, rel=1e-3)


def test_a_run_on_pairs_is_near_fp32(one_rank: torch.device, tmp_path: Path) -> None:
    folder, losses = prepare_pairs(tmp_path / "data"), []
    for dtype in ("float32", "bfloat16"):
        config = preference_config(folder)
        config.trainer.dtype = dtype
        losses.append(losses_of(config, tmp_path / dtype, one_rank))
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


def test_a_bad_step_updates_nothing(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_data, "bfloat16", max_steps=4)
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    loss, before = trainer.objective.loss, dict[str, Tensor]()
    tensors = trained_tensors(trainer.engine, trainer.optimizer)
    held = {name: one.to_local() for name, one in tensors.items()}

    def poison(batch: PackedBatch) -> Tensor:
        if trainer.step == 2:
            before.update({name: one.clone() for name, one in held.items()})
        if trainer.step == 3:  # that is after the bad step
            for name, one in held.items():
                assert torch.equal(one, before[name]), name
        return loss(batch) * (torch.nan if trainer.step == 2 else 1.0)

    trainer.objective.loss = poison  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    assert set(trainer.optimizer.steps.values()) == {3}
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0]


@pytest.mark.parametrize("objective", ["language_modelling", "preference"])
def test_a_step_does_not_wait_for_the_device(
    objective: str, one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_data, "bfloat16", max_steps=4)
    if objective == "preference":
        config = preference_config(prepare_pairs(tmp_path / "data"))
        config.trainer.dtype = "bfloat16"
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.objective.prepare(tmp_path, "these weights")
    try:
        trainer.train_step(next(trainer.loader))  # allocations and first calls may wait
        batch = next(trainer.loader)
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()


def test_a_trace_has_the_kernels(one_rank: torch.device, tiny_data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_data, "bfloat16", max_steps=4)
    config.trainer.profile.from_step = 3
    losses_of(config, tmp_path, one_rank)
    trace = json.loads(gzip.decompress((tmp_path / "profile/step_3/rank0.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])


def test_memory_that_runs_out_is_written_down(one_rank: torch.device, tmp_path: Path) -> None:
    watch_memory(tmp_path, one_rank, {"weights": 2**30}, rank=0, history=True)
    try:
        held = torch.zeros(2**20, device=one_rank)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**45, dtype=torch.uint8, device=one_rank)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    text = (tmp_path / "oom" / "rank0.txt").read_text()
    assert "32768.00 GiB asked for" in text
    assert "weights" in text
    snapshot = pickle.loads((tmp_path / "oom" / "rank0.pickle").read_bytes())
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    assert any(block["address"] == held.data_ptr() and block["frames"] for block in blocks)
