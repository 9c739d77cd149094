"""Bytes that one rank's GPU holds in a training step, by part, before anything is allocated.

Parameters are those of the model on the meta device, in the ZeRO units of `parallel/plan.py` and
the shards of `parallel/zero.py`. Activations are the tensors that each op's backward pass keeps, on
the Triton path (tests/trainer/test_planner.py holds the list against torch's saved tensors). With T
tokens on a rank, h = hidden_size, i = heads * head_dim, v = key and value heads * head_dim, f =
expert_hidden_size, k choices, E experts, R rows that come to this rank's experts, all in the
compute type unless said:

| op                          | kept, numbers                                             |
|-----------------------------|-----------------------------------------------------------|
| norm of the input           | its input T h, fp32 inverse rms T                         |
| lightning: projections      | the norm's output T h (also deepnorm's residual)          |
| - SiLU                      | q k v before it 3 T i                                     |
| - core                      | q, k, v 3 T i; with cp an fp32 state heads * head_dim^2   |
| - gated norm                | the core's output T i, gate T i, fp32 inverse rms T       |
| - output projection         | gated norm's output T i                                   |
| softmax: projections        | the norm's output T h                                     |
| - core                      | q T i, k and v 2 T v (gathered: 2 cp T v), output T i,    |
|                             | fp32 log-sum-exp T heads                                  |
| deepnorm                    | the attention layer's output T h, fp32 inverse rms T      |
| router                      | fp32 copy of its input T h, fp32 probabilities T E,       |
|                             | fp32 weights T k, int64 experts and destinations 2 T k    |
| experts                     | their input R h, gate and up 2 R f / etp                  |
| weighted sum of the experts | the rows that came back T k h                             |
| last norm, model            | T h, fp32 T; int64 ids and labels 2 T; RoPE tables        |
| head and cross entropy      | gradients of both factors T h + V h                       |

Policies and chunks (parallel/checkpointing.py) keep less of a block, and the list comes and goes
with its second pass:

| policy, chunks   | kept, numbers                                                              |
|------------------|----------------------------------------------------------------------------|
| selective        | input T h; q k v before SiLU or RoPE 3 T i (T i, 2 T v), gate T i, core's   |
|                  | output T i, attention layer's output T h; deepnorm's output T h instead of  |
|                  | its fp32 copy; experts as above                                             |
| full             | input T h                                                                   |
| full in chunks   | input T h, deepnorm's output T h, probabilities, weights and experts;       |
|                  | softmax: output T i, fp32 log-sum-exp T heads; with cp what the core keeps  |
| none in chunks   | the same, and what the core keeps and puts out                              |

With offload the inputs, and deepnorm's outputs, lie in host memory, but for two at a time. In
chunks of c tokens the list's rows of an expert or a projection are those of c tokens.
The list of a vision tower and its projector is in trainer/tower_memory.py.

The peak is looked for at several moments of a step: in the head and at the reduction of its
gradient; in each block's backward pass in its experts, at the reduction of their gradients, and in
its attention layer; at the reduction of the embedding's gradient. Each adds what the passes hold
for themselves, and what ZeRO's reductions and gathers hold.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from math import ceil, prod

import torch

from fulmen.models.config import CoCaConfig, ModelConfig, MoEConfig, VisionConfig
from fulmen.models.text import count_active_parameters, count_parameters
from fulmen.models.vl import build_model
from fulmen.parallel.zero import expert_shard_dim
from fulmen.trainer.config import RunConfig
from fulmen.trainer.core_memory import core_inputs, core_outputs, softmax_work
from fulmen.trainer.groups import Settings, resolve_groups
from fulmen.trainer.head_memory import head_bytes
from fulmen.trainer.sizes import FP32, Sizes, compute_bytes, sizes_of
from fulmen.trainer.tower_memory import (
    captioner_inputs,
    count_tiles,
    tower_activations,
    tower_inputs,
    tower_work,
)

GIB = 2**30
INT64 = 8
CONTEXT_BYTES = int(1.5 * GIB)
"""CUDA context, libraries and NCCL's buffers: our choice, not measured for each machine."""
FRAGMENTATION = 0.04
"""Of the allocator's peak, for what it holds and cannot use: our choice."""


@dataclass(frozen=True)
class Unit:
    """One ZeRO unit as a rank has it."""

    layer: int
    """-1 for embedding, head, last norm and what sees."""
    name: str
    """dense, gate, experts; embed_tokens, lm_head, norm; see `_sees`."""
    stage: int
    ranks: int
    """That share it."""
    whole: int
    """Numbers when gathered on a rank."""
    shard: int
    """Numbers that the rank with most of them keeps."""
    trained_whole: int
    """Of `whole`, those that are not frozen."""
    trained_shard: int
    """Of `shard`, likewise."""
    copy_bytes: int
    """Of a gathered number."""


