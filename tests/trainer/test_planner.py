"""The planner's counts against torch: saved tensors, shards, measured peaks; and by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.meta import MovedBytes, forward, meta_model, use_kernels_of_a_gpu
from support.tiny import (
    ROOT,
    compose_config,
    text01_data,
    tiny_config,
    tiny_engine,
    tiny_model,
)
from support.worlds import run_world
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only

from fulmen.models.config import ModelConfig
from fulmen.parallel import checkpointing
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer import run
from fulmen.trainer.config import GroupConfig, OptimConfig, RunConfig
from fulmen.trainer.flops import device_peak
from fulmen.trainer.head_memory import head_scratch
from fulmen.trainer.memory import (
    FP32,
    GIB,
    add_margin,
    count_model,
    find_peak,
    layer_activations,
    list_units,
    model_activations,
    moments,
)
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.planner import (
    GPUS,
    Assumptions,
    describe,
    find_gpu,
    make_plan,
    predict_memory,
    predict_step,
    step_flops,
)
from fulmen.trainer.planner_search import changed, search, suggest
from fulmen.trainer.sizes import sizes_of
from fulmen.trainer.stages import list_stages

H800 = GPUS["h800"]


def text01(*overrides: str) -> RunConfig:
    return compose_config(["recipe=text01", *text01_data(), *overrides])


def text01_1b(tokens: int, **parallel: int) -> RunConfig:
    """`tokens` on a rank, as benchmarks/train_step.py runs it."""
    config = compose_config(["recipe=text01_1b", "data.sources.corpus.path=none"])
    config.parallel = ParallelConfig(**parallel)  # type: ignore[arg-type]
    config.trainer.micro_batch_tokens = tokens * config.parallel.cp
    return config


def saved_bytes(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """What autograd keeps in a forward pass on the kernels a GPU would take, parameters apart.

    What checkpoints keep is counted too.
    """
    use_kernels_of_a_gpu(monkeypatch)
    tokens = config.trainer.micro_batch_tokens
    sizes: dict[int, int] = {}
    alive = []
    own: set[int] = set()

    def count(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        alive.append(storage)  # so that no address comes twice
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return x

    def keep_here(x: torch.Tensor) -> checkpointing.Kept:
        return checkpointing.Kept(count(x))

    def policy(keeps: Any, context: Any, op: Any, *args: Any, **options: Any) -> Any:
        if keeps(op):
            tree_map_only(torch.Tensor, count, context.op_output)
        return plain_policy(keeps, context, op, *args, **options)

    plain_policy = checkpointing._policy
    monkeypatch.setattr(checkpointing, "keep_here", keep_here)
    monkeypatch.setattr(checkpointing, "_policy", policy)
    model = meta_model(config)
    own |= {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        output = forward(model, tokens)
    assert output.loss_sum.requires_grad
    return sum(sizes.values())


WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "chunks": {"chunk_tokens": 4096},
    "full chunks": {"activation_checkpointing": "full", "chunk_tokens": 4096},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", ["tiny", "all lightning", "all softmax", "text01_1b"])
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_what_a_step_keeps(
    way: str, shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text01_1b(16384) if shape == "text01_1b" else tiny_config("none")
    config.trainer.dtype = dtype
    config = changed(config, [(f"trainer.{key}", value) for key, value in WAYS[way].items()])
    if shape != "text01_1b":
        every = {"tiny": 2, "all lightning": 0, "all softmax": 1}[shape]
        config.model = tiny_model(softmax_every=every, vocab_size=304)
        config.trainer.micro_batch_tokens = 4096
    model, tokens = config.model, config.trainer.micro_batch_tokens
    predicted = model_activations(config)
    predicted += sum(layer_activations(config, layer) for layer in range(model.num_layers))
    # The head's two gradients, which are made in the forward pass.
    number = 2 if dtype == "bfloat16" else 4
    predicted += number * model.hidden_size * (tokens + model.vocab_size)
    predicted -= 8 * tokens  # labels, which only the head reads
    if not model.num_softmax_layers or way in ("selective", "full", "full chunks"):
        predicted -= FP32 * tokens * model.rotary_dim  # angles that no layer keeps
    # Not counted: slopes, counts, scalars; in lightning layers the table of documents (16 bytes for
    # 16 or 64 tokens) and, where rows are cut as short ones with few heads are, states at the cuts.
    small = model.num_layers * (tokens + 1024)
    if shape != "text01_1b":
        small += model.num_layers * 8 * FP32 * 2 * 16 * 16
    measured = saved_bytes(config, monkeypatch)
    assert 0 <= measured - predicted <= small
    assert small < (0.01 if way == "none" or shape == "text01_1b" else 0.05) * predicted


@pytest.mark.parametrize(
    ("config", "ranks", "measured"),
    [
        (text01_1b(16384), 1, 24.03),
        (text01_1b(16384), 2, 18.29),
        (text01_1b(16384, cp=2), 2, 18.32),
        (text01_1b(16384, ep=2), 2, 17.98),
    ],
    ids=["one", "dp2", "cp2", "ep2"],
)
def test_measured_peaks(config: RunConfig, ranks: int, measured: float) -> None:
    """torch's max_memory_allocated on H100s, 2026-11-25: docs/planner.md."""
    assert sum(find_peak(config, ranks, 1).values()) / GIB == pytest.approx(measured, rel=0.05)


