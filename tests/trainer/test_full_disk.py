"""A disk that is full, or does not answer, while a run saves and logs."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import HANG_S
from support.rows import step_row
from support.tiny import tiny_config
from support.worlds import run_processes, run_world

from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.rendezvous import join_world
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer import disk, metrics
from fulmen.trainer.checkpoint import Checkpointer, SaveError
from fulmen.trainer.config import GroupConfig, RunConfig, StageConfig
from fulmen.trainer.disk import check_disk, checkpoint_bytes
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import JsonlSink, read_metrics

# ---- checkpoints ----


class FullDisk:
    """Writes of rank 1 fail at some steps, after a part was written."""

    def __init__(self, steps: set[int]) -> None:
        self.write = dcp.FileSystemWriter.write_data
        disk = self

        def write_data(writer: Any, *args: Any) -> Any:
            step = int(writer.path.name.split("_")[1].split(".")[0])
            if step in steps and dist.get_rank() == 1:
                (writer.path / "__1_0.distcp").write_bytes(b"part")
                raise OSError(28, "No space left on device")
            return disk.write(writer, *args)

        dcp.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]

    def close(self) -> None:
        dcp.FileSystemWriter.write_data = self.write  # type: ignore[method-assign]


def save_on_a_full_disk(device: Any, config: RunConfig, root: Path) -> dict[str, Any]:
    """Saves are due at steps 2, 4, 6 and 8; what became of the run, by how many of them fail."""
    results = {}
    for name, steps in {"one": {4}, "all but one": {4, 6, 8}, "last": {8}}.items():
        run_dir = root / name.replace(" ", "_")
        run_dir.mkdir(exist_ok=True)
        full, told, there = FullDisk(steps), [], []
        trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
        alert = metrics.MetricsLogger.alert

        def hear(self: Any, title: str, text: str) -> None:
            told.append(text)  # noqa: B023
            there.append(sorted(os.listdir(run_dir / "checkpoints")))  # noqa: B023

        metrics.MetricsLogger.alert = hear  # type: ignore[method-assign]
        try:
            trainer.fit()
            end = "ended"
        except SaveError as error:
            end = f"{error}"
        finally:
            metrics.MetricsLogger.alert = alert  # type: ignore[method-assign]
            full.close()
            trainer.close()
        dist.barrier()
        left = sorted(os.listdir(run_dir / "checkpoints"))
        results[name] = end, trainer.step, left, told, there
    return results


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, max_steps=8)
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 2
    config.checkpoint.max_failures = 2
    first, second = run_world(save_on_a_full_disk, 2, config, tmp_path)
    end, _, left, told, there = first["one"]
    assert end == second["one"][0] == "ended"
    assert left == ["latest", "step_6", "step_8"]
    (text,) = told
    assert "the checkpoint of step 4 could not be saved: rank 1: OSError(28, 'No space" in text
    assert "GiB free of" in text
    assert there == [["latest", "step_2"]]  # the unfinished one is removed, the whole one is there
    assert first["all but one"][1] == second["all but one"][1]  # none is left in a collective
    for results in (first, second):
        end, step, left, *_ = results["all but one"]
        assert "the checkpoint of step 6 could not be saved" in end
        assert 6 <= step <= 8
        assert left == ["latest", "step_2"]
        end, step, left, *_ = results["last"]
        assert "the checkpoint of step 8 could not be saved" in end
        assert left == ["latest", "step_4", "step_6"]
    assert (tmp_path / "one" / "DONE").exists()
    assert not (tmp_path / "last" / "DONE").exists()
    assert len(read_metrics(tmp_path / "one" / "metrics.jsonl")) >= 8


def stalled_save(data: str, folder: Path) -> None:
    """A save whose file system does not answer."""
    with (folder / "stderr").open("wb") as file:
        os.dup2(file.fileno(), 2)
    device = join_world()
    config = tiny_config(data, max_steps=60)
    config.checkpoint.every_steps, config.checkpoint.timeout_s = 2, 1.5
    dcp.FileSystemWriter.write_data = lambda *args: time.sleep(2 * HANG_S)  # type: ignore
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    trainer.fit()


@pytest.mark.slow
def test_a_save_that_takes_too_long_ends_the_process(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"died: 75$"):
        run_processes(stalled_save, [{}], str(tiny_data), tmp_path)
    said = (tmp_path / "stderr").read_text()
    assert "a checkpoint is being written for more than checkpoint.timeout_s=1.5 s" in said


# ---- room at the start ----


def test_the_size_of_a_checkpoint_is_foreseen(
    one_rank: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_data, max_steps=1)
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.fit()
    trainer.close()
    folder = tmp_path / "checkpoints"
    size = checkpoint_bytes(config)
    written = sum(path.stat().st_size for path in folder.glob("step_1/*.distcp"))
    assert size < written < 1.4 * size  # of small tensors, headers are large

    config.checkpoint.every_steps, config.checkpoint.keep = 2, 3
    config.health.enabled = False
    monkeypatch.setattr(disk, "space", lambda folder: (4 * size - written, 10 * size))
    check_disk(config, folder)
    monkeypatch.setattr(disk, "space", lambda folder: (4 * size - written - 1, 10 * size))
    with pytest.raises(ValueError, match=r"4 checkpoints of .* do not fit into .*"):
        check_disk(config, folder)
    # What a killed save left is room too, but not what was set aside.
    shutil.copytree(folder / "step_1", folder / ".step_3.writing")
    check_disk(config, folder)
    (folder / ".step_3.writing").rename(folder / "step_1.replaced-0")
    with pytest.raises(ValueError, match=r"4 checkpoints"):
        check_disk(config, folder)
    config.checkpoint.every_steps = None
    check_disk(config, folder)
    check_disk(config, tmp_path / "not" / "there")
    # Of a run whose stages train more than its own keys say, that of the largest counts.
    config.optim.groups = {"layers": GroupConfig(match="layers", frozen=True)}
    assert checkpoint_bytes(config) < 0.6 * size
    config.trainer.max_steps = None
    open_groups = {"groups": {"layers": {"frozen": False}}}
    config.stages = {"one": StageConfig(tokens=512, optim=open_groups)}
    monkeypatch.setattr(disk, "space", lambda folder: (size - written - 1, 10 * size))
    with pytest.raises(ValueError, match="1 checkpoints of"):
        check_disk(config, folder)


class MostOnDisk:
    """The most checkpoints, whole or in the making, that lay in a folder while one was written."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.number = folder, 0
        write = dcp.FileSystemWriter.write_data

        def write_data(*args: Any) -> Any:
            self.number = max(self.number, len(list(self.folder.glob("*step_*"))))
            return write(*args)

        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)


