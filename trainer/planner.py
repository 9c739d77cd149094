"""What a run will need and how long it will take, before a GPU is busy.

Everything is counted from the configuration: operations by trainer/flops.py, memory by
trainer/memory.py, exchanged bytes by what docs/parallelism.md says is sent. Times are those counts
over rates, which are assumptions (`Assumptions`), measured for one chip and scaled to the others;
docs/planner.md holds them against measured steps.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fulmen.trainer.coca_memory import coca_moments
from fulmen.trainer.coca_work import captioner_flops, captioner_moved, embeddings_sent
from fulmen.trainer.config import RunConfig
from fulmen.trainer.flops import count_passes_by_part, forward_flops, training_flops
from fulmen.trainer.gathers import Key, count_gathers
from fulmen.trainer.memory import (
    FP32,
    GIB,
    Unit,
    add_margin,
    count_model,
    find_peak,
    frozen_of,
    host_bytes,
    list_units,
    lowest_trained,
    tower_trains,
)
from fulmen.trainer.passes import Passes, count_passes
from fulmen.trainer.schedule import batch_sizes, batch_tokens
from fulmen.trainer.sizes import Sizes, compute_bytes, sizes_of
from fulmen.trainer.stages import Stage, fault_of, list_stages, run_tokens
from fulmen.trainer.tower_memory import documents_in, last_products, tower_moved

NODE = 8
"""GPUs joined by NVLink."""
OVERLAP = 4
"""Exponent of the smooth maximum of a GPU's time and the host's: 1 would be one after the other.
From steps of 16K to 64K tokens of text01_1b on an H200 (docs/planner.md)."""
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Gpu:
    """Data sheets' figures of one chip."""

    usable_gib: float
    """What CUDA reports as its memory."""
    tflops: float
    """Dense bf16."""
    fp32_tflops: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    """One direction."""


GPUS = {
    "h100": Gpu(79.1, 989, 67, 3350, 450),
    "h200": Gpu(139.8, 989, 67, 4800, 450),
    "h800": Gpu(79.1, 989, 67, 3350, 200),
    "h20": Gpu(95.1, 148, 44, 4000, 450),
    "a100": Gpu(79.1, 312, 19.5, 2039, 300),
}
_NAMES = [("H100 80GB", "h100"), ("H200", "h200"), ("H800", "h800"), ("H20", "h20")]
_NAMES += [("A100-SXM4-80GB", "a100")]
_OTHERS = (" MIG ", " NVL", " PCIe")
"""Slices, and slower chips of the same names."""


def find_gpu(device_name: str) -> Gpu | None:
    """The chip that a device's name stands for, if it is in the table."""
    if any(part in device_name for part in _OTHERS):
        return None
    return next((GPUS[gpu] for part, gpu in _NAMES if part in device_name), None)


@dataclass
class Assumptions:
    """Rates that times are made of; shares are of the data sheet's figure."""

    matmul_share: float = 0.69
    """Plain matrix products: 680 of 989 TFLOP/s (H200, Text-01's shapes)."""
    grouped_share: float = 0.55
    """Experts: 537 to 564 of 989 TFLOP/s."""
    softmax_share: float = 0.53
    """Softmax attention: 520 of 989 TFLOP/s."""
    fp32_share: float = 0.6
    """The router's product; not measured."""
    memory_share: float = 0.8
    """Norms, activations, permutations, optimiser: 3.8 to 4.3 of 4.8 TB/s."""
    lightning_share: float = 0.49
    """The lightning core: 2.34 of 4.8 TB/s, forward + backward."""
    nvlink_share: float = 0.7
    """Collectives inside a node; not measured here."""
    network_gb_per_s: float = 50.0
    """Of each GPU, in one direction, between nodes: 400 Gbit/s."""
    network_share: float = 0.7
    """Collectives between nodes; not measured here."""
    host_gb_per_s: float = 50.0
    """Of each GPU, to and from pinned host memory, in one direction; not measured."""
    hidden_share: float = 0.8
    """ZeRO's exchanges run beside work, up to this share of its time; not measured at scale."""
    host_ms_per_layer: float = 14.6
    """Launches from Python, for each layer and micro-batch, whatever its size: 113 to 136 ms for
    the 8 layers of text01_1b, from machine to machine."""