def test_measured_peak_of_lightning_layers() -> None:
    config = text01_1b(32768)
    config.model.softmax_every = 0
    assert sum(find_peak(config, 2, 1).values()) / GIB == pytest.approx(29.56, rel=0.05)


def test_measured_work() -> None:
    """Kernels' time of the same steps on H100s; docs/planner.md."""
    measured = [({}, 1, 0.1102), ({}, 2, 0.1007), ({"cp": 2}, 2, 0.1016), ({"ep": 2}, 2, 0.1052)]
    for parallel, ranks, seconds in measured:
        config = text01_1b(16384, **parallel)
        step = predict_step(config, ranks, GPUS["h100"], Assumptions(), 16384 * ranks)
        assert sum(step.work_s.values()) == pytest.approx(seconds, rel=0.1)


def test_heads_scratch_is_that_of_the_kernel() -> None:
    pytest.importorskip("triton")
    from fulmen.kernels.cross_entropy.triton_cross_entropy import SUMMED_CHUNKS, plan_chunks

    sizes = [(8192, 6144, 200064), (16384, 1536, 64000), (256, 128, 4096), (8192, 6144, 4096)]
    sizes += [(2**20, 1536, 64000), (65536, 6144, 200064)]
    for tokens, hidden, vocab in sizes:
        chunks = plan_chunks(tokens, hidden, vocab, element_size=2, need_weight=True)
        expected = 0
        for chunk in chunks:
            rows = chunk.stop - chunk.start
            summed = 4 * rows * hidden if chunk.slab < vocab else 0
            expected = max(expected, 2 * rows * chunk.slab + summed)
        expected += 4 * vocab * hidden if len(chunks) > SUMMED_CHUNKS else 0
        assert head_scratch(tokens, hidden, vocab, 2) == pytest.approx(expected, rel=1e-2)


MESHES: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 3, "expert_zero_stage": 0},
    {"zero_stage": 0, "expert_zero_stage": 2, "ep": 2},
    {"zero_stage": 2, "ep": 2, "etp": 2},
    {"zero_stage": 1, "etp": 2, "cp": 2},
]


