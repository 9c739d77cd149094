"""Frozen parameters and groups on every ZeRO stage and mesh, against plain one-process torch."""

from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from support.tiny import VOCAB_SIZE, tiny_config, tiny_model
from support.worlds import run_world
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulmen.data.packing import PackedBatch
from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.audit import audit
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh, build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import GroupConfig, OptimConfig
from fulmen.trainer.groups import Settings, resolve_groups
from fulmen.trainer.inputs import model_inputs
from fulmen.trainer.memory import FP32, moments
from fulmen.trainer.optim import Optimizer

pytestmark = pytest.mark.slow

SEED, STEPS, MICRO_BATCHES, TOKENS, AUX_LOSS_COEF = 11, 2, 4, 32, 0.05
MAX_NORM, RATE = 0.3, 4e-3
PATTERNS = {
    # Whole units, parts of units, and what lies below all that trains.
    "mixed": {
        "below": GroupConfig(match=r"embed_tokens|layers\.0", frozen=True),
        "parts": GroupConfig(match=r"layers\.1\.self_attn\.q_proj|.*experts\.w1", frozen=True),
        "router": GroupConfig(match=r"layers\.2\.block_sparse_moe\.gate", frozen=True),
        "slow": GroupConfig(match="lm_head", lr_factor=0.25, weight_decay=0.02),
    },
    # As an adapter is trained under a frozen language model.
    "above": {"above": GroupConfig(match=r"layers\.[12]|norm|lm_head", frozen=True)},
    "all but queries": {
        "queries": GroupConfig(match=r"layers\.1\.self_attn\.q_proj"),
        "rest": GroupConfig(match="", frozen=True),
    },
}


@dataclass(frozen=True)
class Case:
    """One way to train on a given world."""

    pattern: str
    mesh: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = (self.mesh | self.options).items()
        return "-".join([self.pattern, *(f"{key}={value}" for key, value in values)])


CHUNKS = {"activation_checkpointing": "full", "chunk_tokens": 5}
CASES = {
    2: [
        *[
            Case("mixed", {"zero_stage": dense, "expert_zero_stage": expert})
            for dense, expert in product(range(4), range(4))
        ],
        *[Case("above", {"zero_stage": stage}) for stage in range(4)],
        Case("all but queries", {"zero_stage": 3}),
        Case("mixed", {"zero_stage": 2}, {"activation_checkpointing": "full"}),
        Case("mixed", {"zero_stage": 1}, {"activation_checkpointing": "selective"}),
        *[Case(pattern, {"zero_stage": 3}, CHUNKS) for pattern in PATTERNS],
    ],
    4: [
        Case("mixed", {"zero_stage": 1, "cp": 2, "ep": 2}),
        Case("mixed", {"zero_stage": 3, "cp": 4, "ep": 2, "etp": 2}),
        Case("above", {"zero_stage": 2, "cp": 2, "softmax_attention": "ring", "etp": 2}),
        Case("mixed", {"zero_stage": 0, "ep": 2, "expert_token_groups": 2}),
        Case("all but queries", {"zero_stage": 1, "cp": 4, "softmax_attention": "ring"}),
    ],
}


@dataclass
class Outcome:
    """What a training gave on one rank."""

    norms: list[float]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    held: dict[str, int] = field(default_factory=dict)
    """Numbers: of weights that train, of moments, of gradients between two backward passes."""
    table: str = ""


def packed(step: int, index: int) -> PackedBatch:
    """Three documents, one of a single token, and padding."""
    generator = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(VOCAB_SIZE, (1, TOKENS), generator=generator)
    bounds = [0, 19 + index, 20 + index, 29, TOKENS]
    labels = ids.roll(-1, 1)
    labels[:, [bound - 1 for bound in bounds[1:]]] = -100
    labels[:, 29:] = -100
    return PackedBatch(ids, labels, torch.tensor(bounds, dtype=torch.int32), 29)


def loss_of(output: Any) -> Tensor:
    assert isinstance(output, LossOutput)
    return output.loss_sum / 100 + AUX_LOSS_COEF * output.aux_loss / MICRO_BATCHES