@dataclass(frozen=True)
class Step:
    """One optimiser step as predicted."""

    micro_batches: int
    seconds: float
    tokens: int
    mfu: float | None
    """As the trainer counts it; None in fp32, as there."""
    work_s: dict[str, float]
    """Time of a GPU by kind, whether something else bounds it or not."""
    exchange_gb: dict[str, float]
    """Gigabytes that come to one rank, by kind."""
    exchange_s: dict[str, float]
    host_s: float


def micro_batches(config: RunConfig, gpus: int, batch: int) -> int:
    """Of one rank in a step."""
    dp = gpus // config.parallel.cp
    return batch // (config.trainer.micro_batch_tokens * dp)


def step_flops(config: RunConfig, batch: int) -> float:
    """Operations of a step as the trainer's MFU counts them, if one document fills each row, all
    of it images where the model sees, and none of the experts drops any."""
    model = config.model
    return training_flops(
        model,
        num_tokens=batch,
        num_assignments=batch * model.num_experts_per_token * model.num_layers,
        **documents_in(model, batch, config.data.seq_len),
        passes=passes_by_part(config),
    )


def passes_by_part(config: RunConfig) -> dict[str, float]:
    """Forward passes' worth of each part that frozen parameters leave: of all 3."""
    return count_passes_by_part(count_model(config.model).shapes, frozen_of(config))


def predict_step(config: RunConfig, gpus: int, gpu: Gpu, assume: Assumptions, batch: int) -> Step:
    """Time of a step of `batch` tokens over all ranks."""
    count = micro_batches(config, gpus, batch)
    units, gathers = list_units(config, gpus), count_gathers(config, count)
    work = {kind: count * s for kind, s in _micro_batch_work(config, gpu, assume).items()}
    bandwidth = gpu.memory_gb_per_s * 1e9 * assume.memory_share
    work["optimiser"] = sum(40 * unit.trained_shard for unit in units) / bandwidth
    work["casts"] = sum(_cast_bytes(unit, count, gathers) for unit in units) / bandwidth
    exchanges = list(_exchanges(config, units, count, gathers))
    exchange_gb: dict[str, float] = {}
    exchange_s: dict[str, float] = {}
    for kind, size, members, stride in exchanges:
        rate = _rate(gpu, assume, members, stride, spreads=kind != "ZeRO")
        exchange_gb[kind] = exchange_gb.get(kind, 0) + size / 1e9
        exchange_s[kind] = exchange_s.get(kind, 0) + size / rate
    busy = sum(work.values())
    zero = exchange_s.get("ZeRO", 0.0)
    shown = max(0.0, zero - assume.hidden_share * busy) + sum(exchange_s.values()) - zero
    if host_bytes(config):
        # Out and back on a stream of their own, beside all other work.
        exchange_gb["host memory"] = 2 * count * host_bytes(config) / 1e9
        exchange_s["host memory"] = exchange_gb["host memory"] / assume.host_gb_per_s
        shown += max(0.0, exchange_s["host memory"] - busy)
    launches = count_passes(config).launches * count * config.model.num_layers
    host = launches * assume.host_ms_per_layer / 1e3
    # Neither is wholly beside the other: parts of a step wait for launches, others let them wait.
    seconds = ((busy + shown) ** OVERLAP + host**OVERLAP) ** (1 / OVERLAP)
    mfu = None
    if compute_bytes(config) == 2:
        mfu = step_flops(config, batch) / (seconds * gpus * gpu.tflops * 1e12)
    return Step(count, seconds, batch, mfu, work, exchange_gb, exchange_s, host)


