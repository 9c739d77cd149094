"""Experts spread over ranks: one layer against the same layer on one rank, each exchange broken."""

import math
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.worlds import run_world
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fulmen.kernels.moe import Routing, drop_over_capacity, late_gradients, route
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.moe import Experts, MoE, load_balancing_loss
from fulmen.parallel import all_to_all, expert, router
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.expert import WIDTH_DIM
from fulmen.parallel.mesh import Mesh, build_mesh
from fulmen.parallel.plan import spread_moe
from fulmen.parallel.router import share_capacity

HIDDEN, INNER, EXPERTS, CHOICES, TOKENS = 8, 16, 8, 2, 11
MODEL = ModelConfig(1, HIDDEN, 1, 1, 8, 4, EXPERTS, CHOICES, INNER, 5)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """A mesh and a limit on what an expert takes."""

    ep: int
    etp: int
    groups: int = 2
    capacity_factor: float | None = None
    global_router: bool = False
    skew: float = 3.0


SIZES = {
    2: [
        Case(2, 1),
        Case(1, 2),
        Case(2, 1, groups=1, capacity_factor=0.7),
        Case(1, 2, capacity_factor=1.3),
        Case(2, 1, capacity_factor=0.8, global_router=True),
        Case(1, 1, capacity_factor=0.8, global_router=True),
        Case(2, 1, groups=30),
    ],
    4: [
        Case(4, 1, skew=30.0),
        Case(2, 2, groups=3),
        Case(2, 1, groups=1),
        Case(2, 2, capacity_factor=0.6),
        Case(2, 2, capacity_factor=20.0),
        Case(2, 1, groups=3, capacity_factor=1.0),
        Case(2, 2, capacity_factor=0.6, global_router=True),
    ],
    8: [Case(4, 2), Case(8, 1), Case(2, 4), Case(2, 2, capacity_factor=0.9)],
}


def whole_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    return {
        name: torch.randn(EXPERTS, *shape, generator=generator, dtype=torch.float64).to(dtype) / 3
        for name, shape in shapes.items()
    }


