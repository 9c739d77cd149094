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

With full checkpointing a block keeps its input T h alone; one block's list comes and goes.

The peak is looked for at several moments of a step: in the head and at the reduction of its
gradient; in each block's backward pass in its experts, at the reduction of their gradients, and in
its attention layer; at the reduction of the embedding's gradient. Each adds what the passes hold
for themselves, and what ZeRO's reductions and gathers hold.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import ceil, prod

import torch

from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.parallel.zero import expert_shard_dim
from fulmen.trainer.config import RunConfig

GIB = 2**30
FP32 = 4
INT64 = 8
CONTEXT_BYTES = int(1.5 * GIB)
"""CUDA context, libraries and NCCL's buffers: our choice, not measured for each machine."""
FRAGMENTATION = 0.04
"""Of the allocator's peak, for what it holds and cannot use: our choice."""
HEAD_CHUNK_BYTES, HEAD_SLABS, HEAD_TILE, HEAD_ROWS = 544 * 2**20, 8, 8192, 128
"""As in kernels/cross_entropy/triton_cross_entropy.py, which needs Triton to be imported."""


@dataclass(frozen=True)
class Unit:
    """One ZeRO unit as a rank has it."""

    layer: int
    """-1 for embedding, head and last norm."""
    name: str
    """dense, gate, experts; embed_tokens, lm_head, norm."""
    stage: int
    ranks: int
    """That share it."""
    whole: int
    """Numbers when gathered on a rank."""
    shard: int
    """Numbers that the rank with most of them keeps."""
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
    with torch.device("meta"):
        model = TextModel(ModelConfig(*values), MoEConfig())
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    return ModelCount(count_parameters(model), count_active_parameters(model), shapes)


def count_model(config: ModelConfig) -> ModelCount:
    """Parameters of a model of these shapes."""
    return _count(astuple(config))


def compute_bytes(config: RunConfig) -> int:
    """Of a number in the forward and backward pass."""
    return 2 if config.trainer.dtype == "bfloat16" else FP32


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
    )


@lru_cache(maxsize=4)
def _list_units(
    model: ModelCount,
    dense_stage: int,
    expert_stage: int,
    split: int,
    copy_bytes: int,
    world_size: int,
) -> list[Unit]:
    sizes: dict[tuple[int, str], list[int]] = {}
    for name, shape in model.shapes:
        layer, unit = _unit_of(name)
        experts = unit == "experts"
        ranks = world_size // split if experts else world_size
        whole = prod(shape) // split if experts else prod(shape)
        if (expert_stage if experts else dense_stage) == 0:
            shard = whole
        elif experts and (split > 1 or expert_shard_dim(shape, world_size) > 0):
            shard = whole // ranks  # a dim that divides
        else:
            shard = ceil(shape[0] / ranks) * prod(shape[1:])
        size = sizes.setdefault((layer, unit), [0, 0])
        size[0] += whole
        size[1] += shard
    units = []
    for (layer, unit), (whole, shard) in sizes.items():
        experts = unit == "experts"
        units.append(
            Unit(
                layer,
                unit,
                expert_stage if experts else dense_stage,
                world_size // split if experts else world_size,
                whole,
                shard,
                FP32 if unit == "gate" else copy_bytes,
            )
        )
    return units


def _unit_of(name: str) -> tuple[int, str]:
    words = name.split(".")
    if words[0] != "layers":
        return -1, words[0]
    layer = int(words[1])
    if "experts" in words:
        return layer, "experts"
    return layer, "gate" if "gate" in words else "dense"


@dataclass(frozen=True)
class Sizes:
    """The letters of this module's list, for one rank."""

    e: int
    """Bytes of a number of the compute type."""
    T: int
    h: int
    i: int
    v: int
    f: int
    k: int
    E: int
    heads: int
    state: int
    """Numbers of a lightning layer's state."""
    rows: int
    """R."""
    cp: int
    etp: int
    kv_ranks: int
    """Ranks whose keys and values a softmax layer keeps."""


def sizes_of(config: RunConfig) -> Sizes:
    """With experts that get equal shares; buffers of a capacity are counted whole."""
    model, parallel = config.model, config.parallel
    tokens = config.trainer.micro_batch_tokens // parallel.cp
    rows = tokens * model.num_experts_per_token
    capacity = config.moe.capacity_factor
    if capacity and not config.moe.global_router and parallel.ep * parallel.etp > 1:
        each = min(ceil(capacity * rows / model.num_experts), tokens)
        rows = each * model.num_experts
    return Sizes(
        e=compute_bytes(config),
        T=tokens,
        h=model.hidden_size,
        i=model.num_attention_heads * model.head_dim,
        v=model.num_key_value_heads * model.head_dim,
        f=model.expert_hidden_size,
        k=model.num_experts_per_token,
        E=model.num_experts,
        heads=model.num_attention_heads,
        state=model.num_attention_heads * model.head_dim**2,
        rows=rows * parallel.etp,
        cp=parallel.cp,
        etp=parallel.etp,
        kv_ranks=parallel.cp if parallel.softmax_attention == "gather" else 1,
    )


def attention_activations(s: Sizes, *, softmax: bool) -> int:
    """Bytes that a block's attention half keeps, its input among them."""
    if softmax:
        core = s.e * s.T * (2 * s.i + 2 * s.v * s.kv_ranks) + FP32 * s.T * s.heads
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