def held_bytes(device: torch.device, meshes: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Of weights, moments and gathered copies that a rank really has, by mesh."""
    result = []
    for values in meshes:
        parallel = ParallelConfig(**values)
        model, engine = tiny_engine(device, parallel, dtype=torch.bfloat16)
        optimizer = Optimizer(engine, OptimConfig(lr=1e-3))
        weights = sum(p.to_local().nbytes for p in engine.parameters.values())
        moments = sum(m.to_local().nbytes for _, m in optimizer.named_moments())
        for unit in engine.stages:
            assert isinstance(unit, FSDPModule)
            unit.unshard()
        copies = [_local(p) for p in model.parameters()]
        result.append(
            {
                "weights": weights,
                "moments": moments,
                "copies": sum(copy.nbytes for copy in copies),
            }
        )
    return result


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@pytest.mark.slow
def test_shards_are_those_of_the_engine() -> None:
    ranks = run_world(held_bytes, 4, MESHES)
    for number, values in enumerate(MESHES):
        config = tiny_config("none")
        config.parallel = ParallelConfig(**values)
        config.trainer.dtype = "bfloat16"
        units = list_units(config, 4)
        shards = sum(unit.shard for unit in units)
        most = {key: max(rank[number][key] for rank in ranks) for key in ranks[0][number]}
        assert most["weights"] == FP32 * shards, values
        assert most["moments"] == 2 * FP32 * shards
        assert most["copies"] == sum(unit.whole * unit.copy_bytes for unit in units)


def test_gradients_by_stage_and_micro_batches() -> None:
    """Of one rank of four; each of three layers has 3 x 4 x 24 x 32 numbers in its experts."""
    config = tiny_config("none")
    total = count_model(config.model).total
    experts = 3 * 4 * 24 * 32 * 3
    config.parallel = ParallelConfig(zero_stage=1, ep=4)
    head = config.model.vocab_size * config.model.hidden_size
    # In the experts of the last layer all but the head's are whole, of two micro-batches.
    shard_of_head = -(-config.model.vocab_size // 4) * config.model.hidden_size
    whole = total - experts + experts // 4 - head + shard_of_head
    of_two, of_one = (list(moments(config, 4, number)) for number in (2, 1))
    assert of_two[1]["gradients"] == FP32 * whole
    # Of one, there is the head's alone; at the end all are shards.
    assert of_one[1]["gradients"] == FP32 * shard_of_head
    assert of_one[-1]["gradients"] == of_two[-1]["gradients"] == of_one[-1]["weights"]


def test_text01_counts() -> None:
    config = text01()
    facts = describe(make_plan(config, 2048, H800, Assumptions()))
    assert facts["total_params"] == 456_089_655_296
    assert facts["active_params"] == 45_944_920_064
    # tests/trainer/test_flops.py counts both by hand; a token has 4096 before it on average.
    by_hand = 3 * (94_638_702_592 + 10 * 4096 * 32_768)
    assert facts["flops_per_token"] == by_hand
    assert sum(facts["flops_by_kind_per_token"].values()) == by_hand
    # 32 experts on 32 ranks, each over 64 of them.
    assert facts["params_per_rank"]["experts"] == 80 * 3 * 6144 * 9216 // 64
    assert facts["fits"]
    step = facts["step_time_s"]
    assert facts["mfu"] == pytest.approx(by_hand * 16_777_216 / (step * 2048 * 989e12))
    assert facts["tokens_per_day"] == pytest.approx(16_777_216 / step * 86_400)
    stage = facts["stages"][0]
    assert stage["tokens"] == pytest.approx(11.4e12)
    assert [row["global_batch_tokens"] >> 24 for row in stage["batches"]] == [1, 2, 4, 8]
    assert stage["gpu_hours"] == pytest.approx(stage["days"] * 24 * 2048)


def test_exchanged_bytes_by_hand() -> None:
    config = tiny_config("none")
    config.parallel = ParallelConfig(zero_stage=1, ep=2, cp=2)
    config.trainer.dtype = "bfloat16"
    sent = predict_step(config, 2, H800, Assumptions(), 128).exchange_gb
    # Two micro-batches, 32 tokens on each rank of 64; 3 layers, one of them softmax.
    model = config.model
    rows = 32 * 2 * model.hidden_size * 2  # bytes: two choices, bf16
    assert sent["rows to experts"] * 1e9 == pytest.approx(2 * 3 * 4 * rows / 2)
    assert sent["keys and values"] * 1e9 == pytest.approx(2 * 32 * 2 * 16 * (2 + 4))
    assert sent["lightning states"] * 1e9 == pytest.approx(2 * 2 * 2 * 4 * 2 * 16 * 16)
    # Parts of dense tensors are as long as the first of two: an odd first dimension is padded.
    parts = [
        -(-shape[0] // 2) * math.prod(shape[1:])
        for name, shape in count_model(model).shapes
        if ".experts." not in name
    ]
    gate = 3 * 4 * 32  # in fp32
    assert sent["ZeRO"] * 1e9 == pytest.approx((2 + 4) * sum(parts) + 2 / 2 * gate)


def test_queries_that_move_by_hand() -> None:
    """One document over two ranks: of four chunks the first and the last are for one of them."""
    config = tiny_config("none")
    config.parallel = ParallelConfig(cp=2)
    config.data.seq_len = config.trainer.micro_batch_tokens = 16_384
    config.data.global_batch_tokens = 2 * 16_384
    sent = predict_step(config, 2, H800, Assumptions(), 2 * 16_384).exchange_gb
    # Two micro-batches, one softmax layer; half of 8192 tokens go; q and out,
    # and their gradients, in fp32.
    assert sent["queries"] * 1e9 == 2 * 4096 * 4 * (2 * 16) * 4
    config.parallel.balance_attention = False
    assert "queries" not in predict_step(config, 2, H800, Assumptions(), 2 * 16_384).exchange_gb


def test_full_checkpointing_computes_blocks_again() -> None:
    config = text01()
    full = predict_step(config, 2048, H800, Assumptions(), 2**24).work_s
    none = changed(config, [("trainer.activation_checkpointing", "none")])
    once = predict_step(none, 2048, H800, Assumptions(), 2**24).work_s
    assert full["projections"] == pytest.approx(once["projections"] * 4 / 3)
    assert full["head"] == once["head"]
    assert step_flops(config, 1) == step_flops(none, 1)
    assert sum(find_peak(config, 2048, 1).values()) < sum(find_peak(none, 2048, 1).values())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_step_moves_what_is_predicted(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops bound by memory, but for what the experts do inside of their op."""
    use_kernels_of_a_gpu(monkeypatch)
    config = text01_1b(16384)
    config.trainer.activation_checkpointing = policy
    names = {"norm", "gated_norm", "silu_qkv", "unpermute"}
    names = {f"fulmen::{name}{end}" for name in names for end in ("", "_backward")}
    names |= {"fulmen::rope", "fulmen::permute", "add", "mul", "_to_copy"}
    model = meta_model(config)
    with MovedBytes(names) as moved:
        output = forward(model, 16384)
        (output.loss_sum + output.aux_loss).backward()
    step = predict_step(config, 1, GPUS["h100"], Assumptions(memory_share=1), 16384)
    predicted = step.work_s["memory-bound ops"] * GPUS["h100"].memory_gb_per_s * 1e9
    s = sizes_of(config)
    inside = 3 * s.f * (1 + (policy == "full")) + 6 * s.f + 3 * s.h
    # The last norm is beside the layers.
    predicted += s.e * s.T * 5 * s.h - config.model.num_layers * s.e * s.rows * inside
    assert moved.total == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_frozen_layers_below_all_that_trains_run_forward_once(policy: str) -> None:
    """Eight layers alike, the first four frozen: half of the work, and half of a forward pass."""

    def work(frozen: str) -> dict[str, float]:
        config = text01_1b(16384)
        config.model.softmax_every = 0
        config.trainer.activation_checkpointing = policy
        config.optim.groups = {"low": GroupConfig(frozen, frozen=True)} if frozen else {}
        return predict_step(config, 1, GPUS["h100"], Assumptions(), 16384).work_s

    whole, half, head = work(""), work(r"embed_tokens|layers\.[0-3]\."), work("(?!lm_head)")
    for kind in ("projections", "experts", "router", "lightning core", "memory-bound ops"):
        # With nothing but the head there is a forward pass alone.
        assert half[kind] == pytest.approx((whole[kind] + head[kind]) / 2), kind
    again = policy == "full"
    assert whole["projections"] == pytest.approx((3 + again) * head["projections"])
    assert whole["lightning core"] == pytest.approx((11 + 4 * again) / 4 * head["lightning core"])


def test_what_to_change_fits() -> None:
    config = text01("parallel.ep=1", "parallel.zero_stage=1")
    assert not make_plan(config, 2048, H800, Assumptions()).stages[0].fits
    changes = suggest(config, 2048, H800.usable_gib)
    assert changes
    assert make_plan(changed(config, changes), 2048, H800, Assumptions()).stages[0].fits
    assert suggest(text01("parallel.ep=1"), 32, H800.usable_gib) is None  # 228 GiB of state each


def test_search_gives_the_fastest_that_fit() -> None:
    config = text01_1b(16384)
    found = search(list_stages(config)[0], 8, H800, Assumptions())
    assert 1 <= len(found) <= 5
    times = [plan.intervals[0].step.seconds for plan in found]
    assert times == sorted(times)
    assert all(plan.fits for plan in found)
    assert times[0] <= make_plan(config, 8, H800, Assumptions()).stages[0].first.seconds


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H800", "h800")]
    + [("NVIDIA H20", "h20"), ("NVIDIA A100-SXM4-80GB", "a100")],
)
def test_peaks_are_those_of_the_trainer(
    name: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_gpu(name) is GPUS[gpu]
    peak = device_peak(torch.device("cuda"), torch.bfloat16)
    assert peak == GPUS[gpu].tflops * 1e12


def test_a_job_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(config: RunConfig, gib: float) -> None:
        device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        mesh = SimpleNamespace(device=torch.device("cuda"), rank=0, world_size=2048)
        run.announce_plan(config, mesh)  # type: ignore[arg-type]

    config = text01()
    needed = sum(predict_memory(config, 2048).values()) / GIB
    begin(config, needed + 0.1)
    with pytest.raises(ValueError, match=rf"needs {needed:.1f} GiB .*trainer.allow_misfit=true"):
        begin(config, needed - 0.1)
    config.trainer.allow_misfit = True
    begin(config, needed - 0.1)


def test_the_margin_is_added_once() -> None:
    parts = find_peak(text01(), 2048, 1)
    assert "margin" not in parts
    assert add_margin(parts)["margin"] == int(1.5 * GIB) + int(0.04 * sum(parts.values()))


def test_experts_that_ranks_cannot_share() -> None:
    config = tiny_config("none")
    config.model = ModelConfig(**vars(tiny_model(num_experts=2, expert_hidden_size=26)))
    config.parallel = ParallelConfig(zero_stage=1)
    with pytest.raises(ValueError, match="expert_zero_stage=0"):
        list_units(config, 3)


def test_the_recipes_of_one_gpu_fit() -> None:
    for recipe in ("text01_1b", "text01_3b"):
        config = compose_config([f"recipe={recipe}", "data.sources.corpus.path=none"])
        assert make_plan(config, 1, GPUS["h100"], Assumptions()).fits, recipe
    assert (ROOT / "recipes" / "plan.yaml").exists()


def test_the_staged_recipe_of_one_or_two_gpus_fits() -> None:
    paths = text01_data()
    config = compose_config(["recipe=text01_1b_1m", *paths])
    for gpus in (1, 2):
        assert make_plan(config, gpus, GPUS["h200"], Assumptions()).fits
    cps = [f"++stages.{name}.parallel.cp=2" for name in ("to_512k", "to_1m")]
    config = compose_config(["recipe=text01_1b_1m", *paths, *cps])
    plan = make_plan(config, 2, GPUS["h100"], Assumptions())
    assert plan.fits
    # A stage's own search keeps its length.
    found = search(list_stages(config)[3], 2, GPUS["h100"], Assumptions())
    assert found
    assert all(one.fits and one.config.data.seq_len == 2**20 for one in found)


def test_a_step_limit_ends_the_plan_within_a_stage() -> None:
    config = text01("trainer.max_steps=140000")
    plan = make_plan(config, 2048, H800, Assumptions())
    steps = [sum(one.steps for one in stage.intervals) for stage in plan.stages]
    assert steps[0] == pytest.approx(133_783, abs=1)
    assert sum(steps) == pytest.approx(140_000)
    assert [bool(stage.intervals) for stage in plan.stages] == [True, True, False, False]
    config = text01("trainer.max_tokens=11500000000000")
    plan = make_plan(config, 2048, H800, Assumptions())
    assert sum(stage.tokens for stage in plan.stages) == pytest.approx(11.5e12)