def settings_of(pattern: str, model: nn.Module) -> tuple[OptimConfig, dict[str, Settings]]:
    config = OptimConfig(lr=RATE, groups=PATTERNS[pattern])
    return config, resolve_groups(config, [name for name, _ in model.named_parameters()])


@cache
def reference(pattern: str) -> Outcome:
    """The same training with nothing of `parallel`, its gradients cut by hand."""
    model = TextModel(tiny_model(), MoEConfig())
    init_model(model, model.config, SEED)
    config, settings = settings_of(pattern, model)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = []
    for name, parameter in model.named_parameters():
        own = settings[name]
        decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        if not own.frozen:
            groups.append(
                {
                    "params": [parameter],
                    "lr": RATE * own.lr_factor,
                    "weight_decay": decay if parameter.dim() > 1 else 0.0,
                }
            )
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    outcome = Outcome([], initial, {})
    for step in range(STEPS):
        for index in range(MICRO_BATCHES):
            batch = packed(step, index)
            output = model(
                batch.input_ids,
                labels=batch.labels,
                cu_seqlens=batch.cu_seqlens,
                num_tokens=batch.num_tokens,
            )
            loss_of(output).backward()
        trained = [p for group in groups for p in group["params"]]
        outcome.norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        optimizer.step()
        model.zero_grad()
    outcome.final = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


def whole(engine: ZeroEngine) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in engine.parameters.items()}


def gradient_numbers(model: nn.Module) -> int:
    """Of all gradients that exist, in whatever attribute FSDP2 has them."""
    found: dict[int, int] = {}
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        for group in state()._fsdp_param_groups:
            for one in group.fsdp_params:
                whole = getattr(one, "_unsharded_param", None)
                for gradient in (
                    one.sharded_param.grad,
                    one.unsharded_accumulated_grad,
                    None if whole is None else whole.grad,
                ):
                    if gradient is not None:
                        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                        found[local.data_ptr()] = local.numel()
    return sum(found.values())


def spread(
    model: TextModel,
    mesh: Mesh,
    parallel: ParallelConfig,
    settings: dict[str, Settings],
    **options: Any,
) -> ZeroEngine:
    return parallelize(
        model,
        mesh,
        parallel,
        dtype=torch.float32,
        compile_blocks=False,
        seed=SEED,
        frozen=[name for name, one in settings.items() if one.frozen],
        **({"activation_checkpointing": "none"} | options),
    )


def train(device: torch.device, case: Case) -> Outcome:
    parallel = ParallelConfig(**case.mesh)
    with torch.device("meta"):
        model = TextModel(tiny_model(), MoEConfig())
    config, settings = settings_of(case.pattern, model)
    mesh = build_mesh(parallel, device)
    engine = spread(model, mesh, parallel, settings, **case.options)
    optimizer = Optimizer(engine, config, settings)
    outcome = Outcome([], whole(engine), {}, table=audit(model, engine, parallel))
    for step in range(STEPS):
        mine = range(mesh.dp_rank, MICRO_BATCHES, mesh.dp)
        for index in mine:
            engine.begin_micro_batch(is_last=index == mine[-1])
            loss_of(model(**model_inputs(packed(step, index), mesh))).backward()
            if index == mine[0] and len(mine) > 1:
                outcome.held["gradients"] = gradient_numbers(model)
        outcome.norms.append(engine.clip_grad_norm(MAX_NORM).item())
        optimizer.step(RATE)
    assert not gradient_numbers(model)
    outcome.held["weights"] = sum(p.to_local().numel() for p in engine.trainable.values())
    outcome.held["moments"] = sum(m.to_local().numel() for _, m in optimizer.named_moments())
    outcome.final = whole(engine)
    return outcome


def train_cases(device: torch.device, cases: list[Case]) -> list[Outcome]:
    return [train(device, case) for case in cases]


@cache
def trained(size: int) -> dict[str, list[Outcome]]:
    """Case -> outcome on each rank of a world of `size`."""
    by_rank = run_world(train_cases, size, CASES[size])
    return {str(c): [rank[i] for rank in by_rank] for i, c in enumerate(CASES[size])}