def inputs_of(rank: int, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens, router logits, weights of the outputs, and how many tokens are real: on rank 1 none.

    The first experts are liked best; with a large skew the last ones get nothing.
    """
    generator = torch.Generator().manual_seed(100 + rank)
    x, out = (torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    logits = logits - case.skew * torch.linspace(0, 1, EXPERTS) * (rank % 3)
    return x.requires_grad_(), logits.requires_grad_(), out, 0 if rank == 1 else TOKENS - rank % 4


def local_part(tensor: Tensor, name: str, mesh: Mesh) -> Tensor:
    mine = tensor.chunk(mesh.ep)[mesh.ep_rank]
    return mine.chunk(mesh.etp, WIDTH_DIM[name])[mesh.etp_rank]


def spread_layer(device: torch.device, case: Case, dtype: torch.dtype) -> tuple[MoE, Mesh]:
    mesh = build_mesh(ParallelConfig(ep=case.ep, etp=case.etp), device)
    with torch.device("meta"):
        layer = MoE(MODEL, MoEConfig(case.capacity_factor, global_router=case.global_router))
    spread_moe(layer, mesh, num_groups=case.groups)
    layer.experts.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in whole_weights(dtype).items():
            weight = getattr(layer.experts, name)
            held = weight.to_local() if isinstance(weight, DTensor) else weight
            held.copy_(local_part(tensor, name, mesh))
    return layer, mesh


def run_layer(
    layer: MoE, x: Tensor, logits: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor | int, Routing]:
    """What `MoE.forward` does, from given logits on."""
    routing = route(logits, CHOICES, num_tokens=num_tokens)
    allowed: int | Tensor = TOKENS * CHOICES
    if layer.capacity_factor is not None:
        capacity = math.ceil(layer.capacity_factor * num_tokens * CHOICES / EXPERTS)
        allowed = layer.allowance(routing.counts, capacity)
        routing = drop_over_capacity(routing, EXPERTS, allowed)
    most_rows = layer._most_rows(x)
    return layer.experts(x, routing.experts, routing.weights, most_rows), allowed, routing


@dataclass
class Part:
    """What one rank gives."""

    output: Tensor
    gradients: list[Tensor]
    """Of its tokens and logits."""
    weights: dict[str, Tensor]
    """Gradients, whole, zero where the rank holds nothing."""
    allowed: Tensor | int
    kept: Tensor


def on_many_ranks(
    device: torch.device, cases: list[Case], dtype: torch.dtype, broken: str = ""
) -> list[Part]:
    break_exchange(broken)
    # Believing wrong counts reads rows that nobody sent, and the second pass has to read the same.
    fill_rooms(float("nan") if broken != "counts" else 7.0)
    parts = []
    for case in cases:
        layer, mesh = spread_layer(device, case, dtype)
        x, logits, weight, num_tokens = inputs_of(dist.get_rank(), case, dtype)
        output, allowed, routing = run_layer(layer, x, logits, num_tokens)
        gradients = torch.autograd.grad((output * weight).sum(), (x, logits), retain_graph=True)
        # A second time from the start: an exchange serves one forward and one backward pass.
        output, allowed, routing = run_layer(layer, x, logits, num_tokens)
        (output * weight).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, gradients[0])
        weights = {}
        for name in WIDTH_DIM:
            gradient = getattr(layer.experts, name).grad
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            weights[name] = torch.zeros_like(whole_weights(dtype)[name])
            local_part(weights[name], name, mesh).copy_(gradient)
        parts.append(Part(output.detach(), list(gradients), weights, allowed, routing.experts))
    return parts


def on_one_rank(case: Case, rank: int, kept: Tensor) -> tuple[Part, Tensor]:
    """The same tokens with the same kept assignments in fp64; also what was kept locally."""
    experts = Experts(MODEL).double()
    for name, tensor in whole_weights(torch.float64).items():
        getattr(experts, name).data = tensor.requires_grad_()
    x, logits, weight, num_tokens = inputs_of(rank, case, torch.float64)
    routing = route(logits, CHOICES, num_tokens=num_tokens)
    output = experts(x, kept, routing.weights)
    gradients = torch.autograd.grad(
        (output * weight).sum(), (x, logits, *(getattr(experts, n) for n in WIDTH_DIM))
    )
    weights = dict(zip(WIDTH_DIM, gradients[2:], strict=True))
    if case.capacity_factor is not None:
        capacity = math.ceil(case.capacity_factor * num_tokens * CHOICES / EXPERTS)
        routing = drop_over_capacity(routing, EXPERTS, capacity)
    return Part(output.detach(), list(gradients[:2]), weights, 0, kept), routing.experts


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=0.1))


def largest_error(cases: list[Case], by_rank: list[list[Part]]) -> list[float]:
    """By case, over outputs and all gradients."""
    errors = []
    for index, case in enumerate(cases):
        worst = 0.0
        parts = [results[index] for results in by_rank]
        total = {name: torch.zeros_like(w) for name, w in whole_weights(torch.float64).items()}
        for rank, part in enumerate(parts):
            want, local = on_one_rank(case, rank, part.kept)
            if not case.global_router:
                assert torch.equal(part.kept, local)
            worst = max(worst, error(part.output, want.output))
            for got, expected in zip(part.gradients, want.gradients, strict=True):
                worst = max(worst, error(got, expected))
            for name, gradient in want.weights.items():
                total[name] += gradient
        for name, gradient in total.items():
            got = torch.stack([part.weights[name] for part in parts]).double().sum(0)
            worst = max(worst, error(got, gradient))
        errors.append(worst)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_layer_equals_one_rank(size: int, dtype: torch.dtype) -> None:
    by_rank = run_world(on_many_ranks, size, SIZES[size], dtype)
    for case, worst in zip(SIZES[size], largest_error(SIZES[size], by_rank), strict=True):
        assert worst <= TOLERANCES[dtype], case


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "global counts"])
def test_the_global_router_decides_the_same_everywhere(broken: str) -> None:
    case = Case(1, 1, capacity_factor=0.6, global_router=True)
    by_rank = run_world(on_many_ranks, 4, [case, case], torch.float32, broken)
    asked = []
    for rank in range(4):
        _, logits, _, num_tokens = inputs_of(rank, case, torch.float32)
        counts = route(logits, CHOICES, num_tokens=num_tokens).counts
        asked.append((counts, math.ceil(0.6 * num_tokens * CHOICES / EXPERTS)))
    counts, capacities = (torch.stack([torch.as_tensor(a[i]) for a in asked]) for i in range(2))
    shares = share_capacity(counts, capacities)
    allowed = torch.stack([cast(Tensor, first.allowed) for first, _ in by_rank])
    assert torch.equal(allowed, shares) == (not broken)
    for rank, (first, second) in enumerate(by_rank):
        assert torch.equal(first.kept, second.kept)
        kept = first.kept.flatten().bincount(minlength=EXPERTS + 1)[:EXPERTS]
        assert torch.equal(kept, torch.minimum(allowed[rank], counts[rank]))
    dropped = (counts - shares).sum()
    assert dropped == (counts.sum(0) - capacities.sum()).clamp(min=0).sum()
    assert 0 < dropped < (counts - capacities[:, None]).clamp(min=0).sum()


def auxiliary_losses(device: torch.device) -> tuple[float, float]:
    """This rank's part of the loss over all ranks, and its own one alone."""
    config, mesh = ParallelConfig(ep=2), build_mesh(ParallelConfig(ep=2), device)
    x, _, _, num_tokens = inputs_of(mesh.rank, Case(2, 1), torch.float32)
    losses = []
    for scope in ("global", "micro_batch"):
        torch.manual_seed(0)
        layer = MoE(MODEL, MoEConfig(aux_loss_scope=scope))
        spread_moe(layer, mesh, num_groups=config.expert_token_groups)
        layer.experts.to_empty(device=device)
        with torch.no_grad():
            layer.gate.weight[0] += mesh.rank  # so that the ranks differ
            loss = layer(x[None], num_tokens)[1].aux_loss
            losses.append(loss.item())
    return losses[0], losses[1]


@pytest.mark.slow
def test_a_global_auxiliary_loss_is_that_of_all_tokens_together() -> None:
    by_rank = run_world(auxiliary_losses, 4)
    counts, probabilities = [], []
    for rank in range(4):
        x, _, _, num_tokens = inputs_of(rank, Case(2, 1), torch.float32)
        torch.manual_seed(0)
        layer = MoE(MODEL, MoEConfig())
        with torch.no_grad():
            layer.gate.weight[0] += rank
        routing = route(layer.gate(x), CHOICES, num_tokens=num_tokens)
        counts.append(routing.counts)
        probabilities.append(routing.probabilities[:num_tokens])
        local = load_balancing_loss(routing.counts, probabilities[-1], CHOICES)
        assert by_rank[rank][1] == pytest.approx(local.item(), rel=1e-5)
    want = load_balancing_loss(torch.stack(counts).sum(0), torch.cat(probabilities), CHOICES)
    assert sum(part for part, _ in by_rank) == pytest.approx(want.item(), rel=1e-5)


counts_of_ranks = st.integers(1, 6).flatmap(
    lambda ranks: st.tuples(
        st.lists(
            st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=ranks, max_size=ranks
        ),
        st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks),
    )
)


