"""Checkpoints: whole or refused, the newest whole one found, loadable on any mesh."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from support.tiny import read_checkpoint, tiny_config
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.data.config import SourceConfig
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.weights import CheckpointWeights, Piece, changed_keys, save_weights

WORLD_OF_ONE = torch.device("cpu")


def build(config: RunConfig, run_dir: Path, *, device: torch.device = WORLD_OF_ONE) -> Trainer:
    return Trainer(config, build_mesh(config.parallel, device), run_dir)


def train(config: RunConfig, run_dir: Path) -> Trainer:
    """Run to the end and close; the trainer still holds its weights."""
    run_dir.mkdir(exist_ok=True)
    trainer = build(config, run_dir)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of weights and moments, gathered."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
        if not name.startswith("rng.")
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    kinds = {name.split(".")[0] for name in ours}
    assert kinds == {"model", "exp_avg", "exp_avg_sq"}
    for name, tensor in ours.items():
        if ".experts." in name:
            for expert in range(tensor.shape[0]):
                assert torch.equal(tensor[expert], theirs[name][expert]), f"{name}, {expert}"
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def finished_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6; read only."""
    run_dir = tmp_path_factory.mktemp("finished")
    run_world(_finish, 1, str(tiny_data), run_dir)
    return run_dir


def _finish(device: torch.device, data: str, run_dir: Path) -> None:
    config = tiny_config(data)
    config.checkpoint.every_steps = 2
    train(config, run_dir)


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def checkpointer(run_dir: Path, one_rank: torch.device) -> Iterator[Checkpointer]:
    made = Checkpointer(run_dir / "checkpoints", keep=3)
    yield made
    made.close()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


