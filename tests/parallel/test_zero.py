"""ZeRO 0 to 3 against plain one-process torch, and what each rank holds of the model."""

import gc
import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import VOCAB_SIZE, tiny_model
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.optim import Optimizer

pytestmark = pytest.mark.slow

SEED = 11
STEPS = 4
MICRO_BATCHES = 8
TOKENS = 48
AUX_LOSS_COEF = 0.05
MAX_NORM = 0.6
OPTIM = OptimConfig(lr=4e-3)

STAGES = [(0, None), (1, None), (2, None), (3, None), (0, 2), (3, 1), (2, 0)]
"""(dense, expert) stages."""
MANY_EXPERTS = tiny_model()
FEW_EXPERTS = tiny_model(num_experts=2)
"""Fewer experts than the largest world has ranks."""
ODD_EXPERTS = tiny_model(num_experts=2, expert_hidden_size=26)
"""The same, of a width that four ranks cannot share: the split goes along the other side."""
PARTS = {
    "embedding": r"^embed_tokens",
    "lightning": r"^layers\.[02]\.self_attn",
    "softmax": r"^layers\.1\.self_attn",
    "router": r"moe\.gate",
    "experts": r"experts\.w",
    "norms": r"layernorm|^norm",
    "head": r"^lm_head",
}
"""Parts of `tiny_model` in the order of its forward pass, with their parameters' names."""
RELATIVE = 1e-5
WEIGHTS_RELATIVE = 3e-5
"""Adam divides by the gradient's size: where that is near 0, rounding decides the step."""


@dataclass(frozen=True)
class Case:
    """One way to train on a given world."""

    dense: int
    expert: int | None
    model: ModelConfig = field(default_factory=tiny_model)
    dtype: torch.dtype = torch.float32
    checkpointing: str = "none"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        experts = f"{self.model.num_experts}x{self.model.expert_hidden_size}"
        return f"{self.dense}/{self.expert}-{experts}-{dtype}-{self.checkpointing}"


EVERYWHERE = [Case(dense, expert) for dense, expert in STAGES]
CASES = {
    1: [EVERYWHERE[0], Case(3, None, checkpointing="full")],
    2: [
        *EVERYWHERE,
        *[Case(stage, None, checkpointing="full") for stage in (0, 3)],
        *[Case(stage, None, dtype=torch.bfloat16) for stage in (0, 2)],
        Case(3, None, checkpointing="full", dtype=torch.bfloat16),
    ],
    4: [
        *EVERYWHERE[:5],
        *[Case(dense, expert, FEW_EXPERTS) for dense, expert in [(1, None), (3, None), (0, 2)]],
        Case(3, None, ODD_EXPERTS),
    ],
}


@dataclass
class Outcome:
    """What a training gave on one rank."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    parts: list[dict[str, float]] = field(default_factory=list)
    """Gradient norms by part of the model."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of documents of uneven length, with padding at its end."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    num_tokens: int


def micro_batches(step: int) -> list[MicroBatch]:
    batches = []
    for index in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(1000 * step + index)
        # Every third step is easy: its few tokens give a gradient that is large.
        vocabulary = VOCAB_SIZE if step % 3 else 12
        tokens = torch.randint(vocabulary, (1, TOKENS), generator=generator)
        num_tokens = TOKENS - int(torch.randint(0, 9, (), generator=generator))
        cuts = torch.randperm(num_tokens - 1, generator=generator)[:3].sort().values + 1
        ends = [*cuts.tolist(), num_tokens]
        labels = tokens.roll(-1, 1)
        labels[:, [end - 1 for end in ends]] = -100
        labels[:, num_tokens:] = -100
        bounds = sorted({0, *ends, TOKENS})
        batches.append(
            MicroBatch(tokens, labels, torch.tensor(bounds, dtype=torch.int32), num_tokens)
        )
    return batches


def learning_rate(step: int) -> float:
    return OPTIM.lr * min(1.0, (step + 1) / 3)


def forward(model: TextModel, batch: MicroBatch) -> LossOutput:
    output = model(
        batch.input_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        num_tokens=batch.num_tokens,
    )
    assert isinstance(output, LossOutput)
    return output


