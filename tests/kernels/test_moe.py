"""Routing, the capacity limit and the expert products against loops."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fulmen.kernels.moe import (
    Routing,
    drop_over_capacity,
    grouped_swiglu,
    late_gradients,
    permutation,
    permute,
    route,
    transpose_segments,
    unpermute,
    with_late_gradients,
)


@pytest.mark.fast
@pytest.mark.parametrize("k", [1, 2, 5])
def test_route_is_the_softmax_of_the_largest_logits(k: int) -> None:
    logits = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    routing = route(logits, k)
    largest, experts = logits.topk(k)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, largest.softmax(-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.probabilities, logits.softmax(-1), rtol=0, atol=1e-14)
    weight = torch.randn(40, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((routing.weights * weight).sum(), logits)
    (want,) = torch.autograd.grad((logits.topk(k)[0].softmax(-1) * weight).sum(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.fast
def test_route_computes_in_fp32() -> None:
    routing = route(torch.randn(6, 4).bfloat16(), 2)
    assert routing.weights.dtype == routing.probabilities.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(6))


@pytest.mark.fast
def test_route_takes_the_lower_of_equal_experts_and_counts() -> None:
    logits = torch.tensor([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [3, 0, 9, 9, 1]])
    routing = route(logits, 2)
    assert routing.experts.tolist() == [[1, 2], [0, 1], [2, 3]]
    assert routing.counts.tolist() == [1, 2, 2, 1, 0]
    assert routing.counts.dtype == routing.experts.dtype == torch.int64


@pytest.mark.fast
def test_padding_goes_to_no_expert() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing, whole = route(logits, 2, num_tokens=4), route(logits, 2)
    assert torch.equal(routing.experts[:4], whole.experts[:4])
    assert torch.equal(routing.weights[:4], whole.weights[:4])
    assert torch.equal(routing.probabilities, whole.probabilities)
    assert (routing.experts[4:] == 4).all()
    assert torch.equal(routing.counts, whole.experts[:4].flatten().bincount(minlength=4))
    (gradient,) = torch.autograd.grad(routing.weights.square().sum(), logits)
    assert gradient[:4].any()
    assert not gradient[4:].any()


@pytest.mark.fast
def test_route_names_what_is_wrong() -> None:
    for logits, k in ((torch.zeros(3), 1), (torch.zeros(3, 4), 5), (torch.zeros(3, 4), 0)):
        with pytest.raises(ValueError, match=r"route: logits must be \[tokens, num_experts\]"):
            route(logits, k)


def serve(experts: list[list[int]], num_experts: int, capacities: list[int]) -> list[list[int]]:
    """First choices in order of tokens, then second ones, as long as there are seats."""
    seats = list(capacities)
    kept = [list(row) for row in experts]
    for choice in range(len(experts[0])):
        for token in range(len(experts)):
            expert = experts[token][choice]
            if expert == num_experts:
                continue
            if seats[expert] == 0:
                kept[token][choice] = num_experts
            else:
                seats[expert] -= 1
    return kept


@pytest.mark.fast
@settings(deadline=None, max_examples=60, database=None)
@given(data=st.data())
def test_capacity_serves_first_choices_first(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(2, 5))
    k = data.draw(st.integers(1, 2))
    rows = st.permutations(range(num_experts)).map(lambda order: list(order[:k]))
    experts = data.draw(st.lists(rows, min_size=1, max_size=30))
    # Padding: tokens which go to no expert and take no seat.
    experts += [[num_experts] * k] * data.draw(st.integers(0, 3))
    a_capacity = st.integers(0, 8)
    capacity = data.draw(a_capacity)
    capacities = data.draw(st.lists(a_capacity, min_size=num_experts, max_size=num_experts))
    weights = torch.rand(len(experts), k)
    probabilities = torch.rand(len(experts), num_experts)
    counts = torch.zeros(num_experts, dtype=torch.int64)
    routing = Routing(torch.tensor(experts), weights, probabilities, counts)
    dropped = drop_over_capacity(routing, num_experts, capacity)
    assert dropped.experts.tolist() == serve(experts, num_experts, [capacity] * num_experts)
    each = drop_over_capacity(routing, num_experts, torch.tensor(capacities))
    assert each.experts.tolist() == serve(experts, num_experts, capacities)
    assert dropped.weights is weights
    assert dropped.probabilities is routing.probabilities
    assert dropped.counts is counts


def random_order(tokens: int, k: int, num_experts: int) -> Tensor:
    """Experts with dropped assignments among them."""
    generator = torch.Generator().manual_seed(tokens + k)
    return torch.randint(0, num_experts + 1, (tokens, k), generator=generator)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"), [(40, 2, 5), (7, 3, 9), (1, 1, 1), (0, 2, 3)]
)
def test_permutation_is_a_stable_sort(tokens: int, k: int, num_experts: int) -> None:
    experts = random_order(tokens, k, num_experts)
    order = permutation(experts, num_experts)
    flat = experts.flatten().tolist()
    by_expert = sorted(range(tokens * k), key=lambda assignment: flat[assignment])
    assert order.destinations.shape == (tokens, k)
    assert [by_expert[row] for row in order.destinations.flatten()] == list(range(tokens * k))
    assert order.counts.tolist() == [flat.count(expert) for expert in range(num_experts)]
    assert order.num_kept.tolist() == [sum(expert < num_experts for expert in flat)]


@pytest.mark.fast
@settings(deadline=None, max_examples=60, database=None)
@given(data=st.data())
def test_transposed_segments_are_sorted_by_the_other_key(data: st.DataObject) -> None:
    outer, inner = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    row_sizes = st.lists(st.integers(0, 3), min_size=inner, max_size=inner)
    sizes = data.draw(st.lists(row_sizes, min_size=outer, max_size=outer))
    keys = [(b, a) for a in range(outer) for b in range(inner) for _ in range(sizes[a][b])]
    rest = data.draw(st.integers(0, 2))
    x = torch.arange(2.0 * (len(keys) + rest), dtype=torch.float64).view(-1, 2).requires_grad_()
    table = torch.tensor(sizes)
    got = transpose_segments(x, table)
    by_inner = sorted(range(len(keys)), key=lambda row: keys[row])
    order = [*by_inner, *range(len(keys), len(keys) + rest)]
    assert torch.equal(got, x[torch.tensor(order, dtype=torch.int64)])
    assert torch.equal(transpose_segments(got, table.t()), x)
    if len(order):
        (gradient,) = torch.autograd.grad((got * got.detach()).sum(), x)
        assert torch.equal(gradient, x)


@pytest.mark.fast
def test_transpose_segments_names_what_is_wrong() -> None:
    for x, sizes in (
        (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(2, 2)),
    ):
        with pytest.raises(ValueError, match=r"transpose_segments: x must be \[rows, hidden"):
            transpose_segments(x, sizes)


@pytest.mark.fast
@pytest.mark.parametrize("k", [1, 2, 3])
def test_permute_and_unpermute_equal_loops(k: int) -> None:
    tokens, hidden = 9, 5
    experts = random_order(tokens, k, 4)
    order = permutation(experts, 4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    rows = permute(x, order)
    kept = int(order.num_kept)
    assert not rows[kept:].any()
    for token in range(tokens):
        for choice in range(k):
            if experts[token, choice] < 4:
                assert torch.equal(rows[order.destinations[token, choice]], x[token])
    chosen = (experts < 4).double()
    assert torch.equal(unpermute(rows, None, order), chosen.sum(1, keepdim=True) * x)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(gradient, chosen.sum(1, keepdim=True).expand(-1, hidden))

    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    weights = weights.masked_fill(experts == 4, float("nan")).requires_grad_()
    outputs = torch.randn(tokens * k, hidden, generator=generator, dtype=torch.float64)
    outputs[kept:] = float("nan")
    outputs.requires_grad_()
    got = unpermute(outputs, weights, order)
    want = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for choice in range(k):
            if experts[token, choice] < 4:
                row = outputs[order.destinations[token, choice]]
                want[token] = want[token] + weights[token, choice] * row
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    projection = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((got * projection).sum(), [outputs, weights])
    theirs = torch.autograd.grad((want * projection).sum(), [outputs, weights])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.fast
def test_orders_name_what_is_wrong() -> None:
    order = permutation(random_order(4, 2, 3), 3)
    for experts in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"experts must be \[tokens, k\] int64"):
            permutation(experts, 3)
    with pytest.raises(ValueError, match=r"for the permutation's 4 tokens, got \(5, 8\)"):
        permute(torch.zeros(5, 8), order)
    with pytest.raises(ValueError, match=r"rows must be \[8, hidden_size\], got \(4, 8\)"):
        unpermute(torch.zeros(4, 8), None, order)
    with pytest.raises(ValueError, match=r"weights must be \(4, 2\), got \(8,\)"):
        unpermute(torch.zeros(8, 8), torch.zeros(8), order)


def loop(x: Tensor, counts: list[int], w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Row by row."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [
        w2[e] @ (F.silu(w1[e] @ row) * (w3[e] @ row)) for e, row in zip(owners, x, strict=False)
    ]
    empty = [torch.zeros(w2.shape[1], dtype=x.dtype)] * (x.shape[0] - len(rows))
    return torch.stack(rows + empty)


@pytest.mark.fast
@pytest.mark.parametrize(
    "counts", [[3, 4, 5], [0, 12, 0], [12, 0, 0], [0, 0, 12], [2, 0, 3], [0, 1, 0]]
)
def test_grouped_swiglu_equals_a_loop(counts: list[int]) -> None:
    """Of 12 rows; those behind the last group give 0 and get no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 4), (3, 7, 4), (3, 7, 4), (3, 4, 7)]
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    x, *weights = leaves
    got = grouped_swiglu(x, torch.tensor(counts), *weights)
    want = loop(x, counts, *weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    projection = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((got * projection).sum(), leaves)
    theirs = torch.autograd.grad((want * projection).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (mine[0][sum(counts) :] == 0).all()


@pytest.mark.fast
@pytest.mark.parametrize("counts", [[3, 4, 5], [0, 12, 0], [2, 0, 3], [0, 0, 0]])
def test_late_gradients_are_the_same(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    log = []
    weights_backward = late_gradients.reference_weights_backward

    def logged(*arguments: Any) -> Any:
        log.append("weights")
        return weights_backward(*arguments)

    monkeypatch.setattr(late_gradients, "reference_weights_backward", logged)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 4), (3, 7, 4), (3, 7, 4), (3, 4, 7)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    leaves[0][sum(counts) :] = float("nan")
    x, *weights = [leaf.requires_grad_() for leaf in leaves]
    projection = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    want = grouped_swiglu(x, torch.tensor(counts), *weights)
    theirs = torch.autograd.grad((want * projection).sum(), leaves)

    before = x.view_as(x)
    before.register_hook(lambda _: log.append("before"))
    late = with_late_gradients(*weights)
    after = before.view_as(x)
    after.register_hook(lambda _: log.append("after"))
    got = grouped_swiglu(after, torch.tensor(counts), *late)
    mine = torch.autograd.grad((got * projection).sum(), leaves)
    assert log == ["after", "weights", "before"]
    for a, b in zip((got, *mine), (want, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.fast
def test_late_gradients_of_frozen_weights_are_not_computed() -> None:
    x, weights = torch.randn(6, 4).requires_grad_(), [torch.randn(2, 7, 4), torch.randn(2, 7, 4)]
    *matrices, late = with_late_gradients(*weights, torch.randn(2, 4, 7))
    grouped_swiglu(x, torch.tensor([3, 3]), *matrices, late).sum().backward()
    assert late.compute is None
    assert x.grad is not None
    assert x.grad.abs().min() > 0


@pytest.mark.fast
def test_rows_behind_the_last_group_may_hold_anything() -> None:
    x = torch.randn(6, 4)
    x[4:] = float("nan")
    w1, w3, w2 = torch.randn(2, 7, 4), torch.randn(2, 7, 4), torch.randn(2, 4, 7)
    for weight in (w1, w3, w2):
        weight.requires_grad_()
    output = grouped_swiglu(x, torch.tensor([3, 1]), w1, w3, w2)
    assert (output[4:] == 0).all()
    output.sum().backward()
    for weight in (w1, w3, w2):
        assert weight.grad is not None
        assert weight.grad.isfinite().all()


@pytest.mark.fast
def test_grouped_swiglu_names_what_is_wrong() -> None:
    x, counts = torch.zeros(6, 4), torch.tensor([3, 1])
    w1, w2 = torch.zeros(2, 7, 4), torch.zeros(2, 4, 7)
    for arguments in (
        (x.t(), counts, w1, w1, w2),
        (x, counts[:1], w1, w1, w2),
        (x, counts, w1, w1[:, :6], w2),
        (x, counts, w1, w1, w1),
    ):
        with pytest.raises(ValueError, match="do not fit: got "):
            grouped_swiglu(*arguments)
    with pytest.raises(ValueError, match="must share one dtype"):
        grouped_swiglu(x.bfloat16(), counts, w1, w1, w2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[30, 40, 50], [0, 120, 0], [0, 0, 0], [20, 0, 30], [120, 0, 0]])
def test_grouped_swiglu_on_a_gpu_equals_the_loop_of_the_cpu(counts: list[int]) -> None:
    """bf16, grouped matrix products; poisoned rows behind the last group."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(120, 32), (3, 64, 32), (3, 64, 32), (3, 32, 64)]
    low = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
    projection = torch.randn(120, 32, generator=generator).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [x.to(device, dtype) for x in low]
        if device == "cuda":
            leaves[0][sum(counts) :] = float("nan")
        leaves = [x.requires_grad_() for x in leaves]
        output = grouped_swiglu(leaves[0], torch.tensor(counts, device=device), *leaves[1:])
        loss = (output * projection.to(device, dtype)).sum()
        results.append([output, *torch.autograd.grad(loss, leaves)])
    for name, got, want in zip(("y", "x", "w1", "w3", "w2"), *results, strict=True):
        error = (got.cpu().double() - want).abs().max()
        assert error <= 2e-2 * want.abs().max(), name