@pytest.mark.fast
@given(counts_of_ranks)
@settings(deadline=None)
def test_a_shared_capacity_is_used_up_and_fair(drawn: tuple[list, list]) -> None:
    counts, capacities = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    shares = share_capacity(counts, capacities)
    own = torch.minimum(counts, capacities[:, None])
    assert (own <= shares).all()
    assert (shares <= counts).all()
    assert torch.equal(shares.sum(0), torch.minimum(counts.sum(0), capacities.sum()))
    # Each rank with too many gets its proportion of what is free, to less than one.
    over = (counts - own).double()
    wanted = over * (shares - own).sum(0) / over.sum(0).clamp(min=1)
    assert ((shares - own - wanted).abs() < 1).all()


def fill_rooms(value: float) -> None:
    """What lies in memory for several exchanges before their rows do."""
    room = all_to_all.Parts.room

    def filled(self: all_to_all.Parts, index: int, like: Tensor) -> Tensor:
        if self._whole is None:
            room(self, index, like)
            cast(Tensor, self._whole).fill_(value)
        return room(self, index, like)

    all_to_all.Parts.room = filled  # type: ignore[method-assign]


# ---- every exchange matters ----


def break_exchange(broken: str) -> None:
    """Take the effect of one exchange away, in this process."""
    if broken.removesuffix(" backward") in LEGS:
        issue, make_leg = all_to_all.AllToAll.issue, expert.make_leg

        def labelled(*args: Any) -> expert.Leg:
            leg = make_leg(*args)
            for name in LEGS:
                getattr(leg, name).label = name
            return leg

        def issue_nothing(self: Any, rows: Tensor, *, backward: bool) -> Tensor:
            arriving = issue(self, rows, backward=backward)
            if self.label + " backward" * backward == broken:
                self._pending[0].wait()
                arriving.zero_()
            return arriving

        expert.make_leg = labelled
        all_to_all.AllToAll.issue = issue_nothing  # type: ignore[method-assign]
    elif broken == "counts":
        # Everybody believes the others to have a row for each expert; other sizes would hang.
        def one_each(counts: Tensor, mesh: Mesh) -> Any:
            table = counts.new_ones(mesh.ep, mesh.etp, *counts.shape)
            return table, lambda: table

        expert._exchange_counts = one_each
    elif broken == "global counts":
        router.dist.all_gather = lambda table, mine, group: [t.copy_(mine) for t in table]
    else:
        assert not broken