def _micro_batch_work(config: RunConfig, gpu: Gpu, assume: Assumptions) -> dict[str, float]:
    """Seconds of one rank by kind of work, forward, backward and what is computed again."""
    model, s = config.model, sizes_of(config)
    peak = gpu.tflops * 1e12 if s.e == 2 else gpu.fp32_tflops * 1e12
    passes, trained = count_passes(config), passes_by_part(config)
    bandwidth, matmul_rate = gpu.memory_gb_per_s * 1e9, peak * assume.matmul_share
    if model.coca is not None:
        parts = captioner_flops(config, trained).items()
        moved = captioner_moved(config) / (bandwidth * assume.memory_share)
        work = {kind.replace("_", " "): operations / matmul_rate for kind, operations in parts}
        return work | {"memory-bound ops": moved}
    flops = forward_flops(
        model,
        num_tokens=s.T,
        num_assignments=s.rows // s.etp * model.num_layers,
        **documents_in(model, s.T, config.data.seq_len),
    )
    # Of passes that frozen parts do without.
    less = {part: 3 - trained.get(part, 3) for part in flops}
    # Layers below all that trains have no backward pass, and so no second one.
    share = 1 - lowest_trained(config) / model.num_layers
    lightning = model.num_layers - model.num_softmax_layers
    core_bytes = lightning * s.e * s.T * s.i * (4 + share * (passes.lightning_tensors - 4))
    projections = sum(
        (3 - less[part] + share * (passes.projections - 3)) * flops[part]
        for part in ("softmax_projections", "lightning_projections")
    )
    seeing, moved = {}, _moved_bytes(config, s, passes, share)
    if model.vision is not None:
        trains, tiles = tower_trains(config), s.T / model.vision.tiling.patches_per_tile
        moved += tower_moved(config, tiles, trains=trains)
        tower = (3 - less["vision_tower"]) * flops["vision_tower"]
        if trains and config.trainer.activation_checkpointing == "full":
            tower += flops["vision_tower"] - last_products(model.vision, tiles)
        tower += (3 - less["projector"]) * flops["projector"]
        seeing = {"vision tower": tower / matmul_rate}
    return seeing | {
        "projections": projections / matmul_rate,
        # Document by document, logits are formed forward and once more backward.
        "head": (3 + (config.objective == "preference") - less["head"])
        * flops["head"]
        / matmul_rate,
        "experts": (3 - less["experts"] + share * (passes.experts - 3))
        * flops["experts"]
        / (peak * assume.grouped_share),
        "router": (3 - less["router"] + share * (passes.experts - 3))
        * flops["router"]
        / (gpu.fp32_tflops * 1e12 * assume.fp32_share),
        "softmax core": (passes.softmax_core - less["softmax_core"] * (passes.softmax_core - 1) / 2)
        * flops["softmax_core"]
        / (peak * assume.softmax_share),
        "lightning core": core_bytes / (bandwidth * assume.lightning_share),
        "memory-bound ops": moved / (bandwidth * assume.memory_share),
    }


def _moved_bytes(config: RunConfig, s: Sizes, passes: Passes, share: float) -> float:
    """Of ops that are bound by memory: each input read once, each output written once; a `share` of
    the layers has a backward pass.

    Forward and backward numbers a token: norm 2 h + 3 h, deepnorm 3 h + 5 h, residual sum 5 h + 2
    h, router's cast 3 h + 3 h; SiLU 6 i + 9 i and gated norm 3 i + 5 i; RoPE 2 (i + v) each way;
    permutation h + k h each way, weighted sum k h + h and h + 2 k h. Sums of gradients, 3 h each:
    of attention's input by products (softmax has one more) and residual, of the experts' by router
    and residual. A row: SwiGLU 3 f + 6 f, sum of gradients 3 h.
    """
    again = 1 + share * (passes.attention_ops - 1)
    softmax = config.model.num_softmax_layers
    lightning = config.model.num_layers - softmax
    # Both norms belong to the attention half.
    of_experts = s.T * (2 + 2 * s.k) * s.h + 3 * s.rows * s.f // s.etp
    forward = (again * 5 + 5 + 3 * (1 + share * (passes.casts - 1))) * s.T * s.h
    forward += (1 + share * (passes.expert_ops - 1)) * of_experts
    backward = s.T * (27 + 3 * s.k) * s.h + 6 * s.rows * s.f // s.etp + 3 * s.rows * s.h
    blocks = config.model.num_layers * (forward + share * backward)
    blocks += lightning * s.T * s.i * (9 * again + share * 14)
    blocks += softmax * s.T * (2 * (s.i + s.v) * (again + share) + 3 * s.h * share)
    return s.e * blocks