@dataclass(frozen=True)
class ModelCount:
    """What the meta-device model says."""

    total: int
    active: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Of every parameter, by name."""


@lru_cache(maxsize=4)
def _count(values: tuple) -> ModelCount:
    config = ModelConfig(*values)
    config.vision = values[-2] and VisionConfig(*values[-2])  # dataclasses inside are tuples too
    config.coca = values[-1] and CoCaConfig(*values[-1])
    with torch.device("meta"):
        model = build_model(config, MoEConfig())
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    return ModelCount(count_parameters(model), count_active_parameters(model), shapes)


def count_model(config: ModelConfig) -> ModelCount:
    """Parameters of a model of these shapes."""
    return _count(astuple(config))


def list_settings(config: RunConfig) -> dict[str, Settings]:
    """How each parameter trains, by name; `ValueError` for groups that do not fit the model."""
    return resolve_groups(config.optim, [name for name, _ in count_model(config.model).shapes])


def frozen_of(config: RunConfig) -> frozenset[str]:
    """Names of the parameters that do not train."""
    if not config.optim.groups:  # as the planner's search asks often
        return frozenset()
    return frozenset(name for name, one in list_settings(config).items() if one.frozen)


def tower_trains(config: RunConfig) -> bool:
    """Whether anything of a vision tower does, and so it has a backward pass."""
    frozen, names = frozen_of(config), (name for name, _ in count_model(config.model).shapes)
    return any(name.startswith("vision_tower.") and name not in frozen for name in names)


def lowest_trained(config: RunConfig) -> int:
    """The first layer that has a backward pass, and so keeps anything for it."""
    frozen = frozen_of(config)
    if not frozen:
        return 0
    trained = [name for name, _ in count_model(config.model).shapes if name not in frozen]
    layers = [unit_of(name)[0] for name in trained]
    below = ("embed_tokens.", "vision_tower.", "multi_modal_projector.", "image_newline")
    if any(name.startswith(below) for name in trained):
        return 0
    return min((n for n in layers if n >= 0), default=config.model.num_layers)


def list_units(config: RunConfig, world_size: int) -> list[Unit]:
    """The ZeRO units of `parallelize`, in the order of the model."""
    parallel = config.parallel
    dense, experts = parallel.zero_stage, parallel.expert_zero_stage
    return _list_units(
        count_model(config.model),
        dense,
        dense if experts is None else experts,
        parallel.ep * parallel.etp,
        compute_bytes(config),
        world_size,
        frozen_of(config),
    )


@lru_cache(maxsize=4)
def _list_units(
    model: ModelCount,
    dense_stage: int,
    expert_stage: int,
    split: int,
    copy_bytes: int,
    world_size: int,
    frozen: frozenset[str],
) -> list[Unit]:
    sizes: dict[tuple[int, str], list[int]] = {}
    for name, shape in model.shapes:
        layer, unit = unit_of(name)
        experts = unit == "experts"
        ranks = world_size // split if experts else world_size
        whole = prod(shape) // split if experts else prod(shape)
        if (expert_stage if experts else dense_stage) == 0:
            shard = whole
        elif experts and (split > 1 or expert_shard_dim(shape, world_size) > 0):
            shard = whole // ranks  # a dim that divides
        else:
            shard = ceil(shape[0] / ranks) * prod(shape[1:])
        size = sizes.setdefault((layer, unit), [0, 0, 0, 0])
        size[0] += whole
        size[1] += shard
        if name not in frozen:
            size[2] += whole
            size[3] += shard
    units = []
    for (layer, unit), (whole, shard, trained_whole, trained_shard) in sizes.items():
        experts = unit == "experts"
        units.append(
            Unit(
                layer,
                unit,
                expert_stage if experts else dense_stage,
                world_size // split if experts else world_size,
                whole,
                shard,
                trained_whole,
                trained_shard,
                FP32 if unit == "gate" else copy_bytes,
            )
        )
    return units


def unit_of(name: str) -> tuple[int, str]:
    words = name.split(".")
    if name in ("image_newline", "class_embedding", "position_embedding.weight"):
        return -1, "norm"
    if words[0] == "vision_tower" and "layers" in words:
        return -1, ".".join(words[:5])
    if words[0] != "layers":
        return -1, words[0]
    layer = int(words[1])
    if "experts" in words:
        return layer, "experts"
    return layer, "gate" if "gate" in words else "dense"


def _sees(unit: Unit) -> bool:
    """Whether it is of the vision tower, whose blocks are units, or the projector."""
    return unit.name.startswith(("vision_tower", "multi_modal_projector"))


def attention_activations(s: Sizes, *, softmax: bool) -> int:
    """Bytes that a block's attention half keeps, its input among them."""
    if softmax:
        core = core_inputs(s, softmax) + core_outputs(s, softmax)
        return s.e * s.T * 3 * s.h + core + FP32 * s.T * 2
    core = s.e * s.T * 9 * s.i + (FP32 * s.state if s.cp > 1 else 0)
    return s.e * s.T * 3 * s.h + core + FP32 * s.T * 3