LEGS = ["there", "gather", "reduce", "back"]
BREAKABLE = ["", *LEGS, *[f"{leg} backward" for leg in LEGS]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "factor"),
    [("counts", None), *[(broken, factor) for broken in BREAKABLE for factor in (None, 0.9)]],
)
def test_every_exchange_matters(broken: str, factor: float | None) -> None:
    cases = [Case(2, 2, capacity_factor=factor)]
    by_rank = run_world(on_many_ranks, 4, cases, torch.float64, broken)
    (worst,) = largest_error(cases, by_rank)
    assert worst > 1e-2 if broken else worst <= 1e-12


@pytest.mark.slow
def test_buffers_need_no_counts() -> None:
    case = Case(2, 2, capacity_factor=0.9)
    by_rank = run_world(count_host_reads, 4, case)
    assert by_rank == [[0, 1]] * 4


def count_host_reads(device: torch.device, case: Case) -> list[int]:
    """Exchanges of counts with a capacity of each rank's own, and without one."""
    numbers = []
    exchange_counts = expert._exchange_counts
    for factor in (case.capacity_factor, None):
        calls = []

        def counted(*args: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return exchange_counts(*args)

        expert._exchange_counts = counted
        layer, _ = spread_layer(device, Case(case.ep, case.etp, 2, factor), torch.float32)
        x, logits, _, num_tokens = inputs_of(dist.get_rank(), case, torch.float32)
        run_layer(layer, x, logits, num_tokens)
        numbers.append(len(calls))
    return numbers


@pytest.mark.slow
def test_exchanges_run_beside_the_work_on_other_groups() -> None:
    for log in run_world(order_of_events, 2, Case(2, 1)):
        there, back = "there issue", "back issue"
        assert log[: log.index("loss")] == [
            *[f"{there} 0", f"{there} 1"],
            *["there finish 0", "work", f"{back} 0"],
            *["there finish 1", "work", f"{back} 1"],
            *["back finish 0", "back finish 1"],
        ]
        # Backward the same, with the ways exchanged and the last group first, and the products for
        # the weights behind what sends a group's gradients.
        assert log[log.index("loss") + 1 :] == [
            *[f"{back} 1", f"{back} 0"],
            *["back finish 1", "work", f"{there} 1", "weights"],
            *["back finish 0", "work", f"{there} 0", "weights"],
            *["there finish 0", "there finish 1"],
        ]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 0.9])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_one_group_travel_beside_the_products_for_the_weights(
    factor: float | None, checkpointed: bool
) -> None:
    case = Case(2, 1, groups=1, capacity_factor=factor)
    for log in run_world(order_of_events, 2, case, checkpointed):
        forward, backward = log[: log.index("loss")], log[log.index("loss") + 1 :]
        assert forward == [
            *["there issue 0", "there finish 0", "work"],
            *["back issue 0", "back finish 0"],
        ]
        if checkpointed:
            assert backward[: len(forward)] == [event.replace("0", "1") for event in forward]
            backward = backward[len(forward) :]
        assert backward == [
            *["back issue 0", "back finish 0", "work"],
            *["there issue 0", "weights", "there finish 0"],
        ]