def _cast_bytes(unit: Unit, count: int, gathers: Mapping[Key, int]) -> int:
    """Of gathering a unit's weights into copies and its gradients into fp32 buffers, in a step."""
    gathered, reductions = _times(unit, count, gathers)
    accumulated = 0 if unit.stage >= 2 else (count - 1) * unit.trained_whole
    accumulated *= unit.copy_bytes + 2 * FP32
    return (
        gathered * (FP32 * unit.shard + 3 * unit.copy_bytes * unit.whole)
        + reductions * (unit.copy_bytes + 2 * FP32) * unit.trained_whole
        + accumulated
    )


def _times(unit: Unit, count: int, gathers: Mapping[Key, int]) -> tuple[int, int]:
    """How often a unit's weights are gathered and its gradients reduced in a step."""
    gathered = gathers[unit.layer, unit.name] if unit.stage == 3 else 1
    return gathered, (count if unit.stage >= 2 else 1)


Exchange = tuple[str, float, int, int]
"""Kind, bytes that come to a rank in a step, ranks of the group, distance between neighbours."""


def _exchanges(
    config: RunConfig, units: list[Unit], count: int, gathers: Mapping[Key, int]
) -> Iterator[Exchange]:
    s, model, parallel = sizes_of(config), config.model, config.parallel
    split = parallel.ep * parallel.etp
    for unit in units:
        gathered, reductions = _times(unit, count, gathers)
        others = unit.ranks - 1
        if unit.stage == 0:
            # An all-reduce: scatter and gather.
            size = 2 * FP32 * unit.trained_whole * others / unit.ranks
        else:  # padded: each rank sends as much as the one with most
            size = gathered * unit.copy_bytes * unit.shard * others
            size += reductions * FP32 * unit.trained_shard * others
        yield "ZeRO", size, unit.ranks, split if unit.name == "experts" else 1
    if model.coca is not None:
        gpus = units[0].ranks
        yield "embeddings", 2 * count * (gpus - 1) * embeddings_sent(config), gpus, 1
        return
    passes = count_passes(config)
    lightning = model.num_layers - model.num_softmax_layers
    rows = s.rows // s.etp * s.h * s.e  # of one exchange
    layers = count * model.num_layers
    if parallel.ep > 1:
        size = layers * 2 * passes.rows * rows * (parallel.ep - 1) / parallel.ep
        yield "rows to experts", size, parallel.ep, parallel.etp
    if parallel.etp > 1:
        yield "rows over etp", layers * 2 * passes.rows * rows * (parallel.etp - 1), parallel.etp, 1
    if parallel.cp > 1:
        others = parallel.cp - 1
        keys = others * s.T * 2 * s.v * (s.e * (passes.keys - 1) + FP32)
        yield "keys and values", count * model.num_softmax_layers * keys, parallel.cp, 1
        if s.away:  # queries there and outputs home, and their gradients
            queries = s.away * 2 * s.i * s.e * passes.keys
            yield "queries", count * model.num_softmax_layers * queries, parallel.cp, 1
        if model.vision is not None:  # at most: of a rank's tokens many show its own tiles
            size = count * 2 * s.T * model.vision.hidden_size * s.e * others / parallel.cp
            yield "patches", size, parallel.cp, 1
        states = others * FP32 * s.state * passes.states
        yield "lightning states", count * lightning * states, parallel.cp, 1


