"""Whole runs on many meshes equal one process; checkpoints go from any mesh to any other."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import read_checkpoint, tiny_config
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.data.packing import PackedBatch
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import EVAL_PREFIX, read_metrics
from fulmen.trainer.weights import CheckpointWeights

SEQ_LEN = 64
STAGES = list(itertools.product(range(4), range(4)))
"""(dense, expert)."""


@dataclass(frozen=True)
class Point:
    """One mesh of the grid, with ZeRO stages."""

    size: int
    cp: int
    ep: int
    etp: int
    stages: tuple[int, int]
    checkpointing: str = "none"

    @property
    def parallel(self) -> ParallelConfig:
        dense, expert = self.stages
        return ParallelConfig(self.cp, self.ep, self.etp, 2, dense, expert)

    def __str__(self) -> str:
        dense, expert = self.stages
        return f"{self.size}-cp{self.cp}-ep{self.ep}-etp{self.etp}-zero{dense}{expert}"


SAMPLE = [
    Point(2, 2, 1, 2, (2, 0)),
    Point(2, 2, 2, 1, (3, 3), "full"),
    Point(4, 2, 4, 1, (0, 3)),
    Point(4, 2, 2, 2, (1, 2), "full"),
    Point(4, 4, 2, 1, (3, 1)),
]
_STAGES = itertools.cycle(STAGES)
GRID = [
    Point(size, cp, ep, etp, next(_STAGES))
    for size, cp, ep, etp in itertools.product((2, 4, 8), (1, 2, 4), (1, 2, 4), (1, 2))
    if size % cp == 0 and size % (ep * etp) == 0
]


def config_of(data: Path, parallel: ParallelConfig, *, steps: int) -> RunConfig:
    config = tiny_config(data, max_steps=steps)
    config.data.seq_len = config.trainer.micro_batch_tokens = SEQ_LEN
    config.data.global_batch_tokens = 8 * SEQ_LEN
    config.parallel = parallel
    config.log.every_steps = 1
    config.evaluation.every_steps = 3
    config.evaluation.max_tokens = 150  # three rows: some ranks get a row of padding alone
    return config


def train(device: torch.device, configs: list[RunConfig], folder: Path) -> list[list[dict]]:
    """The rows of the metrics of each run."""
    results = []
    for number, config in enumerate(configs):
        run_dir = folder / str(number)
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
        try:
            trainer.fit()
        finally:
            trainer.close()
        results.append(read_metrics(run_dir / "metrics.jsonl"))
    return results


def curves(rows: list[dict]) -> dict[str, list[float]]:
    keys = ("loss", "grad_norm", "aux_loss", f"{EVAL_PREFIX}text", "expert_imbalance")
    return {key: [row[key] for row in rows if key in row] for key in keys}


def assert_same_curves(got: list[dict], want: list[dict], where: object) -> None:
    for key, values in curves(want).items():
        assert values, key
        assert curves(got)[key] == pytest.approx(values, rel=1e-5), f"{where}: {key}"


def train_alone(data: Path, folder: Path, steps: int) -> list[dict]:
    rows = run_world(train, 1, [config_of(data, ParallelConfig(), steps=steps)], folder)[0][0]
    assert len(curves(rows)["loss"]) == steps
    return rows


@pytest.fixture(scope="module")
def one_process(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train_alone(tiny_data, tmp_path_factory.mktemp("one"), 4)


@pytest.fixture(scope="module")
def one_process_for_long(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train_alone(tiny_data, tmp_path_factory.mktemp("long"), 20)


def check_points(
    points: list[Point], data: Path, folder: Path, one_process: list[dict], steps: int
) -> None:
    want = [row for row in one_process if row["step"] <= steps]
    for size, group in itertools.groupby(points, lambda point: point.size):
        mine = list(group)
        configs = [config_of(data, point.parallel, steps=steps) for point in mine]
        for config, point in zip(configs, mine, strict=True):
            config.trainer.activation_checkpointing = point.checkpointing
            check_config(config, size)
        by_rank = run_world(train, size, configs, folder / str(size), timeout_s=900)
        for point, got in zip(mine, by_rank[0], strict=True):
            assert_same_curves(got, want, point)


@pytest.mark.slow
def test_a_sample_of_the_grid_equals_one_process(
    tiny_data: Path, tmp_path: Path, one_process: list[dict]
) -> None:
    check_points(SAMPLE, tiny_data, tmp_path, one_process, 3)


@pytest.mark.mesh
@pytest.mark.parametrize(
    "points",
    [GRID[i : i + 4] for i in range(0, len(GRID), 4)],
    ids=lambda points: f"{points[0]}-and-on",
)
def test_the_grid_equals_one_process(
    points: list[Point], tiny_data: Path, tmp_path: Path, one_process_for_long: list[dict]
) -> None:
    check_points(points, tiny_data, tmp_path, one_process_for_long, 20)


@pytest.mark.slow
def test_the_rows_have_documents_of_every_kind(tiny_data: Path, tmp_path: Path) -> None:
    bounds = run_world(row_bounds, 1, config_of(tiny_data, ParallelConfig(), steps=6), tmp_path)[0]
    lengths = {b - a for row in bounds for a, b in itertools.pairwise(row)}
    assert 1 in lengths
    assert max(lengths) > SEQ_LEN * 3 // 4  # longer than all ranks but one
    inner = {bound for row in bounds for bound in row} - {0, SEQ_LEN}
    assert any(bound % (SEQ_LEN // 4) == 0 for bound in inner)
    assert any(bound % (SEQ_LEN // 4) for bound in inner)


def row_bounds(device: torch.device, config: RunConfig, run_dir: Path) -> list[list[int]]:
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    batches = [next(trainer.loader) for _ in range(6)]
    trainer.close()
    return [micro.cu_seqlens.tolist() for batch in batches for micro in batch.micro_batches]


@pytest.mark.slow
def test_bf16_stays_within_its_rounding(
    tiny_data: Path, tmp_path: Path, one_process: list[dict]
) -> None:
    config = config_of(tiny_data, ParallelConfig(ep=2, etp=2), steps=4)
    config.trainer.dtype = "bfloat16"
    (got,) = run_world(train, 4, [config], tmp_path)[0]
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 3e-2)):
        want = curves(one_process)[key][:4]
        assert curves(got)[key] == pytest.approx(want, rel=tolerance)
        assert curves(got)[key] != want


@pytest.mark.slow
def test_a_rank_holds_its_experts_alone(tiny_data: Path, tmp_path: Path) -> None:
    meshes = [(ep, etp, stage) for ep, etp in ((2, 1), (1, 2), (2, 2)) for stage in (0, 1, 3)]
    configs = [
        config_of(tiny_data, ParallelConfig(1, ep, etp, 2, 1, stage), steps=1)
        for ep, etp, stage in meshes
    ]
    for held in run_world(held_of_experts, 4, configs, tmp_path):
        assert held == [1 / (ep * etp if stage == 0 else 4) for ep, etp, stage in meshes]


def held_of_experts(
    device: torch.device, configs: list[RunConfig], run_dir: Path
) -> list[float | None]:
    """The share of every expert parameter and its moments that this rank has, if it is one."""
    shares = []
    for config in configs:
        trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
        held = {
            tensor.to_local().numel() / tensor.numel()
            for name, tensor in trainer._tensors().items()
            if isinstance(tensor, DTensor) and ".experts." in name
        }
        shares.append(held.pop() if len(held) == 1 else None)
        trainer.close()
    return shares


# ---- with a capacity ----

CAPACITY = [(ParallelConfig(ep=2, etp=2), False), (ParallelConfig(cp=2, ep=2, etp=2), True)]


@pytest.mark.slow
def test_a_capacity_drops_the_same_on_any_mesh_of_experts(tiny_data: Path, tmp_path: Path) -> None:
    configs = []
    for parallel, is_global in CAPACITY:
        for axes in (parallel, ParallelConfig(cp=parallel.cp)):
            config = config_of(tiny_data, axes, steps=3)
            config.moe.capacity_factor, config.moe.global_router = 0.9, is_global
            config.moe.aux_loss_scope = "global" if is_global else "micro_batch"
            configs.append(config)
    spread, whole, shared, shared_whole = run_world(train, 4, configs, tmp_path)[0]
    for got, want in ((spread, whole), (shared, shared_whole)):
        assert_same_curves(got, want, "capacity")
        drops = [[row["drop_rate"] for row in rows if "loss" in row] for rows in (got, want)]
        assert drops[0] == drops[1]
        assert all(0 < rate < 0.5 for rate in drops[0])


@pytest.mark.slow
def test_a_global_auxiliary_loss_is_as_large_as_a_local_one(
    tiny_data: Path, tmp_path: Path
) -> None:
    # Four rows at once on one rank are balanced like one row on each of four, but packed otherwise.
    config = config_of(tiny_data, ParallelConfig(ep=2), steps=1)
    config.moe.aux_loss_scope = "global"
    ((got,),) = (curves(r)["aux_loss"] for r in run_world(train, 4, [config], tmp_path / "4")[0])
    config = config_of(tiny_data, ParallelConfig(), steps=1)
    config.trainer.micro_batch_tokens = 4 * SEQ_LEN
    ((want,),) = (curves(r)["aux_loss"] for r in run_world(train, 1, [config], tmp_path / "1")[0])
    assert got == pytest.approx(want, rel=0.02)


# ---- a gradient that is not finite ----


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(ep=2), ParallelConfig(etp=2, zero_stage=0)])
def test_every_rank_stops_at_one_that_is_not_finite(
    parallel: ParallelConfig, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_data, parallel, steps=4)
    config.health.enabled = False  # else the step is skipped: tests/trainer/test_health.py
    told = run_world(poisoned, 2, config, tmp_path)
    assert told[0] == told[1]
    assert told[0].startswith("the gradient norm of step 2 is nan")


def poisoned(device: torch.device, config: RunConfig, run_dir: Path) -> str:
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    loss = trainer.objective.loss

    def poison(batch: PackedBatch) -> Tensor:
        bad = trainer.step == 1 and trainer.mesh.rank == 1
        return loss(batch) * torch.nan if bad else loss(batch)

    trainer.objective.loss = poison  # type: ignore[method-assign]
    try:
        trainer.fit()
    except FloatingPointError as error:
        return str(error)
    finally:
        trainer.close()
    return "it went on"


@pytest.mark.slow
def test_one_bad_part_of_a_gradient_is_seen_by_all(tiny_data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_data, ParallelConfig(ep=2, etp=2, zero_stage=0), steps=1)
    for norms in run_world(norms_with_a_bad_part, 4, config, tmp_path):
        assert all(math.isnan(norm) for norm in norms[:4])
        assert norms[4] == 0


def norms_with_a_bad_part(device: torch.device, config: RunConfig, run_dir: Path) -> list[float]:
    """The norm of a gradient with a bad part on rank 0, on rank 1, and so on; last with none."""
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    norms = []
    for bad_rank in range(5):
        for name, parameter in trainer.engine.parameters.items():
            parameter.grad = torch.zeros_like(parameter)
            if name.endswith("1.block_sparse_moe.experts.w2") and trainer.mesh.rank == bad_rank:
                local = parameter.grad
                assert isinstance(local, DTensor)
                local.to_local()[0, 0, 0] = torch.nan
        norms.append(trainer.engine.clip_grad_norm(1.0).item())
    trainer.close()
    return norms


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_sum_over_ranks_of_the_norm_matters(
    broken: bool, tiny_data: Path, tmp_path: Path, one_process: list[dict]
) -> None:
    config = config_of(tiny_data, ParallelConfig(ep=2), steps=2)
    config.health.enabled = False  # it would find that ranks have other numbers
    norms = curves(run_world(train_broken, 2, config, tmp_path, broken)[0])["grad_norm"]
    assert (norms == pytest.approx(curves(one_process)["grad_norm"][:2], rel=1e-5)) != broken


def train_broken(device: torch.device, config: RunConfig, folder: Path, broken: bool) -> list[dict]:
    if broken:
        clip = ZeroEngine.clip_grad_norm

        def clip_alone(engine: ZeroEngine, *args: Any) -> Tensor:
            all_reduce, dist.all_reduce = dist.all_reduce, lambda *_, **__: None
            try:
                return clip(engine, *args)
            finally:
                dist.all_reduce = all_reduce

        ZeroEngine.clip_grad_norm = clip_alone  # type: ignore[method-assign]
    return train(device, [config], folder)[0]


# ---- checkpoints ----

WRITTEN_ON = (4, ParallelConfig(cp=2, ep=2, zero_stage=2))
READ_ON = [
    (1, ParallelConfig(zero_stage=1)),
    (4, ParallelConfig(ep=4, zero_stage=1)),
    (2, ParallelConfig(etp=2, zero_stage=0)),
    (4, ParallelConfig(ep=2, etp=2, cp=2, zero_stage=3, expert_zero_stage=1)),
    (4, ParallelConfig(ep=2, zero_stage=3)),
]


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_any_mesh(tiny_data: Path, tmp_path: Path) -> None:
    size, parallel = WRITTEN_ON
    config = config_of(tiny_data, parallel, steps=4)
    config.checkpoint.every_steps = 2
    (rows,) = run_world(train, size, [config], tmp_path / "written")[0]
    path = tmp_path / "written" / "0" / "checkpoints" / "step_2"
    stored = read_checkpoint(path)
    weights = CheckpointWeights(path)
    for name, tensor in stored.items():
        assert torch.isfinite(tensor).all(), name
        if name.startswith("model."):
            name = name.removeprefix("model.")
            groups = [weights.read(name, rows=rows) for rows in weights.row_groups(name)]
            assert torch.equal(torch.cat(groups), tensor)
    for size, parallel in READ_ON:
        config = config_of(tiny_data, parallel, steps=4)
        config.checkpoint.resume = str(path)
        folder = tmp_path / f"read-{size}-{parallel.ep}-{parallel.etp}-{parallel.zero_stage}"
        by_rank = run_world(load_and_train, size, config, folder)
        for loaded, _ in by_rank:
            assert_same_experts(loaded, stored)
        later = [row for row in rows if row["step"] > 2]
        assert len(curves(later)["loss"]) == 2
        assert_same_curves(by_rank[0][1], later, parallel)


def load_and_train(
    device: torch.device, config: RunConfig, run_dir: Path
) -> tuple[dict[str, Tensor], list[dict]]:
    """Every tensor as it was loaded, whole, and the metrics of the steps that followed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    assert trainer.step == 2
    whole = {
        name: tensor.full_tensor().clone()
        for name, tensor in trainer._tensors().items()
        if isinstance(tensor, DTensor)
    }
    trainer.fit()
    trainer.close()
    return whole, read_metrics(run_dir / "metrics.jsonl")


def assert_same_experts(loaded: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    assert {name.split(".")[0] for name in loaded} == {"model", "exp_avg", "exp_avg_sq"}
    assert loaded.keys() == {name for name in stored if not name.startswith("rng.")}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name]), name
        if ".experts." in name:
            for number, (ours, theirs) in enumerate(zip(tensor, stored[name], strict=True)):
                assert torch.equal(ours, theirs), f"{name}, expert {number}"
                assert ours.any(), f"{name}, expert {number}"