def loss_of(output: LossOutput, num_labels: int) -> Tensor:
    return output.loss_sum / num_labels + AUX_LOSS_COEF * output.aux_loss / MICRO_BATCHES


def count_labels(batches: list[MicroBatch]) -> int:
    return sum(int((batch.labels != -100).sum()) for batch in batches)


@cache
def reference(num_experts: int, expert_hidden_size: int) -> Outcome:
    """The same training with nothing of `parallel` or `trainer`."""
    config = tiny_model(num_experts=num_experts, expert_hidden_size=expert_hidden_size)
    model = TextModel(config, MoEConfig())
    init_model(model, config, SEED)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIM.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    outcome = Outcome([], [], initial, {})
    for step in range(STEPS):
        batches = micro_batches(step)
        num_labels, total = count_labels(batches), 0.0
        for batch in batches:
            output = forward(model, batch)
            loss_of(output, num_labels).backward()
            total += output.loss_sum.item() / num_labels
        squares = dict.fromkeys(PARTS, 0.0)
        for name, parameter in model.named_parameters():
            (part,) = (p for p, pattern in PARTS.items() if re.search(pattern, name))
            squares[part] += parameter.grad.double().square().sum().item()
        outcome.parts.append({part: math.sqrt(square) for part, square in squares.items()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(total)
        outcome.norms.append(norm.item())
    outcome.final = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


def build(device: torch.device, case: Case) -> tuple[TextModel, ZeroEngine]:
    config = ParallelConfig(zero_stage=case.dense, expert_zero_stage=case.expert)
    with torch.device("meta"):
        model = TextModel(case.model, MoEConfig())
    engine = parallelize(
        model,
        build_mesh(config, device),
        config,
        dtype=case.dtype,
        activation_checkpointing=case.checkpointing,
        compile_blocks=False,
        seed=SEED,
    )
    return model, engine


def whole(engine: ZeroEngine) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in engine.parameters.items()}


def train(device: torch.device, case: Case) -> Outcome:
    model, engine = build(device, case)
    optimizer = Optimizer(engine, OPTIM)
    outcome = Outcome([], [], whole(engine), {})
    for step in range(STEPS):
        batches = micro_batches(step)
        mine = batches[engine.mesh.dp_rank :: engine.mesh.dp]
        num_labels, total = count_labels(batches), torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(mine):
            engine.begin_micro_batch(is_last=index == len(mine) - 1)
            output = forward(model, batch)
            loss_of(output, num_labels).backward()
            total += output.loss_sum.detach().double() / num_labels
        norm = engine.clip_grad_norm(MAX_NORM)
        outcome.parts.append(engine.part_norms())
        optimizer.step(learning_rate(step))
        dist.all_reduce(total)
        outcome.losses.append(total.item())
        outcome.norms.append(norm.item())
    outcome.final = whole(engine)
    return outcome


def train_cases(device: torch.device, cases: list[Case]) -> list[Outcome]:
    return [train(device, case) for case in cases]


def by_case(cases: list[Case], by_rank: list[list[Any]]) -> dict[str, list[Any]]:
    """Lists by rank of what each case gave, under the case's text (a ModelConfig has no hash)."""
    return {str(case): [results[index] for results in by_rank] for index, case in enumerate(cases)}


@cache
def trained(size: int) -> dict[str, list[Outcome]]:
    """Case -> outcome on each rank of a world of `size`."""
    by_rank = run_world(train_cases, size, CASES[size])
    return by_case(CASES[size], by_rank)


ALL = [pytest.param(size, case, id=f"{size}-{case}") for size in CASES for case in CASES[size]]
EXACT = [param for param in ALL if param.values[1].dtype == torch.float32]
ROUNDED = [param for param in ALL if param.values[1].dtype == torch.bfloat16]


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def test_the_reference_clips_some_steps_and_others_not() -> None:
    for experts in (4, 2):
        norms = reference(experts, tiny_model().expert_hidden_size).norms
        assert sum(norm > 1.05 * MAX_NORM for norm in norms) >= 2, norms
        assert sum(norm < 0.95 * MAX_NORM for norm in norms) >= 2, norms


@pytest.mark.parametrize(("size", "case"), EXACT)
def test_training_equals_plain_torch(size: int, case: Case) -> None:
    expected = reference(case.model.num_experts, case.model.expert_hidden_size)
    for rank, outcome in enumerate(trained(size)[str(case)]):
        for step in range(STEPS):
            where = f"rank {rank}, step {step}"
            assert relative(outcome.losses[step], expected.losses[step]) <= RELATIVE, where
            assert relative(outcome.norms[step], expected.norms[step]) <= RELATIVE, where
            assert list(outcome.parts[step]) == list(PARTS)
            for part, norm in outcome.parts[step].items():
                error = abs(norm - expected.parts[step][part])
                assert error <= RELATIVE * expected.norms[step], f"{where}, {part}"
        assert outcome.final.keys() == expected.final.keys()
        for name, weights in expected.final.items():
            difference = (outcome.final[name] - weights).norm() / weights.norm()
            assert difference <= WEIGHTS_RELATIVE, f"rank {rank}, {name}"
            moved = (weights - expected.initial[name]).norm() / weights.norm()
            assert moved > 5e-3, f"{name} hardly trains: no test"


@pytest.mark.parametrize(("size", "case"), ALL)
def test_initial_weights_are_those_of_one_process(size: int, case: Case) -> None:
    expected = reference(case.model.num_experts, case.model.expert_hidden_size).initial
    for outcome in trained(size)[str(case)]:
        assert outcome.initial.keys() == expected.keys()
        for name, weights in expected.items():
            assert torch.equal(outcome.initial[name], weights), name


@pytest.mark.parametrize(("size", "case"), ROUNDED)
def test_bf16_stays_within_its_rounding_of_fp32(size: int, case: Case) -> None:
    # bf16 rounds to 2^-9 = 0.2 %; errors of many roundings add up in the norm, average in the loss.
    expected = reference(case.model.num_experts, case.model.expert_hidden_size)
    for outcome in trained(size)[str(case)]:
        assert outcome.losses != expected.losses
        for step in range(STEPS):
            assert relative(outcome.losses[step], expected.losses[step]) <= 2e-3
            assert relative(outcome.norms[step], expected.norms[step]) <= 3e-2
        assert all(weights.dtype == torch.float32 for weights in outcome.final.values())


# ---- what a rank holds ----


@dataclass
class Holding:
    """Elements that one rank holds of each parameter, and bytes of all its tensors over time."""

    parameters: dict[str, int]
    moments: dict[str, int]
    rest_bytes: int
    """Between two steps: weights and both moments."""
    forward_bytes: int
    """At the end of a forward pass."""
    accumulating_bytes: int
    """Between two backward passes of one step."""


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor):
            continue
        # A gradient that only C++ refers to is no object of Python's.
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if plain is not None and plain.device.type == "cpu":
                storage = plain.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer)