Damage = tuple[Callable[[Path], None], str]
DAMAGES: dict[str, Damage] = {
    "flipped byte of the tensors": (flip_byte, "__0_0.distcp"),
    "flipped byte of the metadata": (flip_byte, ".metadata"),
    "flipped byte of the state": (flip_byte, "trainer_state.json"),
    "tensors missing": (Path.unlink, "__0_0.distcp"),
    "metadata missing": (Path.unlink, ".metadata"),
    "state missing": (Path.unlink, "trainer_state.json"),
    "configuration missing": (Path.unlink, "config.yaml"),
    "tensors cut short": (truncate, "__0_0.distcp"),
    "state cut short": (truncate, "trainer_state.json"),
    "manifest missing": (Path.unlink, "manifest.json"),
    "manifest cut short": (truncate, "manifest.json"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told_by_file(
    damage: Callable[[Path], None], name: str, run_dir: Path, checkpointer: Checkpointer
) -> None:
    path = run_dir / "checkpoints" / "step_6"
    assert checkpointer.find_fault(path) is None
    damage(path / name)
    fault = checkpointer.find_fault(path)
    assert fault is not None
    assert str(path) in fault
    assert name in fault


def test_auto_falls_back_to_the_newest_whole_one_and_says_so(
    run_dir: Path, checkpointer: Checkpointer, messages: list[str]
) -> None:
    folder = run_dir / "checkpoints"
    assert checkpointer.find_newest() == folder / "step_6"
    assert messages == []
    flip_byte(folder / "step_6" / "__0_0.distcp")
    assert checkpointer.find_newest() == folder / "step_4"
    (said,) = messages
    assert f"{folder}/step_6/__0_0.distcp is corrupt" in said
    assert "trying the checkpoint before it" in said
    (folder / "step_4" / ".metadata").unlink()
    assert checkpointer.find_newest() == folder / "step_2"
    (folder / "step_2" / "manifest.json").unlink()
    assert checkpointer.find_newest() is None


def test_a_damaged_one_that_is_named_is_refused(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    path = run_dir / "checkpoints" / "step_4"
    flip_byte(path / "__0_0.distcp")
    config = tiny_config(tiny_data)
    config.checkpoint.resume = str(path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=.*__0_0\.distcp is corrupt"):
        build(config, tmp_path / "new")
    config.checkpoint.resume = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere is not a whole checkpoint"):
        build(config, tmp_path / "new")


def test_a_broken_newest_one_is_trained_again_and_kept_aside(
    run_dir: Path, one_rank: torch.device, tiny_data: Path
) -> None:
    folder = run_dir / "checkpoints"
    whole_one = read_checkpoint(folder / "step_6")
    truncate(folder / "step_6" / "__0_0.distcp")
    config = tiny_config(tiny_data)
    trainer = train(config, run_dir)
    assert trainer.step == 6
    again = read_checkpoint(folder / "step_6")
    assert again.keys() == whole_one.keys()
    assert all(torch.equal(again[name], whole_one[name]) for name in again)
    assert (folder / "step_6.replaced-0" / "__0_0.distcp").exists()
    assert (folder / "latest").resolve() == (folder / "step_6").resolve()
    assert trainer.checkpointer.find_newest() == folder / "step_6"


def test_saving_is_a_copy(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_write = threading.Event(), threading.Event()
    write = dcp.save

    def write_later(*args: Any, **options: Any) -> Any:
        assert may_write.wait(30)
        result = write(*args, **options)
        written.set()
        return result

    monkeypatch.setattr(dcp, "save", write_later)
    trainer = build(tiny_config(tiny_data), tmp_path)
    batch = next(trainer.loader)
    grad_norm, _ = trainer.train_step(batch)
    trainer.step, trainer.tokens = 1, batch.num_tokens
    expected = whole(trainer._tensors())
    state = json.loads(json.dumps(batch.state))
    trainer.save(batch.state, grad_norm)
    for _ in range(2):
        trainer.train_step(next(trainer.loader))
        trainer.step += 1
    batch.state.clear()
    assert not written.is_set()
    may_write.set()
    trainer.close()
    now = whole(trainer._tensors())
    assert not any(torch.equal(now[name], expected[name]) for name in now)
    assert_same(expected, read_checkpoint(tmp_path / "checkpoints" / "step_1"))
    saved = json.loads((tmp_path / "checkpoints/step_1/trainer_state.json").read_text())
    assert saved["step"] == 1
    assert saved["optimizer_steps"] == dict.fromkeys(trainer.engine.parameters, 1)
    assert saved["loader"] == state


def test_a_failed_write_is_raised_and_leaves_the_one_before(
    run_dir: Path,
    one_rank: torch.device,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    config = tiny_config(tiny_data, max_steps=8)
    trainer = build(config, run_dir)
    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    trainer.loader.close()
    folder = run_dir / "checkpoints"
    assert not (folder / "step_8").exists()
    assert (folder / "latest").resolve() == (folder / "step_6").resolve()
    assert trainer.checkpointer.find_newest() == folder / "step_6"


def test_retention_and_latest(one_rank: torch.device, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, max_steps=5)
    config.checkpoint.every_steps = 1
    config.checkpoint.keep = 2
    train(config, tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step_4", "step_5"]
    assert os.readlink(folder / "latest") == "step_5"
    # Ten is newer than nine, though not by the alphabet.
    config.trainer.max_steps = 10
    train(config, tmp_path)
    assert sorted(os.listdir(folder)) == ["latest", "step_10", "step_9"]
    assert os.readlink(folder / "latest") == "step_10"


def test_leftovers_of_a_killed_run_are_ignored_and_removed(
    run_dir: Path, one_rank: torch.device, tiny_data: Path
) -> None:
    folder = run_dir / "checkpoints"
    for name in (".step_7.writing", ".step_8.writing", ".step_1.deleting"):
        shutil.copytree(folder / "step_6", folder / name)
    (folder / ".step_8.writing" / "manifest.json").unlink()
    (folder / "step_9").mkdir()  # not ours: it has no manifest
    config = tiny_config(tiny_data, max_steps=8)
    trainer = train(config, run_dir)
    assert trainer.step == 8
    assert trainer.checkpointer.find_newest() == folder / "step_8"
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_broken_newer_ones_do_not_count_for_retention(
    run_dir: Path, one_rank: torch.device, tiny_data: Path
) -> None:
    folder = run_dir / "checkpoints"
    for step in (2, 4, 6):
        truncate(folder / f"step_{step}" / "__0_0.distcp")
    config = tiny_config(tiny_data, max_steps=1)
    config.checkpoint.keep = 1
    trainer = train(config, run_dir)
    assert trainer.checkpointer.find_newest() == folder / "step_1"


@pytest.mark.parametrize("torn", ["", "[1", "[1]"])
def test_a_torn_older_one_does_not_stop_saves(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, torn: str
) -> None:
    folder = run_dir / "checkpoints"
    for step in (4, 6):  # as a machine leaves it that loses power
        (folder / f"step_{step}" / "trainer_state.json").write_text(torn)
    config = tiny_config(tiny_data, max_steps=8)
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 2
    trainer = train(config, run_dir)
    assert trainer.checkpointer.find_newest() == folder / "step_8"
    # What was in the way of the new ones stays to be looked at.
    aside = {"step_4.replaced-0", "step_6.replaced-0"}
    assert set(os.listdir(folder)) == {"latest", "step_6", "step_8"} | aside


def test_a_run_that_must_be_new_overwrites_nothing(
    run_dir: Path, one_rank: torch.device, tiny_data: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    config = tiny_config(tiny_data)
    config.checkpoint.resume = "never"
    with pytest.raises(ValueError, match=r"checkpoint\.resume=never, .*step_6: .* run_id"):
        build(config, run_dir)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 48, r"model\.hidden_size \(32 there, 48 here\)"),
        ("num_layers", 4, r"model\.num_layers \(3 there, 4 here\)"),
        ("num_layers", 2, r"model\.num_layers \(3 there, 2 here\)"),
        ("softmax_every", 3, r"model\.softmax_every \(2 there, 3 here\)"),
        ("rope_theta", 5e5, r"model\.rope_theta \(10000\.0 there, 500000\.0 here\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    key: str, value: float, message: str, run_dir: Path, one_rank: torch.device, tiny_data: Path
) -> None:
    config = tiny_config(tiny_data)
    setattr(config.model, key, value)
    with pytest.raises(CheckpointError, match=f"step_6 is of another model: {message}"):
        build(config, run_dir)


def test_tensors_must_be_those_of_the_model(run_dir: Path, checkpointer: Checkpointer) -> None:
    path = run_dir / "checkpoints" / "step_6"
    held = read_checkpoint(path)
    head = "model.lm_head.weight"
    with pytest.raises(CheckpointError, match=r"step_6 is of another model: .* no model\.new"):
        checkpointer.load(path, held | {"model.new": torch.zeros(1)})
    fewer = {name: tensor for name, tensor in held.items() if name != head}
    with pytest.raises(CheckpointError, match=f"step_6 is of another model: .* {head}"):
        checkpointer.load(path, fewer)
    with pytest.raises(CheckpointError, match=rf"{head} has shape \(301, 32\), .* \(301, 16\)"):
        checkpointer.load(path, held | {head: torch.zeros(301, 16)})
    state, absent = checkpointer.load(path, held | {"rng.7": torch.zeros(1)})
    assert state["step"] == 6
    assert absent == ["rng.7"]


def test_weights_alone_are_a_start(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, tmp_path: Path, messages: list[str]
) -> None:
    source = run_dir / "checkpoints" / "step_6"
    weights = CheckpointWeights(source)
    pieces = [
        Piece(name, shape, (0, shape[0]), lambda name=name: weights.read(name))
        for name, shape in weights.shapes.items()
    ]
    config = OmegaConf.to_container(OmegaConf.load(source / "config.yaml"))
    assert isinstance(config, dict)
    save_weights(tmp_path / "imported", pieces, {"model": config["model"]})
    config = tiny_config(tiny_data)
    config.checkpoint.resume = str(tmp_path / "imported")
    trainer = build(config, tmp_path / "new")
    trainer.close()
    assert (trainer.step, trainer.tokens, set(trainer.optimizer.steps.values())) == (0, 0, {0})
    assert any("starting at step 0 from the weights of" in message for message in messages)
    expected = read_checkpoint(source)
    for name, tensor in whole(trainer._tensors()).items():
        if name.startswith("model."):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert not tensor.any(), name


def test_a_run_that_began_from_a_checkpoint_goes_on_from_its_own(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    # A requeued job repeats its command line.
    config = tiny_config(tiny_data, max_steps=7)
    config.checkpoint.resume = str(run_dir / "checkpoints" / "step_4")
    new = tmp_path / "new"
    assert train(config, new).step == 7
    config.trainer.max_steps = 8
    trainer = build(config, new)
    trainer.close()
    assert trainer.step == 7


def test_a_requeued_run_does_not_fall_back_to_where_it_began(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, max_steps=4)
    config.checkpoint.resume = str(run_dir / "checkpoints" / "step_2")
    branch = tmp_path / "branch"
    branch.mkdir()
    trainer = build(config, branch)
    assert trainer.step == 2
    trainer.fit()
    trainer.close()
    again = build(config, branch)
    again.close()
    assert again.step == 4
    assert (branch / "checkpoints" / "latest").resolve().name == "step_4"


def test_a_failed_write_stops_the_run_at_once(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    config = tiny_config(tiny_data, max_steps=60)
    config.checkpoint.every_steps = 30
    trainer = build(config, tmp_path)
    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert 30 <= trainer.step < 60
    trainer.close()  # raises no second time


def test_another_seed_is_refused(run_dir: Path, one_rank: torch.device, tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    config.seed += 1
    with pytest.raises(ValueError, match="seed=4, but the checkpoint's data order has seed=3"):
        build(config, run_dir)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_broken_gradient_stops_the_run_before_it_is_saved(
    log_every: int,
    one_rank: torch.device,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(tiny_data)
    config.checkpoint.every_steps = 1
    config.log.every_steps = log_every
    config.health.enabled = False  # else the step would be skipped
    trainer = build(config, tmp_path)
    healthy = trainer.train_step

    def poisoned(batch: Any) -> Any:
        if trainer.step == 2:
            trainer.engine.parameters["norm.weight"].detach().to_local()[0] = torch.nan
        return healthy(batch)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="gradient norm of step 3 is nan"):
        trainer.fit()
    trainer.close()
    folder = tmp_path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step_1", "step_2"]
    assert trainer.checkpointer.find_newest() == folder / "step_2"
    saved = read_checkpoint(folder / "step_2")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not (tmp_path / "DONE").exists()


def test_a_finished_run_has_nothing_to_do(
    run_dir: Path, one_rank: torch.device, tiny_data: Path, messages: list[str]
) -> None:
    (run_dir / "DONE").unlink()  # killed between the last checkpoint and this
    trainer = train(tiny_config(tiny_data), run_dir)
    assert trainer.step == 6
    assert any("nothing to do: 6 steps" in message for message in messages)
    assert (run_dir / "DONE").exists()


# ---- another mesh ----


def _save_on(device: torch.device, data: str, run_dir: Path, stage: int) -> dict[str, Tensor]:
    config = tiny_config(data, max_steps=4)
    config.parallel = ParallelConfig(zero_stage=stage)
    trainer = build(config, run_dir, device=device)
    trainer.fit()
    trainer.close()
    return whole(trainer._tensors())


def _load_on(
    device: torch.device, data: str, run_dir: Path, stages: tuple[int, int | None]
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int], str]:
    config = tiny_config(data, max_steps=5)
    dense, expert = stages
    config.parallel = ParallelConfig(zero_stage=dense, expert_zero_stage=expert)
    trainer = build(config, run_dir, device=device)
    held = {name: p.to_local().numel() for name, p in trainer.engine.parameters.items()}
    digest = next(trainer.loader).digest
    trainer.close()
    return whole(trainer._tensors()), held, trainer.optimizer.steps, digest


@pytest.mark.slow
def test_a_checkpoint_loads_on_any_mesh(tiny_data: Path, tmp_path: Path) -> None:
    first, second = run_world(_save_on, 2, str(tiny_data), tmp_path, 2)
    assert_same(first, second)
    assert_same(first, read_checkpoint(tmp_path / "checkpoints" / "step_4"))
    assert all(tensor.count_nonzero() for tensor in first.values())
    digests = set()
    for size, stages in [(1, (0, None)), (2, (0, 2)), (4, (3, None))]:
        for rank, loaded in enumerate(run_world(_load_on, size, str(tiny_data), tmp_path, stages)):
            tensors, held, steps, digest = loaded
            assert_same(first, tensors)
            assert steps == dict.fromkeys(held, 4)
            digests.add(digest)
            full = first["model.lm_head.weight"].numel()
            assert (held["lm_head.weight"] == full) == (stages[0] == 0), f"rank {rank} of {size}"
    assert len(digests) == 1


@pytest.mark.fast
def test_keys_that_came_changed_and_went_are_named(tmp_path: Path) -> None:
    before, now = tiny_config("there"), tiny_config("there")
    stored = OmegaConf.to_container(OmegaConf.structured(before))
    assert isinstance(stored, dict)
    del stored["health"]  # of a version that had none
    stored["optim"]["old"] = 1
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    assert changed_keys(tmp_path, before) == ["optim.old was 1, is None"]
    now.health.max_skips = 7
    now.data.sources["more"] = SourceConfig("elsewhere")
    assert changed_keys(tmp_path, now) == [
        "data.sources.more.path was None, is elsewhere",
        "data.sources.more.weight was None, is 1.0",
        "health.max_skips was 5, is 7",
        "optim.old was 1, is None",
    ]
