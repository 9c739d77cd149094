"""Traces by key and by file: of the steps that were asked for, from the ranks that should."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config
from support.worlds import run_world

from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.progress import phase
from fulmen.trainer import profile_memory
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.profile import REQUEST, Profiler
from fulmen.trainer.profile_config import ProfileConfig


def traced(path: Path) -> tuple[list[int], int]:
    """Steps that a trace holds by the profiler's own count, and matrix products in it."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    return sorted(int(name.split("#")[1]) for name in steps), names.count("aten::mm")


def steps_of(
    profiler: Profiler, steps: range, *, request: dict[int, str], folder: Path
) -> list[int]:
    """Run steps, each of as many matrix products as its number; the ones after which traces were
    written."""
    written = []
    for step in steps:
        if profiler.begin_step(step, may_ask=step % 2 == 1):
            written.append(step)
        for _ in range(step):
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        if step in request and profiler._mesh.rank == 0:
            (folder / REQUEST).write_text(request[step])
    profiler.close()
    return written


def on_each_rank(device: torch.device, folder: Path) -> list[list[int]]:
    logging.getLogger("fulmen").setLevel(logging.ERROR)
    mesh = build_mesh(ParallelConfig(), device)
    by_key = Profiler(ProfileConfig(from_step=2, steps=2, ranks=2), mesh, folder)
    first = steps_of(by_key, range(1, 9), request={3: "x"}, folder=folder)
    by_file = Profiler(ProfileConfig(steps=2, ranks=1), mesh, folder)
    second = steps_of(by_file, range(11, 21), request={11: "", 16: "3\n"}, folder=folder)
    return [first, second]


@pytest.mark.slow
def test_traces_by_key_and_by_file_are_of_the_same_steps_on_all_ranks(tmp_path: Path) -> None:
    results = run_world(on_each_rank, 3, tmp_path)
    # Asked for in step 3, seen before step 5, warmed up in it, of steps 6 and 7.
    assert results[:2] == [[[4, 8], [16]], [[4, 8], []]]
    assert results[2] == [[], []]
    assert not (tmp_path / REQUEST).exists()
    found = {str(path.relative_to(tmp_path / "profile")) for path in tmp_path.glob("profile/*/*")}
    assert found == {
        *(f"step_{first}/rank{rank}.json.gz" for first in (2, 6) for rank in (0, 1)),
        *("step_14/rank0.json.gz", "step_18/rank0.json.gz"),
    }
    products = {2: 2 + 3, 6: 6 + 7, 14: 14 + 15, 18: 18 + 19 + 20}
    for first, number in products.items():
        steps, found_products = traced(tmp_path / f"profile/step_{first}/rank0.json.gz")
        assert found_products == number, first
        assert len(steps) == (3 if first == 18 else 2)


def test_a_touched_file_traces_a_run_and_changes_nothing(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    losses = []
    for name in ("plain", "traced"):
        config = tiny_config(tiny_data, max_steps=4)
        config.trainer.profile.steps = 2
        folder = tmp_path / name
        folder.mkdir()
        if name == "traced":
            (folder / REQUEST).touch()
        trainer = Trainer(config, build_mesh(config.parallel, one_rank), folder)
        trainer.fit()
        trainer.close()
        losses.append([row["loss"] for row in read_metrics(folder / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json.gz")] == [
        "traced/profile/step_2/rank0.json.gz"
    ]
    steps, _ = traced(tmp_path / "traced/profile/step_2/rank0.json.gz")
    assert len(steps) == 2


@pytest.mark.fast
def test_bad_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"trainer\.profile\.steps=21: must be 1 to 20"):
        ProfileConfig(steps=21)
    with pytest.raises(ValueError, match=r"trainer\.profile\.from_step=0"):
        ProfileConfig(from_step=0)


def test_what_is_written_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observers = []
    monkeypatch.setattr(profile_memory, "_watch", None)
    patched = {
        "_C._cuda_attach_out_of_memory_observer": observers.append,
        "cuda.memory_summary": lambda abbreviated: "summary of the allocator",
        "cuda.memory_allocated": lambda: 60 * 2**30,
        "cuda.memory_reserved": lambda: 70 * 2**30,
        "cuda.memory._snapshot": lambda: {"segments": []},
    }
    for name, function in patched.items():
        monkeypatch.setattr(f"torch.{name}", function, raising=False)
    folder, device = tmp_path / "run", torch.device("cpu")
    predicted = {"weights": 10 * 2**30, "activations": 45 * 2**30, "offloaded": 0}
    profile_memory.watch_memory(folder, device, {"weights": 1}, rank=3, history=False)
    profile_memory.watch_memory(folder, device, predicted, rank=3, history=False)  # of a stage
    (observer,) = observers
    phase("backward", 12)
    observer(0, 2**30, 79 * 2**30, 2**28)
    text = (folder / "oom" / "rank3.txt").read_text()
    for line in (
        "out of memory at step 12, in 'backward'",
        "1.00 GiB asked for; of the device's 79.00 GiB 0.25 are free",
        f"  {'activations':<38}{45:>8.2f}",
        f"  {'sum':<38}{55:>8.2f}",
        f"  {'by CUDA, NCCL and other processes':<38}{8.75:>8.2f}",
        "summary of the allocator",
    ):
        assert line in text, line
    assert "offloaded" not in text
    assert (folder / "oom" / "rank3.pickle").exists()
    (folder / "oom" / "rank3.txt").unlink()
    observer(0, 2**30, 79 * 2**30, 2**28)  # the first one counts
    assert not (folder / "oom" / "rank3.txt").exists()
