"""Bad steps are skipped, runs go back as they should, and resume exactly; all off by one key.

What a run should do is written out here as a plan: steps without an update, and steps after which
weights, moments and counts are those of an earlier one. `carry_out` does that by hand.
"""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_config, tiny_model
from support.worlds import run_world
from torch import Tensor

from fulmen.data.packing import PackedBatch
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import GroupConfig, PhaseConfig, RunConfig, StageConfig
from fulmen.trainer.health import HealthError
from fulmen.trainer.health_config import HealthConfig, check_health
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.optim import MOMENTS
from fulmen.trainer.run import open_stage
from fulmen.trainer.spikes import highest_loss, highest_norm

STEPS = 12
NAN, SPIKE = math.nan, 100.0
BAD = {7: NAN, 9: SPIKE, 10: NAN, 11: SPIKE}
"""What the loss of rank 1's first micro-batch is multiplied by, by step."""
SKIPPED = set(BAD)
WAYS_BACK = {9: 6, 11: 6}
"""Step after which the run is back at another: 8 was saved after the first bad step."""


class CrashError(Exception):
    """Stands for a kill."""


def config_of(data: Path, *, steps: int = STEPS, **health: Any) -> RunConfig:
    config = tiny_config(data, max_steps=steps)
    config.evaluation.every_steps = None
    config.model = tiny_model(num_layers=2)
    config.log.every_steps = 5
    config.data.global_batch_tokens = 128
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 2
    config.health = HealthConfig(spike_factor=10.0, window=4, max_skips=1, replicas_every_steps=4)
    for key, value in health.items():
        setattr(config.health, key, value)
    return config


def poison(trainer: Trainer, factors: Mapping[int, float], rank: int) -> None:
    """Multiply the loss of a rank's first micro-batch, in some steps."""
    inner, seen = trainer.objective.loss, []

    def loss(batch: PackedBatch) -> Tensor:
        first = trainer.step not in seen
        seen.append(trainer.step)
        is_bad = first and trainer.mesh.rank == rank
        return inner(batch) * (factors.get(trainer.step + 1, 1.0) if is_bad else 1.0)

    trainer.objective.loss = loss  # type: ignore[method-assign]


def flip_bit(tensor: Tensor, index: int, bit: int) -> None:
    """Of one fp32 number, in place."""
    words = tensor.detach().view(-1).view(torch.int32)
    words[index] ^= 1 << bit


def flip_after(trainer: Trainer, step: int, name: str, rank: int, bit: int) -> None:
    """Flip a bit of a weight or moment on one rank, once this step's update is made."""
    inner = trainer.train_step

    def train_step(batch: Any) -> Any:
        result = inner(batch)
        if trainer.step + 1 == step and trainer.mesh.rank == rank:
            flip_bit(trainer._tensors()[name].to_local(), 7, bit)
        return result

    trainer.train_step = train_step  # type: ignore[method-assign]