ALL = [pytest.param(size, case, id=f"{size}-{case}") for size in CASES for case in CASES[size]]


@pytest.mark.parametrize(("size", "case"), ALL)
def test_training_equals_plain_torch(size: int, case: Case) -> None:
    expected = reference(case.pattern)
    with torch.device("meta"):
        settings = settings_of(case.pattern, TextModel(tiny_model(), MoEConfig()))[1]
    assert any(norm > MAX_NORM for norm in expected.norms) or case.pattern == "all but queries"
    for outcome in trained(size)[str(case)]:
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        for name, one in settings.items():
            initial, final = outcome.initial[name], outcome.final[name]
            assert torch.equal(initial, expected.initial[name])
            assert torch.equal(initial, final) == one.frozen, name
            torch.testing.assert_close(final, expected.final[name], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("size", "case"), ALL)
def test_frozen_parameters_hold_nothing(size: int, case: Case) -> None:
    with torch.device("meta"):
        model = TextModel(tiny_model(), MoEConfig())
    settings = settings_of(case.pattern, model)[1]
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    trains = sum(number for name, number in numbers.items() if not settings[name].frozen)
    for outcome in trained(size)[str(case)]:
        assert outcome.held["moments"] == 2 * outcome.held["weights"]
        assert f"{sum(numbers.values()) - trains:,} are frozen" in outcome.table
        assert "none: frozen" in outcome.table
    stages = {case.mesh["zero_stage"], case.mesh.get("expert_zero_stage", case.mesh["zero_stage"])}
    held = [outcome.held for outcome in trained(size)[str(case)]]
    if stages == {0} and "ep" not in case.mesh:
        assert {one["weights"] for one in held} == {trains}
    elif 0 not in stages:
        assert sum(one["weights"] for one in held) == trains
    run = tiny_config("none")
    run.optim.groups, run.parallel = PATTERNS[case.pattern], ParallelConfig(**case.mesh)
    predicted = list(moments(run, size, 2))
    assert max(one["moments"] for one in held) == predicted[-1]["moments"] // FP32
    assert max(one["weights"] for one in held) == predicted[-1]["gradients"] // FP32
    if size == 2:
        # In the head nothing of the last micro-batch is there yet.
        of_head = predicted[0]["gradients"] // FP32
        assert max(one["gradients"] for one in held) == of_head
        # Gradients that are accumulated: whole below stage 2, else shards.
        if max(stages) < 2:
            assert {one["gradients"] for one in held} == {trains}
        elif min(stages) > 1:
            assert [one["gradients"] for one in held] == [one["weights"] for one in held]


def train_the_routers(device: torch.device) -> tuple[float, float]:
    """The gradient norm of a step, and how far the weights went that this rank holds."""
    groups = {
        "routers": GroupConfig(match=r".*block_sparse_moe\.gate"),
        "rest": GroupConfig(match="", frozen=True),
    }
    optim = OptimConfig(lr=RATE, groups=groups)
    with torch.device("meta"):
        model = TextModel(tiny_model(num_experts=2, num_experts_per_token=1), MoEConfig())
    settings = resolve_groups(optim, [name for name, _ in model.named_parameters()])
    config = ParallelConfig(zero_stage=1)
    engine = spread(model, build_mesh(config, device), config, settings)
    optimizer = Optimizer(engine, optim, settings)
    engine.begin_micro_batch(is_last=True)
    ids = torch.arange(16)[None]
    output = model(ids, labels=ids)
    assert isinstance(output, LossOutput)
    (output.loss_sum + output.aux_loss).backward()
    before = [p.to_local().clone() for p in engine.trainable.values()]
    norm = engine.clip_grad_norm(1e-3)
    optimizer.step(RATE)
    after = [p.to_local() for p in engine.trainable.values()]
    return norm.item(), sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))


def test_a_rank_that_holds_nothing_of_what_trains_takes_part() -> None:
    norms, moved = zip(*run_world(train_the_routers, 4), strict=True)
    assert len(set(norms)) == 1
    assert norms[0] > 1e-3
    assert [distance > 0 for distance in moved] == [True, True, False, False]