def layer_activations(config: RunConfig, layer: int) -> int:
    """Bytes that a block keeps until its backward pass, without checkpointing."""
    s = sizes_of(config)
    attention = attention_activations(s, softmax=config.model.is_softmax(layer))
    return attention + router_activations(s) + expert_activations(s)


def head_scratch(tokens: int, hidden: int, vocab: int, e: int) -> int:
    """Bytes of logits beside the gradients."""
    rows = max(HEAD_CHUNK_BYTES // (vocab * e) // HEAD_ROWS * HEAD_ROWS, HEAD_ROWS)
    slab = ceil(ceil(vocab / HEAD_SLABS) / HEAD_TILE) * HEAD_TILE
    inside = min(tokens, hidden) if slab < vocab else 0
    if inside <= rows:
        return min(tokens, rows) * vocab * e
    first = inside * slab * e + FP32 * inside * hidden
    return max(first, min(tokens - inside, rows) * vocab * e)


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
        self._fixed = {"weights": FP32 * shards, "moments": 2 * FP32 * shards}
        self._copies = sum(unit.copy_bytes * unit.whole for unit in units if unit.stage < 3)
        self._gradients = sum(self._before(unit) for unit in units)

    def reduce(self, *units: Unit) -> None:
        """Their gradients become shards, their copies go."""
        for unit in units:
            self._copies -= unit.copy_bytes * unit.whole if unit.stage < 3 else 0
            self._gradients += FP32 * unit.shard - self._before(unit)

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
        return FP32 * (unit.shard if unit.stage >= 2 else unit.whole)


def moments(config: RunConfig, world_size: int, micro_batches: int) -> Iterator[Parts]:
    """The parts at each moment looked at, of the step's last micro-batch."""
    units = list_units(config, world_size)
    s = sizes_of(config)
    by_layer: dict[int, dict[str, Unit]] = {}
    for unit in units:
        by_layer.setdefault(unit.layer, {})[unit.name] = unit
    ends = by_layer.pop(-1)
    head = ends["lm_head"]
    full = config.trainer.activation_checkpointing == "full"
    kept = s.e * s.T * s.h  # of a checkpointed block
    layers = [kept if full else layer_activations(config, n) for n in sorted(by_layer)]
    rest = model_activations(config)
    to_the_end = rest - s.T * (s.e * s.h + FP32)  # the last norm's part goes first

    zero = Held(units, micro_batches)
    parts, reduce = zero.parts, zero.reduce
    scratch = head_scratch(s.T, s.h, config.model.vocab_size, s.e)
    in_head = 2 * s.e * s.T * s.h + s.e * head.whole + scratch
    yield parts(head, activations=rest + sum(layers), head=in_head)

    reduce(head)
    last_reduced = FP32 * head.whole
    yield parts(
        head,
        activations=rest + sum(layers),
        working=s.e * (2 * s.T * s.h + head.whole),
        buffers=last_reduced,
    )
    for number in reversed(range(len(layers))):
        layer = by_layer[number]
        dense, experts = layer["dense"], layer["experts"]
        near = list(layer.values())
        # The gather of the next units in line, before it is copied to its place.
        ahead = max([u.copy_bytes * u.whole for u in near if u.stage == 3], default=0)
        before = to_the_end + sum(layers[:number])
        attention = attention_activations(s, softmax=config.model.is_softmax(number))
        router = router_activations(s)
        # Rows of the weighted sum are gone once their gradient is there.
        in_experts = expert_activations(s) - s.e * s.T * s.k * s.h
        yield parts(
            *near,
            activations=before + attention + router + in_experts,
            working=_expert_work(s, s.e * experts.whole),
            buffers=last_reduced + ahead,
        )
        reduce(experts)
        near.remove(experts)
        yield parts(
            *near,
            activations=before + attention + router,
            working=s.e * (3 * s.T * s.h + experts.whole),
            buffers=FP32 * experts.whole + ahead,
        )
        yield parts(
            *near,
            activations=before + attention,
            working=_attention_work(s, s.e * dense.whole, config.model.is_softmax(number)),
            buffers=FP32 * experts.whole + ahead,
        )
        reduce(dense, layer["gate"])
        last_reduced = FP32 * dense.whole
    embedding = ends["embed_tokens"]
    reduce(embedding, ends["norm"])
    yield parts(
        embedding,
        activations=to_the_end,
        working=s.e * (s.T * s.h + embedding.whole),
        buffers=FP32 * embedding.whole,
    )
    yield parts(activations=0)


def _expert_work(s: Sizes, weight_bytes: int) -> int:
    """In the experts' backward pass: gradients of the block's output and its residual, of rows in
    and out, of gate and up, the inner rows again; at its end those of the weights."""
    rows = s.e * s.rows * s.h
    inner = 3 * s.e * s.rows * s.f // s.etp
    return (
        2 * s.e * s.T * s.h + rows + inner + max(2 * rows + weight_bytes // 3, rows + weight_bytes)
    )


def _attention_work(s: Sizes, weight_bytes: int, softmax: bool) -> int:
    """In attention's backward pass: gradients of the residual and the layer's in- and output, of
    q, k, v before and after their activation, of the gate; those of the weights."""
    inner = 3 * s.i + 4 * s.v * s.kv_ranks if softmax else 7 * s.i
    return s.e * s.T * (3 * s.h + inner) + weight_bytes