def hold(device: torch.device, cases: list[Case]) -> list[Holding]:
    gc.freeze()  # leaves the objects of all imported modules out of the search
    holdings = []
    for case in cases:
        before = tensor_bytes()
        model, engine = build(device, case)
        optimizer = Optimizer(engine, OPTIM)
        batches = [
            # Few tokens, so that activations weigh nothing beside the weights.
            MicroBatch(
                torch.arange(2 * i, 2 * i + 2)[None],
                torch.arange(2 * i + 1, 2 * i + 3)[None],
                torch.tensor([0, 2], dtype=torch.int32),
                2,
            )
            for i in range(2)
        ]
        during: list[int] = []

        def measure(*_: object, during: list[int] = during) -> None:
            during.append(tensor_bytes())

        hook = model.norm.register_forward_pre_hook(measure)
        for index, batch in enumerate(batches):
            engine.begin_micro_batch(is_last=index == 1)
            forward(model, batch).loss_sum.backward()
            if index == 0:
                accumulating = tensor_bytes()
        hook.remove()
        engine.clip_grad_norm(MAX_NORM)
        optimizer.step(1e-3)
        moments = {name: moment.to_local().numel() for name, moment in optimizer.named_moments()}
        parameters = {name: p.to_local().numel() for name, p in engine.parameters.items()}
        rest = tensor_bytes()
        holdings.append(
            Holding(parameters, moments, rest - before, during[0] - before, accumulating - before)
        )
        del model, engine, optimizer, hook
    return holdings