@pytest.mark.parametrize(
    ("every", "window", "bad_step", "most"),
    [(1, 3, 3, 4), (2, 3, 4, 4), (3, 3, 6, 3), (1, 3, 0, 3)],
)
def test_the_most_checkpoints_at_once_are_those_counted(
    every: int, window: int, bad_step: int, most: int,
    one_rank: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of two that are kept: with a new one, and with one from before a bad step."""
    config = tiny_config(tiny_data, max_steps=12)
    config.checkpoint.every_steps, config.checkpoint.keep = every, 2
    config.health.window, config.health.max_skips = window, 2
    config.health.enabled = bool(bad_step)
    size = checkpoint_bytes(config)
    monkeypatch.setattr(disk, "space", lambda folder: (most * size, 10 * size))
    check_disk(config, tmp_path / "checkpoints")
    monkeypatch.setattr(disk, "space", lambda folder: (most * size - 1, 10 * size))
    with pytest.raises(ValueError, match=f"{most} checkpoints"):
        check_disk(config, tmp_path / "checkpoints")
    clip = ZeroEngine.clip_grad_norm
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)

    def clip_grad_norm(self: ZeroEngine, *args: Any) -> Any:
        norm = clip(self, *args)
        return norm.fill_(torch.nan) if trainer.step + 1 == bad_step else norm

    monkeypatch.setattr(ZeroEngine, "clip_grad_norm", clip_grad_norm)
    seen = MostOnDisk(tmp_path / "checkpoints", monkeypatch)
    trainer.fit()
    trainer.close()
    assert seen.number == most


# ---- metrics.jsonl ----


class LittleFile:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.fast
def test_rows_wait_for_room_and_none_is_torn(tmp_path: Path, messages: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.log_step(step_row(1))
    little = LittleFile(sink._file, 100)
    sink._file = little  # type: ignore[assignment]
    for step in (2, 3, 4):
        sink.log_step(step_row(step))
    assert [row["step"] for row in read_metrics(path)] == [1]  # and a torn line
    little.room = 10**6
    sink.log_step(step_row(5))
    sink.close(failed=False)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [step_row(step) for step in range(1, 6)]
    said = [message for message in messages if str(path) in message]
    assert len(said) == 2
    assert "rows are kept in memory" in said[0]
    assert "has all rows again" in said[1]


@pytest.mark.fast
def test_rows_that_are_never_written_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    sink._file = LittleFile(sink._file, 10)  # type: ignore[assignment]
    sink.log_step(step_row(1))
    monkeypatch.setattr(metrics, "MOST_HELD", 100)
    with pytest.raises(OSError, match="No space left"):
        sink.log_step(step_row(2))
    with pytest.raises(OSError, match="No space left"):
        sink.close(failed=False)
    assert "lacks the last 2 rows" in messages[-1]
    sink.close(failed=False)  # raises no second time


# ---- numbers of processes ----


@pytest.mark.fast
def test_processes_that_fit_are_named(tiny_data: Path) -> None:
    from fulmen.trainer.config import check_config

    config = tiny_config(tiny_data)
    with pytest.raises(ValueError, match=r"number of processes \(1, 2, 4 would fit\)"):
        check_config(config, 3)


def test_a_checkpointer_of_a_run_has_its_limits(one_rank: Any, tmp_path: Path) -> None:
    config = RunConfig().checkpoint
    made = Checkpointer.of_run(tmp_path, config)
    made.close()
    assert (made._timeout_s, made._max_failures) == (config.timeout_s, config.max_failures)