def open_run(device: torch.device, config: RunConfig, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(config, build_mesh(config.parallel, device), folder)


def local_copies(trainer: Trainer) -> dict[str, Tensor]:
    """Of this rank's parts of weights and moments."""
    return {
        name: tensor.to_local().detach().clone()
        for name, tensor in trainer._tensors().items()
        if not name.startswith("rng.")
    }


def carry_out(
    trainer: Trainer, skipped: set[int], ways_back: Mapping[int, int]
) -> dict[str, Tensor]:
    """Do the rest of a run by hand."""
    kept, first = {}, trainer.step
    kept[first] = local_copies(trainer), dict(trainer.optimizer.steps)
    while not trainer.stage_finished:
        batch = next(trainer.loader)
        if trainer.step + 1 not in skipped:
            trainer.train_step(batch)
        trainer.step += 1
        trainer.tokens += batch.num_tokens
        if trainer.step in ways_back:
            tensors, counts = kept[ways_back[trainer.step]]
            for name, tensor in trainer._tensors().items():
                if name in tensors:
                    tensor.to_local().copy_(tensors[name])
            trainer.optimizer.set_steps(counts)
        kept[trainer.step] = local_copies(trainer), dict(trainer.optimizer.steps)
    trainer.close()
    return local_copies(trainer)


def by_hand(
    device: torch.device,
    config: RunConfig,
    folder: Path,
    skipped: set[int],
    ways_back: Mapping[int, int],
) -> dict[str, Tensor]:
    config.health.enabled = False
    return carry_out(open_run(device, config, folder), skipped, ways_back)


def train(
    device: torch.device,
    config: RunConfig,
    folder: Path,
    factors: Mapping[int, float],
    *,
    crashes: tuple[int, ...] = (),
    rank: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A whole run, begun again after each crash in the forward pass of these steps."""
    for end in (*crashes, None):
        trainer = open_run(device, config, folder)
        if end is not None:
            poison(trainer, {**factors, end: NAN}, rank)
            inner = trainer.train_step

            def dying(
                batch: Any, trainer: Any = trainer, end: Any = end, inner: Any = inner
            ) -> Any:
                if trainer.step + 1 == end:
                    raise CrashError
                return inner(batch)

            trainer.train_step = dying  # type: ignore[method-assign]
            with pytest.raises(CrashError):
                trainer.fit()
        else:
            poison(trainer, factors, rank)
            trainer.fit()
        trainer.close()
    state = json.loads((folder / "checkpoints" / "latest" / "trainer_state.json").read_text())
    return local_copies(trainer), state


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(device: torch.device, config: RunConfig, folder: Path, factors: dict) -> str:
    trainer = open_run(device, config, folder)
    poison(trainer, factors, 1)
    try:
        trainer.fit()
    except HealthError as error:
        return str(error)
    finally:
        trainer.close()
    return "it went on"


def bad_runs(device: torch.device, data: Path, root: Path) -> dict[str, Any]:
    """One world of two ranks: all that may happen, and what should have."""
    found: dict[str, Any] = {}
    config = config_of(data)
    config.checkpoint.every_steps = None
    clean, _ = train(device, config, root / "clean", {})
    found["the same without bad steps"] = same(
        clean, by_hand(device, config_of(data), root / "off", set(), {})
    )

    few = {6: NAN, 9: SPIKE}
    spread = ParallelConfig(cp=2, ep=2, zero_stage=3, expert_zero_stage=0)
    config = config_of(data, max_skips=2)
    config.parallel = spread
    skips, state = train(device, config, root / "skips", few)
    found["judged by"] = state["health"]["losses"]
    wanted = by_hand(device, config, root / "skips by hand", {6, 9}, {})
    found["skips as by hand"] = same(skips, wanted)
    found["counts"] = set(state["optimizer_steps"].values())

    back, state = train(device, config_of(data), root / "back", BAD)
    wanted = by_hand(device, config_of(data), root / "back by hand", SKIPPED, WAYS_BACK)
    found["back as by hand"] = same(back, wanted)
    found["state"] = state["health"]
    # Right after a skip, right after a way back (whose bad steps are done again), after both saves.
    crashes = (8, 10, 11, 12)
    killed, state = train(device, config_of(data), root / "killed", BAD, crashes=crashes)
    found["killed as undisturbed"] = same(killed, back), state["health"] == found["state"]

    found |= flipped_runs(device, data, root)
    cases = {
        "no way back left": ({"max_rewinds": 0}, {3: NAN, 4: NAN}),
        "nothing to go back to": ({}, {1: NAN, 2: NAN}),
    }
    found["errors"] = {
        name: refused(device, config_of(data, **health), root / name, factors)
        for name, (health, factors) in cases.items()
    }
    return found


def flipped_runs(device: torch.device, data: Path, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, action in (("stopped", "stop"), ("repaired", "rewind")):
        config = config_of(data, steps=8, on_disagreement=action, replicas_every_steps=3)
        config.parallel.zero_stage, config.evaluation.every_steps = 0, 2
        trainer = open_run(device, config, root / name)
        # Seen at step 6, with the save of step 4 the last one before.
        flip_after(trainer, 5, "exp_avg.norm.weight", rank=1, bit=3)
        try:
            trainer.fit()
        except HealthError as error:
            found[name] = str(error)
        trainer.close()
    config = config_of(data, steps=8)
    config.parallel.zero_stage = 0
    wanted = by_hand(device, config, root / "repaired by hand", set(), {6: 4})
    found["repaired as by hand"] = same(local_copies(trainer), wanted)
    return found


@pytest.fixture(scope="module")
def outcome(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bad_runs` found, and the folder of its runs."""
    root = tmp_path_factory.mktemp("health")
    first, second = run_world(bad_runs, 2, tiny_data, root)
    assert first == second
    return {**first, "root": root}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_a_bad_step_updates_nothing_and_is_told(outcome: dict[str, Any]) -> None:
    assert outcome["the same without bad steps"]
    assert outcome["skips as by hand"]
    assert outcome["counts"] == {STEPS - 2}
    rows = {row["step"]: row for row in rows_of(outcome["root"] / "skips")}
    clean = {row["step"]: row for row in rows_of(outcome["root"] / "clean")}
    row = rows[10]  # the third last of the good ones that are kept
    assert outcome["judged by"][-3] == pytest.approx(row["loss"] + 0.01 * row["aux_loss"])
    # Each has a row of its own; tokens and data are those of the clean run.
    assert {step: row["skipped"] for step, row in rows.items()} == {5: 0, 6: 1, 9: 1, 10: 0}
    assert math.isnan(rows[6]["grad_norm"])
    assert rows[6]["health"].startswith("skipped: its gradient norm is nan; batch ")
    assert rows[6]["batch_digest"] in rows[6]["health"]
    assert rows[9]["health"].startswith("skipped: its gradient norm is ")
    assert rows[9]["health"].endswith("2 of the last 4 steps, 2 may be")
    for step, row in clean.items():
        assert (row["skipped"], row["rewinds"]) == (0, 0)
        for key in ("tokens", "batch_digest", "lr"):
            assert rows[step][key] == row[key]


@pytest.mark.slow
def test_too_many_and_the_run_goes_back(outcome: dict[str, Any]) -> None:
    assert outcome["back as by hand"]
    assert outcome["state"]["rewinds"] == 2
    assert outcome["state"]["left"] == [[6, 9], [6, 11]]
    assert outcome["state"]["bad"] == []
    rows = {row["step"]: row for row in rows_of(outcome["root"] / "back")}
    found = {step: row["rewinds"] for step, row in rows.items()}
    assert found == {5: 0, 7: 0, 9: 1, 10: 1, 11: 2}
    end = (
        "2 bad steps since step 7, more than health.max_skips=1; back to step_6, 3 steps of "
        "training are lost"
    )
    assert rows[9]["health"].endswith(end)
    for row in rows_of(outcome["root"] / "clean"):
        assert all(rows[row["step"]][key] == row[key] for key in ("tokens", "batch_digest"))


@pytest.mark.slow
def test_a_run_that_is_killed_does_the_same(outcome: dict[str, Any]) -> None:
    assert outcome["killed as undisturbed"] == (True, True)
    kept = ("step", "tokens", "loss", "grad_norm", "skipped", "rewinds", "health", "batch_digest")
    ours, theirs = (
        [repr({key: row.get(key) for key in kept}) for row in rows_of(outcome["root"] / name)]
        for name in ("killed", "back")
    )
    assert ours == theirs


@pytest.mark.slow
def test_without_a_way_out_the_run_stops_and_says_why(outcome: dict[str, Any]) -> None:
    errors = outcome["errors"]
    assert "gone back 0 times, which is health.max_rewinds" in errors["no way back left"]
    assert errors["no way back left"].startswith("2 bad steps since step 3")
    assert "no checkpoint of this stage from before step 1" in errors["nothing to go back to"]


@pytest.mark.slow
def test_a_flipped_bit_stops_the_run_or_is_repaired(outcome: dict[str, Any]) -> None:
    assert outcome["stopped"].startswith(
        "replicas are not the same after step 6: ranks 0-1 differ, with no majority, in "
        "exp_avg.norm.weight"
    )
    assert "repaired" not in outcome  # it went on
    assert outcome["repaired as by hand"]
    folders = {name: outcome["root"] / name / "checkpoints" for name in ("stopped", "repaired")}
    assert not (folders["stopped"] / "step_6").exists()
    (row,) = (row for row in rows_of(outcome["root"] / "repaired") if row.get("health"))
    assert (row["step"], row["skipped"], row["rewinds"]) == (6, 0, 1)
    assert row["health"].endswith("; back to step_4, 2 steps of training are lost")


# ---- stages ----


def test_a_stage_goes_back_to_its_start_and_no_further(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    """Also where parameters train that were frozen in the stage before."""

    def open_next(name: str, *, every: int | None = None, **health: Any) -> Trainer:
        config = config_of(tiny_data, steps=100, **health)
        config.checkpoint.every_steps = every
        config.optim.groups = {"below": GroupConfig(match=r"embed_tokens|layers\.0\.", frozen=True)}
        thawed = {"groups": {"below": {"frozen": False}}}
        config.stages = {
            "first": StageConfig(tokens=700),
            "second": StageConfig(tokens=1500, optim=thawed, health={"max_skips": 2}),
        }
        stage = open_stage(config, one_rank, folder, is_first=name == "first")
        assert stage is not None
        assert stage.stage.name == name
        return stage

    folder, start = tmp_path / "run", 6
    folder.mkdir()
    stage = open_next("first", every=2)
    poison(stage, {start: NAN}, 0)  # not counted in the next stage
    stage.fit()
    stage.close()
    assert stage.step == start
    bad = {start + 2, start + 3, start + 4}
    wanted = carry_out(open_next("second", enabled=False), bad, {start + 4: start})

    stage = open_next("second")
    poison(stage, dict.fromkeys(bad, NAN), 0)
    first = folder / "checkpoints" / f"step_{start}"
    stage.objective.prepare = lambda *_: first.rename(folder / "away")  # type: ignore
    with pytest.raises(
        HealthError, match=f"no checkpoint of this stage from before step {start + 2}"
    ):
        stage.fit()
    stage.close()
    (folder / "away").rename(first)
    assert (folder / "checkpoints" / "step_4").exists()  # but is of the first stage

    stage = open_next("second")
    poison(stage, dict.fromkeys(bad, NAN), 0)
    stage.fit()
    stage.close()
    assert stage.health.state()["left"] == [(start, start + 4)]
    assert stage.step > start + 5
    assert same(local_copies(stage), wanted)
    assert set(stage.optimizer.steps) == set(stage.engine.parameters)


# ---- the final loss ----


def long_config(data: Path, seed: int = 3, *, saves: bool = True, **health: Any) -> RunConfig:
    """A run that has learnt by its end what there is to learn in so little data."""
    config = config_of(data, steps=40, max_skips=2, **health)
    config.seed, config.optim.lr = seed, 0.02
    config.checkpoint.every_steps = 5 if saves else None
    config.schedule.phases = [
        PhaseConfig(tokens=1700, lr_factor=1.0),
        PhaseConfig(tokens=5000, lr_factor=0.05, decay="exponential"),
    ]
    return config


def final_loss(
    device: torch.device, config: RunConfig, folder: Path, factors: Mapping[int, float]
) -> float:
    """On held-out texts after the last step."""
    config.evaluation.every_steps = config.trainer.max_steps
    trainer = open_run(device, config, folder)
    poison(trainer, factors, 0)
    trainer.fit()
    trainer.close()
    return read_metrics(folder / "metrics.jsonl")[-1]["eval_loss/text"]


def loss_with_a_flipped_bit(device: torch.device, config: RunConfig, folder: Path) -> float:
    config.evaluation.every_steps = config.trainer.max_steps
    trainer = open_run(device, config, folder)
    flip_after(trainer, 26, "model.lm_head.weight", rank=1, bit=30)  # to some 1e37
    trainer.fit()
    trainer.close()
    assert trainer.health.state()["left"] == [(25, 27)]
    return read_metrics(folder / "metrics.jsonl")[-1]["eval_loss/text"]


@pytest.mark.slow
def test_the_final_loss_is_that_of_a_clean_run_within_noise(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    """Noise: the standard deviation of the final held-out loss over seeds."""
    clean, *others = (
        final_loss(one_rank, long_config(tiny_data, seed, saves=False), tmp_path / str(seed), {})
        for seed in (3, 4, 5, 6)
    )
    noise = statistics.stdev([clean, *others])
    assert noise < 0.02 * clean  # of what is learnt
    cases = {
        "skips": {18: NAN, 22: 1000.0},
        "back": {26: NAN, 27: 1000.0, 28: NAN},
    }
    for name, factors in cases.items():
        loss = final_loss(one_rank, long_config(tiny_data), tmp_path / name, factors)
        assert loss != clean
        assert abs(loss - clean) < 2 * noise, (name, loss, clean, noise)
    config = long_config(tiny_data, on_disagreement="rewind", replicas_every_steps=3)
    config.parallel.zero_stage = 0
    (loss, _) = run_world(loss_with_a_flipped_bit, 2, config, tmp_path / "flipped")
    assert abs(loss - clean) < 2 * noise, (loss, clean, noise)


# ---- limits and keys ----


@pytest.mark.fast
def test_limits_by_hand() -> None:
    seen = [2.0, 2.1, 2.5, 2.2, 1.9]  # median 2.1; deviations 0.1, 0, 0.4, 0.1, 0.2: median 0.1
    assert highest_loss(seen, 10.0) == pytest.approx(3.1)
    assert highest_loss([2.0, 2.0, 2.0], 10.0) == pytest.approx(2.2)  # at least 1 % of 2
    assert highest_norm(seen, 10.0) == pytest.approx(21.0)
    assert MOMENTS == ("exp_avg", "exp_avg_sq")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spike_factor", 1.0),
        ("spike_factor", math.nan),
        ("window", 0),
        ("max_skips", -1),
        ("max_skips", 100),
        ("max_rewinds", -1),
        ("replicas_every_steps", 0),
        ("on_disagreement", "ignore"),
    ],
)
def test_senseless_keys_are_named(key: str, value: Any) -> None:
    config = HealthConfig()
    check_health(config)
    setattr(config, key, value)
    with pytest.raises(ValueError, match=rf"^health\.{key}="):
        check_health(config)