def _rate(gpu: Gpu, assume: Assumptions, members: int, stride: int, *, spreads: bool) -> float:
    """Bytes a second that come to a rank of a group.

    Between nodes, gathers and reductions bring a node the same bytes for all of its ranks, which
    share them by NVLink; where each rank's rows are its own (`spreads`), those of other nodes come
    by its own link.
    """
    nvlink = gpu.nvlink_gb_per_s * 1e9 * assume.nvlink_share
    network = assume.network_gb_per_s * 1e9 * assume.network_share
    together = min(members, max(1, NODE // stride))  # in one node
    if members == together and (members - 1) * stride < NODE:
        return nvlink
    if not spreads:
        return min(nvlink, together * network)
    away = (members - together) / (members - 1)
    return 1 / (away / network + (1 - away) / nvlink)


@dataclass(frozen=True)
class Interval:
    """A part of the schedule with one batch size."""

    from_tokens: int
    tokens: float
    steps: float
    step: Step


def predict_schedule(
    config: RunConfig, gpus: int, gpu: Gpu, assume: Assumptions, *, tokens: int, steps: float
) -> list[Interval]:
    """A stage's schedule, an entry for each batch size that it comes to.

    It ends after `tokens` or `steps`, whichever comes first.
    """
    starts = [0, *(ramp.from_tokens for ramp in config.schedule.batch_ramp)]
    starts = [start for start in starts if start < tokens]
    intervals: list[Interval] = []
    for start, stop in itertools.pairwise([*starts, tokens]):
        if steps <= 0:
            break
        batch = batch_tokens(config, start)
        count = min((stop - start) / batch, steps)
        steps -= count
        step = predict_step(config, gpus, gpu, assume, batch)
        intervals.append(Interval(start, count * batch, count, step))
    return intervals


@dataclass(frozen=True)
class StagePlan:
    """All that is said about a stage on a number of GPUs of one kind."""

    name: str
    config: RunConfig
    """Of the stage."""
    gpus: int
    usable_gib: float
    memory: dict[str, int]
    """Bytes by part, with the margin."""
    first: Step
    intervals: list[Interval]
    """Empty if the run ends before the stage."""

    @property
    def memory_gib(self) -> float:
        """Of one rank, with the margin."""
        return sum(self.memory.values()) / GIB

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough."""
        return self.memory_gib <= self.usable_gib

    @property
    def seconds(self) -> float:
        """Of the stage's schedule."""
        return sum(interval.steps * interval.step.seconds for interval in self.intervals)

    @property
    def tokens(self) -> float:
        """Of the stage's schedule."""
        return sum(interval.tokens for interval in self.intervals)


@dataclass(frozen=True)
class Plan:
    """All that is said about a run."""

    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough for each stage."""
        return all(stage.fits for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages)


def predict_memory(config: RunConfig, gpus: int) -> dict[str, int]:
    """Bytes by part of a rank's peak, over the batch sizes of the schedule, with the margin."""
    most = max(micro_batches(config, gpus, size) for size in batch_sizes(config))
    if config.model.coca is not None:
        return add_margin(
            max(coca_moments(config, gpus, most), key=lambda parts: sum(parts.values()))
        )
    return add_margin(find_peak(config, gpus, most))


def plan_stage(
    stage: Stage, gpus: int, gpu: Gpu, assume: Assumptions, *, tokens: int, steps: float
) -> StagePlan:
    """The plan of a stage of at most so many tokens and steps."""
    config = stage.config
    return StagePlan(
        stage.name,
        config,
        gpus,
        gpu.usable_gib,
        predict_memory(config, gpus),
        predict_step(config, gpus, gpu, assume, config.data.global_batch_tokens),
        predict_schedule(config, gpus, gpu, assume, tokens=tokens, steps=steps),
    )


def make_plan(config: RunConfig, gpus: int, gpu: Gpu, assume: Assumptions) -> Plan:
    """The plan of a checked configuration: of all stages that so many processes can run."""
    end = run_tokens(config)
    steps: float = config.trainer.max_steps or math.inf
    stages = []
    for stage in list_stages(config):
        if fault_of(stage, gpus):
            continue
        tokens = min(stage.end, end) - stage.start
        stages.append(plan_stage(stage, gpus, gpu, assume, tokens=tokens, steps=steps))
        steps -= sum(interval.steps for interval in stages[-1].intervals)
    return Plan(stages)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; a step's figures beside `stages` are those of the first stage."""
    stages = [describe_stage(stage) for stage in plan.stages]
    first, gpus = plan.stages[0], plan.stages[0].gpus
    units = list_units(first.config, gpus)
    count = count_model(first.config.model)
    return {
        "gpus": gpus,
        "total_params": count.total,
        "active_params": count.active,
        "params_per_rank": {
            "dense": sum(unit.shard for unit in units if unit.name != "experts"),
            "experts": sum(unit.shard for unit in units if unit.name == "experts"),
        },
        "usable_gib": first.usable_gib,
        **{key: value for key, value in stages[0].items() if key not in ("name", "batches")},
        "fits": plan.fits,
        "tokens": sum(stage.tokens for stage in plan.stages),
        "days": plan.seconds / SECONDS_PER_DAY,
        "gpu_hours": gpus * plan.seconds / 3600,
        "stages": stages,
    }


def describe_stage(stage: StagePlan) -> dict[str, Any]:
    """A stage as JSON; a step's figures are those of its first batch size."""
    config, first = stage.config, stage.first
    parts = {name: round(size / GIB, 3) for name, size in stage.memory.items()}
    return {
        "name": stage.name or "schedule",
        "objective": config.objective,
        "seq_len": config.data.seq_len,
        "rope_theta": config.model.rope_theta,
        "global_batch_tokens": first.tokens,
        "parallel": dataclasses.asdict(config.parallel),
        "memory_gib_per_rank": {"total": round(stage.memory_gib, 3), **parts},
        "host_gib_per_rank": round(host_bytes(config) / GIB, 3),
        "fits": stage.fits,
        "flops_per_token": step_flops(config, 1),
        "flops_by_kind_per_token": _flops_by_kind(config),
        "step_time_s": first.seconds,
        "step_work_s": first.work_s,
        "step_exchange_gb_per_rank": first.exchange_gb,
        "step_exchange_s": first.exchange_s,
        "step_host_s": first.host_s,
        "mfu": first.mfu,
        "tokens_per_day": first.tokens / first.seconds * SECONDS_PER_DAY,
        "tokens": stage.tokens,
        "days": stage.seconds / SECONDS_PER_DAY,
        "gpu_hours": stage.gpus * stage.seconds / 3600,
        "batches": [
            {
                "from_tokens": interval.from_tokens,
                "global_batch_tokens": interval.step.tokens,
                "micro_batches": interval.step.micro_batches,
                "steps": round(interval.steps),
                "step_time_s": interval.step.seconds,
                "mfu": interval.step.mfu,
                "tokens_per_day": interval.step.tokens / interval.step.seconds * SECONDS_PER_DAY,
                "days": interval.steps * interval.step.seconds / SECONDS_PER_DAY,
            }
            for interval in stage.intervals
        ],
    }


def _flops_by_kind(config: RunConfig) -> dict[str, float]:
    """Forward and backward."""
    model = config.model
    parts = forward_flops(
        model,
        num_tokens=1,
        num_assignments=model.num_experts_per_token * model.num_layers,
        **documents_in(model, 1, config.data.seq_len),
    )
    passes = passes_by_part(config)
    return {kind: passes.get(kind, 3) * flops for kind, flops in parts.items()}