def norm_of_millions(device: torch.device) -> tuple[float, float]:
    """The norm of one process's gradient, and the same in fp64."""
    mesh = build_mesh(ParallelConfig(), device)
    with torch.device("meta"):
        model = torch.nn.Linear(1024, 4096, bias=False)
    engine = ZeroEngine(model, mesh, dtype=torch.float32)
    engine.shard(model, 1)
    engine.materialize()
    generator = torch.Generator().manual_seed(SEED)
    (parameter,) = engine.parameters.values()
    assert isinstance(parameter, DTensor)
    values = torch.randn(parameter.shape, generator=generator) * 1e-3
    parameter.grad = DTensor.from_local(values, parameter.device_mesh, parameter.placements)
    return engine.clip_grad_norm(None).item(), values.double().norm().item()


def test_the_norm_of_millions_of_numbers_is_exact() -> None:
    """As one fp32 sum it would be off by 1e-5, and depend on how many ranks share the numbers."""
    ((norm, exact),) = run_world(norm_of_millions, 1)
    assert norm == pytest.approx(exact, rel=2e-7)


HELD = [
    *EVERYWHERE,
    *[Case(dense, expert, FEW_EXPERTS) for dense, expert in [(3, None), (0, 2)]],
    Case(3, None, ODD_EXPERTS),
]


@cache
def held() -> dict[str, list[Holding]]:
    by_rank = run_world(hold, 4, HELD)
    return by_case(HELD, by_rank)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in TextModel(config, MoEConfig()).named_parameters()}


@pytest.mark.parametrize("case", HELD, ids=str)
def test_every_parameter_is_held_as_its_stage_says(case: Case) -> None:
    expert_stage = case.dense if case.expert is None else case.expert
    by_rank = held()[str(case)]
    for name, shape in shapes(case.model).items():
        parts = [holding.parameters[name] for holding in by_rank]
        stage = expert_stage if ".experts." in name else case.dense
        if stage == 0:
            assert parts == [shape.numel()] * 4, name
        else:
            assert sum(parts) == shape.numel(), name
            # Split along the first dim that there is enough of; four do not divide 301.
            dim = 0
            if ".experts." in name and shape[0] < 4:
                dim = 1 if shape[1] % 4 == 0 else 2
            largest = math.ceil(shape[dim] / 4) * shape.numel() // shape[dim]
            assert max(parts) == largest, name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert [holding.moments[f"{moment}.{name}"] for holding in by_rank] == parts, name
    assert any(".experts." in name for name in by_rank[0].parameters)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_of_each_stage(stage: int) -> None:
    # The table at the top of parallel/zero.py, in bytes that are really held.
    whole = 4 * sum(shape.numel() for shape in shapes(MANY_EXPERTS).values())
    one_unit = 4 * VOCAB_SIZE * MANY_EXPERTS.hidden_size  # the largest: embedding, or head
    share = 1.0 if stage == 0 else 0.25
    gathered = 0.0 if stage == 3 else 1.0
    gradients = 1.0 if stage <= 1 else 0.25
    for holding in held()[f"{stage}/None-4x24-float32-none"]:
        at_rest = 3 * share * whole
        assert holding.rest_bytes == pytest.approx(at_rest, rel=0.05)
        # Stage 3 has a few units gathered at a time, and torch keeps the last one it reduced.
        in_forward = at_rest + gathered * whole
        assert 0 <= holding.forward_bytes - 0.95 * in_forward <= 3 * one_unit
        accumulating = at_rest + (gathered + gradients) * whole
        assert 0 <= holding.accumulating_bytes - 0.95 * accumulating <= 3 * one_unit