@pytest.mark.slow
def test_gathers_run_beside_the_work_on_other_groups() -> None:
    for numbered in run_world(order_of_events, 4, Case(2, 2, groups=3)):
        log = [" ".join(event.split()[:2]) for event in numbered]  # without the groups' numbers
        forward = log[: log.index("loss")]
        backward = [event for event in log[log.index("loss") + 1 :] if event != "weights"]
        swapped = {"there": "back", "back": "there", "gather": "reduce", "reduce": "gather"}
        mirrored = []
        for event in backward:
            name, *rest = event.split()
            mirrored.append(" ".join([swapped.get(name, name), *rest]))
        assert mirrored == forward
        for way in ("there", "gather", "reduce", "back"):
            assert forward.count(f"{way} issue") == forward.count(f"{way} finish") == 3
        # Of the second group, whose work is in the middle.
        first, second, third = (i for i, event in enumerate(forward) if event == "work")
        assert forward[:3] == ["there issue"] * 3
        assert positions(forward, "gather issue")[1] < first
        assert positions(forward, "gather issue")[2] < second
        assert positions(forward, "reduce finish")[0] > second
        assert positions(forward, "back issue")[0] < third


def positions(log: list[str], event: str) -> list[int]:
    return [index for index, entry in enumerate(log) if entry == event]


def order_of_events(device: torch.device, case: Case, checkpointed: bool = False) -> list[str]:
    """What one rank issues, waits for and computes, in a forward and a backward pass."""
    log: list[str] = []
    numbers = count()
    make_leg, grouped_swiglu = expert.make_leg, expert.grouped_swiglu
    weights_backward = late_gradients.reference_weights_backward

    def logged_leg(*args: Any) -> expert.Leg:
        leg, number = make_leg(*args), next(numbers)
        for name in LEGS:
            watch(getattr(leg, name), name, number)
        return leg

    def watch(instance: Any, name: str, number: int) -> None:
        issue, finish = instance.issue, instance.finish

        def logged_issue(rows: Tensor, *, backward: bool) -> Tensor:
            log.append(f"{name} issue {number}")
            return issue(rows, backward=backward)

        def logged_finish() -> Tensor:
            log.append(f"{name} finish {number}")
            return finish()

        instance.issue, instance.finish = logged_issue, logged_finish

    def logged_weights(*arguments: Tensor) -> Any:
        log.append("weights")
        return weights_backward(*arguments)

    def logged_work(rows: Tensor, *rest: Any) -> Tensor:
        log.append("work")
        output = grouped_swiglu(rows, *rest)
        output.register_hook(lambda _: log.append("work"))
        return output

    expert.make_leg, expert.grouped_swiglu = logged_leg, logged_work
    late_gradients.reference_weights_backward = logged_weights
    layer, _ = spread_layer(device, case, torch.float32)
    x, logits, _, num_tokens = inputs_of(dist.get_rank(), case, torch.float32)

    def run(x: Tensor, logits: Tensor) -> Tensor:
        return run_layer(layer, x, logits, num_tokens)[0]

    output = checkpoint(run, x, logits, use_reentrant=False) if checkpointed else run(x, logits)
    log.append("loss")
    output.sum().backward()
    return log