def router_activations(s: Sizes) -> int:
    """Bytes that the router keeps."""
    return s.T * (FP32 * (s.h + s.E + s.k) + 2 * INT64 * s.k)


def expert_activations(s: Sizes) -> int:
    """Bytes that the experts and their weighted sum keep."""
    return s.e * (s.rows * s.h + 2 * s.rows * s.f // s.etp + s.T * s.k * s.h)


def model_activations(config: RunConfig) -> int:
    """Bytes kept outside of the blocks, but for the head."""
    s = sizes_of(config)
    return s.T * (s.e * s.h + FP32 + 2 * INT64 + FP32 * config.model.rotary_dim)


@dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps until its backward pass."""

    attention: int
    """By its attention half, without what may lie on the host."""
    experts: int
    """By its router and experts, likewise."""
    movable: int
    """Inputs that full checkpointing keeps, here or on the host."""

    @property
    def here(self) -> int:
        """All of it, if nothing lies on the host."""
        return self.attention + self.experts + self.movable


def kept_of_layer(config: RunConfig, layer: int) -> Kept:
    """By policy and chunks."""
    s, softmax = sizes_of(config), config.model.is_softmax(layer)
    policy, chunks = config.trainer.activation_checkpointing, config.trainer.chunk_tokens
    row = s.e * s.T * s.h
    core = core_outputs(s, softmax)
    if chunks is not None:
        routing = s.T * (FP32 * (s.E + s.k) + INT64 * s.k)
        if policy == "full":
            # Over ranks softmax attention keeps its inputs too.
            inputs = core_inputs(s, softmax) if s.cp > 1 else 0
            return Kept(core + inputs if softmax else 0, routing, 2 * row)
        return Kept(row + core + core_inputs(s, softmax), routing + row, 0)
    if policy == "full":
        return Kept(0, 0, row)
    if policy == "selective":
        before = s.i + 2 * s.v if softmax else 4 * s.i
        # Over ranks the core is no torch op, which the policy could keep.
        attention = 2 * row + s.e * s.T * before + (0 if s.cp > 1 else core)
        # The router's input, in fp32 the same tensor.
        router = router_activations(s) - (FP32 - s.e) * s.T * s.h
        return Kept(attention, router + expert_activations(s), 0)
    attention = attention_activations(s, softmax=softmax)
    return Kept(attention, router_activations(s) + expert_activations(s), 0)


def layer_activations(config: RunConfig, layer: int) -> int:
    """Bytes that a block keeps on the GPU until its backward pass."""
    kept = kept_of_layer(config, layer)
    return kept.here - (kept.movable if config.trainer.offload_checkpoints else 0)


def host_bytes(config: RunConfig) -> int:
    """That a rank pins in host memory for its checkpoints."""
    if not config.trainer.offload_checkpoints:
        return 0
    model, s = config.model, sizes_of(config)
    if model.coca is not None:
        return captioner_inputs(model, s.T, s.e)
    movable = sum(kept_of_layer(config, layer).movable for layer in range(model.num_layers))
    if model.vision is None or not tower_trains(config):
        return movable
    return movable + tower_inputs(model.vision, count_tiles(model.vision, s.T), s.e)


Parts = dict[str, int]


def find_peak(config: RunConfig, world_size: int, micro_batches: int) -> Parts:
    """Bytes by part at the moment of a step that needs most of them, without a margin."""
    return max(moments(config, world_size, micro_batches), key=lambda parts: sum(parts.values()))


def add_margin(parts: Parts) -> Parts:
    """With what the GPU holds beside the allocator's peak."""
    peak = sum(parts.values())
    return parts | {"margin": CONTEXT_BYTES + int(FRAGMENTATION * peak)}


class Held:
    """What ZeRO holds in the last micro-batch's backward pass, as it goes through the units."""

    def __init__(self, units: list[Unit], micro_batches: int) -> None:
        self._micro_batches = micro_batches
        shards = sum(unit.shard for unit in units)
        trained = sum(unit.trained_shard for unit in units)
        self._fixed = {"weights": FP32 * shards, "moments": 2 * FP32 * trained}
        self._copies = sum(unit.copy_bytes * unit.whole for unit in units if unit.stage < 3)
        self._gradients = sum(self._before(unit) for unit in units)

    def reduce(self, *units: Unit) -> None:
        """Their gradients become shards, their copies go."""
        for unit in units:
            self._copies -= unit.copy_bytes * unit.whole if unit.stage < 3 else 0
            self._gradients += FP32 * unit.trained_shard - self._before(unit)

    def parts(
        self, *near: Unit, activations: int, working: int = 0, head: int = 0, buffers: int = 0
    ) -> Parts:
        """All parts at this moment; `near` are gathered also in stage 3."""
        gathered = sum(unit.copy_bytes * unit.whole for unit in near if unit.stage == 3)
        return self._fixed | {
            "copies": self._copies + gathered,
            "gradients": self._gradients,
            "activations": activations,
            "working": working,
            "head": head,
            "buffers": buffers,
        }

    def _before(self, unit: Unit) -> int:
        """Bytes of a unit's gradients before those of the last micro-batch."""
        if self._micro_batches == 1:
            return 0
        return FP32 * (unit.trained_shard if unit.stage >= 2 else unit.trained_whole)


def moments(config: RunConfig, world_size: int, micro_batches: int) -> Iterator[Parts]:
    """The parts at each moment looked at, of the step's last micro-batch."""
    units = list_units(config, world_size)
    s = sizes_of(config)
    by_layer: dict[int, dict[str, Unit]] = {}
    for unit in units:
        by_layer.setdefault(unit.layer, {})[unit.name] = unit
    ends = by_layer.pop(-1)
    head = ends["lm_head"]
    lowest = lowest_trained(config)
    layers = [layer_activations(config, n) if n >= lowest else 0 for n in sorted(by_layer)]
    on_its_way = s.e * s.T * s.h if config.trainer.offload_checkpoints else 0
    seeing = [unit for unit in ends.values() if _sees(unit)]
    tower = _kept_by_tower(config, s, seeing)
    rest = model_activations(config) + tower
    to_the_end = rest - s.T * (s.e * s.h + FP32)  # the last norm's part goes first

    zero = Held(units, micro_batches)
    parts, reduce = zero.parts, zero.reduce
    longest = config.data.seq_len if config.objective == "preference" else None
    in_head = head_bytes(s.T, s.h, config.model.vocab_size, s.e, head.trained_whole, longest)
    yield parts(head, activations=rest + sum(layers) + on_its_way, head=in_head)

    reduce(head)
    last_reduced = FP32 * head.trained_whole
    yield parts(
        head,
        activations=rest + sum(layers) + on_its_way,
        working=s.e * (2 * s.T * s.h + head.trained_whole),
        buffers=last_reduced,
    )
    for number in reversed(range(lowest, len(layers))):
        layer = by_layer[number]
        dense, experts = layer["dense"], layer["experts"]
        near = list(layer.values())
        # The gather of the next units in line, before it is copied to its place.
        ahead = max([u.copy_bytes * u.whole for u in near if u.stage == 3], default=0)
        before = to_the_end + sum(layers[:number])
        block = _block_moments(
            config, number, s.e * experts.trained_whole, s.e * dense.trained_whole
        )
        yield parts(
            *near,
            activations=before + block.in_experts,
            working=block.expert_work,
            buffers=last_reduced + ahead,
        )
        reduce(experts)
        near.remove(experts)
        yield parts(
            *near,
            activations=before + block.behind_experts,
            working=s.e * (3 * s.T * s.h + experts.trained_whole),
            buffers=FP32 * experts.trained_whole + ahead,
        )
        yield parts(
            *near,
            activations=before + block.in_attention,
            working=block.attention_work,
            buffers=FP32 * experts.trained_whole + ahead,
        )
        reduce(dense, layer["gate"])
        last_reduced = FP32 * dense.trained_whole
    for number in range(lowest):
        reduce(*by_layer[number].values())
    if tower:
        whole = max(last_reduced // FP32, *(unit.trained_whole for unit in seeing))
        working = tower_work(config.model, s.T, s.e, trains=tower_trains(config)) + s.e * whole
        yield parts(*seeing, activations=to_the_end, working=working, buffers=FP32 * whole)
    reduce(*seeing)
    to_the_end -= tower
    embedding = ends["embed_tokens"]
    reduce(embedding, ends["norm"])
    yield parts(
        embedding,
        activations=to_the_end,
        working=s.e * (s.T * s.h + embedding.trained_whole),
        buffers=FP32 * embedding.trained_whole,
    )
    yield parts(activations=0)


def _kept_by_tower(config: RunConfig, s: Sizes, units: list[Unit]) -> int:
    if not any(unit.trained_whole for unit in units):
        return 0
    model, trains = config.model, tower_trains(config)
    policy = config.trainer.activation_checkpointing
    kept = tower_activations(model, s.T, s.e, policy, trains=trains)
    if model.vision is not None and trains and config.trainer.offload_checkpoints:
        # Two inputs are here at a time.
        there = tower_inputs(model.vision, count_tiles(model.vision, s.T), s.e)
        kept -= there - min(2, model.vision.num_layers) * there // model.vision.num_layers
    return kept


@dataclass(frozen=True)
class BlockMoments:
    """Bytes of one block in its backward pass: kept or computed again, and worked with."""

    in_experts: int
    expert_work: int
    behind_experts: int
    in_attention: int
    attention_work: int


def _block_moments(config: RunConfig, layer: int, experts: int, dense: int) -> BlockMoments:
    """`experts` and `dense` are the bytes of the weights' gradients."""
    s, softmax = sizes_of(config), config.model.is_softmax(layer)
    kept = kept_of_layer(config, layer)
    policy, chunk = config.trainer.activation_checkpointing, config.trainer.chunk_tokens
    row = s.e * s.T * s.h
    if chunk is not None:
        part = replace(s, T=min(chunk, s.T), rows=s.rows * min(chunk, s.T) // s.T)
        # With its own gradients a chunk has their sums in fp32.
        in_chunk = expert_activations(part) + _expert_work(part, experts) + FP32 * experts // s.e
        near = attention_activations(part, softmax=softmax)
        near += _attention_work(part, dense, softmax) + FP32 * dense // s.e
        # With offload the input is on its way while the experts work, then the one before it.
        on_its_way = row if config.trainer.offload_checkpoints else 0
        around_core = row + core_inputs(s, softmax) + core_outputs(s, softmax)
        return BlockMoments(
            kept.here,
            3 * row + in_chunk,
            kept.here,
            around_core + on_its_way,
            _chunked_attention_work(s, softmax, near),
        )
    attention = attention_activations(s, softmax=softmax)
    router = router_activations(s)
    # Rows of the weighted sum are gone once their gradient is there.
    in_experts = expert_activations(s) - s.e * s.T * s.k * s.h
    before = attention
    if policy == "selective":  # the rest comes when the experts are done
        before, router = kept.attention, kept.experts - expert_activations(s)
    if config.trainer.offload_checkpoints:
        attention, before = attention + row, before + row
    return BlockMoments(
        before + router + in_experts,
        _expert_work(s, experts),
        before + router,
        attention,
        _attention_work(s, dense, softmax),
    )


def _expert_work(s: Sizes, weight_bytes: int) -> int:
    """In the experts' backward pass: gradients of the block's output and its residual, of rows in
    and out, of gate and up, the inner rows again; at its end those of the weights."""
    rows = s.e * s.rows * s.h
    inner = 3 * s.e * s.rows * s.f // s.etp
    return (
        2 * s.e * s.T * s.h + rows + inner + max(2 * rows + weight_bytes // 3, rows + weight_bytes)
    )


def _attention_work(s: Sizes, weight_bytes: int, softmax: bool) -> int:
    """In attention's backward pass, beside what it keeps, of which each op gives its own up:
    gradients of the norm behind it, of its residual and of the layer's output; or of the residual
    and the core's in- and output, when two rows and two core outputs are gone (softmax attention
    keeps its output); those of the weights."""
    row, inner = s.e * s.T * s.h, s.e * s.T * s.i
    in_core = softmax_work(s) if softmax else 2 * inner
    return max(3 * row, in_core) + weight_bytes


def _chunked_attention_work(s: Sizes, softmax: bool, chunk: int) -> int:
    """The same where all but the core is done in chunks, beside the input, in- and output of the
    core: gradients of this half's in- and output and of the core's output, and what a chunk takes;
    or of the input and of the core's in- and output, which softmax attention keeps until then."""
    in_core = s.e * s.T * s.h + (softmax_work(s) if softmax else 3 * s.e * s.T * s.i)
    return max(in_core, s.e * s.T * (2 * s.h + s.i) + chunk)
