"""The Triton kernels of the mixture of experts against the references in fp64.

With a GPU the tests run on it (marker gpu), without one in Triton's interpreter.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.interpreter import (
    DEVICE,
    INTERPRETED,
    assert_near,
    compiles_only,
    on_gpu_only,
    on_kernels,
    run_in_interpreter,
    without_kernels,
)
from torch import Tensor

from fulmen.kernels.moe import (
    drop_over_capacity,
    grouped_swiglu,
    permutation,
    permute,
    route,
    transpose_segments,
    triton_experts,
    unpermute,
    with_late_gradients,
)
from fulmen.kernels.moe.late_gradients import late_grouped_swiglu
from fulmen.kernels.moe.reference import (
    reference_grouped_swiglu,
    reference_permutation,
    reference_permute,
    reference_route,
    reference_transpose_segments,
    reference_unpermute,
)
from fulmen.kernels.moe.triton_experts import (
    _grouped_swiglu,
    _grouped_swiglu_backward,
    fused_grouped_swiglu,
    weights_backward,
)
from fulmen.kernels.moe.triton_permute import (
    triton_permutation,
    triton_permute,
    triton_unpermute,
    triton_unpermute_backward,
)
from fulmen.kernels.moe.triton_router import _route, _route_backward, triton_route
from fulmen.kernels.moe.triton_segments import triton_transpose_segments

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
"""Largest error over largest value. bf16: the interpreter truncates where the GPU rounds."""
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def exact(x: Tensor) -> Tensor:
    """A leaf in fp64 with the same values, on the CPU."""
    return x.detach().cpu().double().requires_grad_()


def random_experts(tokens: int, k: int, num_experts: int, *, dropped: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.randint(0, num_experts + dropped, (tokens, k), generator=generator)
    return experts.to(DEVICE)


def compare_gradients(
    mine: Tensor,
    wanted: Tensor,
    leaves: list[Tensor],
    wanted_leaves: list[Tensor],
    *,
    least: float = 1e-3,
) -> None:
    """Of a random projection, whose numbers bf16 holds exactly."""
    projection = random(*mine.shape, dtype=torch.bfloat16, seed=7)
    got = torch.autograd.grad(mine, leaves, projection.to(mine.dtype), retain_graph=True)
    given = projection.cpu().to(wanted.dtype)
    want = torch.autograd.grad(wanted, wanted_leaves, given, retain_graph=True)
    for index, (leaf, a, b) in enumerate(zip(leaves, got, want, strict=True)):
        assert a.dtype == leaf.dtype
        assert_near(a, b, TOLERANCE[leaf.dtype], f"gradient {index}", least=least)


# The router.


@on_kernels
@BOTH
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "num_tokens"),
    [(70, 32, 2, None), (33, 5, 1, 20), (1, 4, 4, None), (9, 200, 8, 9), (17, 1, 1, 0)],
)
def test_route(
    tokens: int, num_experts: int, k: int, num_tokens: int | None, dtype: torch.dtype
) -> None:
    logits = random(tokens, num_experts, dtype=dtype).requires_grad_()
    experts, weights, probabilities, counts = triton_route(logits, k, num_tokens)
    wanted_logits = exact(logits)
    wanted = reference_route(wanted_logits, k, num_tokens)
    assert torch.equal(experts.cpu(), wanted[0])
    assert torch.equal(counts.cpu(), wanted[3])
    assert weights.dtype == probabilities.dtype == torch.float32
    assert_near(weights, wanted[1], 1e-6, "weights")
    assert_near(probabilities, wanted[2], 1e-6, "probabilities")
    # The one weight of k = 1 is 1 whatever the logits: its gradient is the rounding of 1 - 1.
    compare_gradients(weights, wanted[1], [logits], [wanted_logits], least=0.1)
    compare_gradients(probabilities, wanted[2], [logits], [wanted_logits])
    compare_gradients(
        torch.cat([weights, probabilities], 1),
        torch.cat([wanted[1], wanted[2]], 1),
        [logits],
        [wanted_logits],
    )


@on_kernels
def test_route_takes_the_lower_of_equal_experts() -> None:
    logits = torch.tensor([[1.0, 2, 2, 0, 2], [0] * 5, [3, 0, 9, 9, 1]], device=DEVICE)
    logits = torch.cat([logits, torch.tensor([[float("-inf")] * 4 + [0.0]], device=DEVICE)])
    experts, _, _, counts = triton_route(logits, 2, None)
    assert experts.tolist() == [[1, 2], [0, 1], [2, 3], [4, 0]]
    assert counts.tolist() == [2, 2, 2, 1, 1]


@on_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_route_survives_nan() -> None:
    """Every choice is an expert, and the weights say that something is wrong."""
    logits = random(3, 6)
    logits[1] = float("nan")
    logits[2, 4] = float("nan")
    experts, weights, _, counts = triton_route(logits, 3, None)
    assert ((experts >= 0) & (experts < 6)).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())
    assert counts.sum() == 9
    assert weights[0].isfinite().all()
    assert weights[1:].isnan().all()


@on_kernels
def test_route_takes_any_layout() -> None:
    logits = random(6, 40).t()
    want = triton_route(logits.contiguous(), 2, None)
    for a, b in zip(triton_route(logits, 2, None), want, strict=True):
        assert torch.equal(a, b)
    leaf = random(40, 6).requires_grad_()
    triton_route(leaf, 2, None)[2].sum().backward()  # the gradient arrives expanded
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-6


# Order by expert.


@on_kernels
@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(1, 1, 1), (63, 2, 4), (64, 2, 3), (43, 3, 200), (130, 2, 33), (0, 2, 5)],
)
def test_permutation(tokens: int, k: int, num_experts: int) -> None:
    experts = random_experts(tokens, k, num_experts)
    wanted = reference_permutation(experts.cpu(), num_experts)
    for a, b in zip(triton_permutation(experts, num_experts), wanted, strict=True):
        assert torch.equal(a.cpu(), b)
    column = experts.t().contiguous().t()  # as the capacity limit leaves it
    for a, b in zip(triton_permutation(column, num_experts), wanted, strict=True):
        assert torch.equal(a.cpu(), b)


@on_kernels
@BOTH
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("k", "hidden"), [(1, 8), (2, 24), (3, 40), (2, 2056), (8, 16)])
def test_permute_and_unpermute(k: int, hidden: int, dropped: bool, dtype: torch.dtype) -> None:
    tokens = 5
    experts = random_experts(tokens, k, 3, dropped=dropped)
    destinations, _, num_kept = triton_permutation(experts, 3)
    order = (destinations.cpu(), num_kept.cpu())
    x = random(tokens, hidden, dtype=dtype).requires_grad_()
    rows = triton_permute(x, destinations, num_kept)
    wanted_x = exact(x)
    wanted = reference_permute(wanted_x, *order)
    assert rows.dtype == dtype
    assert torch.equal(rows.detach().cpu().double(), wanted.detach())
    compare_gradients(rows, wanted, [x], [wanted_x])

    leaf = random(tokens * k, hidden, dtype=dtype, seed=1)
    leaf[int(num_kept) :] = float("nan")
    weights = random(tokens, k, seed=2).masked_fill(experts == 3, float("nan")).requires_grad_()
    leaf.requires_grad_()
    got = triton_unpermute(leaf, weights, destinations, num_kept)
    wanted_leaves = [exact(leaf), exact(weights)]
    want = reference_unpermute(*wanted_leaves, *order)
    assert got.dtype == dtype
    assert_near(got, want, TOLERANCE[dtype], "weighted sum")
    compare_gradients(got, want, [leaf, weights], wanted_leaves)

    got = triton_unpermute(leaf, None, destinations, num_kept)
    want = reference_unpermute(wanted_leaves[0], None, *order)
    assert_near(got, want, TOLERANCE[dtype], "sum")
    compare_gradients(got, want, [leaf], wanted_leaves[:1])


@on_kernels
def test_permute_takes_any_layout() -> None:
    experts = random_experts(5, 2, 3)
    destinations, _, num_kept = triton_permutation(experts, 3)
    x = random(8, 5).t().requires_grad_()
    rows = triton_permute(x, destinations, num_kept)
    assert torch.equal(rows, triton_permute(x.contiguous(), destinations, num_kept))
    weights = random(2, 5).t()
    out = triton_unpermute(rows.t().contiguous().t(), weights, destinations, num_kept)
    assert torch.equal(out, triton_unpermute(rows, weights.contiguous(), destinations, num_kept))
    (gradient,) = torch.autograd.grad(out.sum(), x)  # it arrives expanded
    chosen = torch.where(experts < 3, weights, 0).sum(1, keepdim=True)
    assert_near(gradient, chosen.expand(-1, 8), 1e-6, "gradient of a sum")


@on_kernels
def test_no_tokens() -> None:
    experts = random_experts(0, 2, 3)
    destinations, counts, num_kept = triton_permutation(experts, 3)
    assert counts.tolist() == [0, 0, 0]
    x = random(0, 16).requires_grad_()
    weights = random(0, 2).requires_grad_()
    rows = triton_permute(x, destinations, num_kept)
    leaves = [random(2, *shape).requires_grad_() for shape in ((24, 16), (24, 16), (16, 24))]
    *matrices, late = with_late_gradients(*leaves)
    for y in (
        fused_grouped_swiglu(rows, counts[:2], *leaves, "triton"),
        late_grouped_swiglu(rows, counts[:2], *matrices, "triton", late),
    ):
        out = triton_unpermute(y, weights, destinations, num_kept)
        assert out.shape == (0, 16)
        gradients = torch.autograd.grad(out.sum(), [x, weights, *leaves], retain_graph=True)
        assert not any(gradient.any() for gradient in gradients)
    experts, weights, probabilities, counts = triton_route(random(0, 4).requires_grad_(), 2, None)
    assert experts.shape == weights.shape == (0, 2)
    assert probabilities.shape == (0, 4)
    assert counts.tolist() == [0] * 4
    probabilities.sum().backward()


@on_kernels
@BOTH
@pytest.mark.parametrize(
    ("sizes", "rest", "hidden"),
    [
        ([[3, 0, 2], [1, 4, 0]], 0, 24),
        ([[0, 0], [0, 7], [0, 0]], 3, 8),
        ([[0, 0], [0, 0]], 2, 16),
        ([[5], [9]], 0, 40),
        ([[2, 0, 1, 1, 6], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]], 1, 520),
        ([[1, 0, 2] + [0] * 27] * 20, 0, 8),  # fewer rows a program
    ],
)
def test_transpose_segments(
    sizes: list[list[int]], rest: int, hidden: int, dtype: torch.dtype
) -> None:
    table = torch.tensor(sizes, device=DEVICE)
    x = random(int(table.sum()) + rest, hidden, dtype=dtype).requires_grad_()
    wanted_x = exact(x)
    want = reference_transpose_segments(wanted_x, table.cpu())
    strided = torch.stack([table, table + 1])[:, None].transpose(0, 2)[:, 0, 0]
    assert torch.equal(strided, table)
    for given in (table, table.t().contiguous().t(), strided):
        got = triton_transpose_segments(x, given)
        assert got.dtype == dtype
        assert torch.equal(got.detach().cpu().double(), want.detach())
        compare_gradients(got, want, [x], [wanted_x])
    assert torch.equal(triton_transpose_segments(got, table.t()), x)


@on_kernels
def test_transpose_segments_takes_any_layout() -> None:
    table = torch.tensor([[1, 2], [2, 0]], device=DEVICE)
    x = random(8, 5).t().requires_grad_()
    rows = triton_transpose_segments(x, table)
    assert torch.equal(rows, triton_transpose_segments(x.contiguous(), table))
    (gradient,) = torch.autograd.grad(rows.sum(), x)  # it arrives expanded
    assert torch.equal(gradient, torch.ones_like(x))
    assert triton_transpose_segments(x[:0], torch.zeros_like(table)).shape == (0, 8)


# The experts.


def make_experts(
    counts: list[int], rows: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Leaves (x, w1, w3, w2), NaN behind the last expert's rows, and the counts."""
    num_experts = len(counts)
    leaves = [
        random(rows, hidden, dtype=dtype),
        random(num_experts, inner, hidden, dtype=dtype, seed=1) / 4,
        random(num_experts, inner, hidden, dtype=dtype, seed=2) / 4,
        random(num_experts, hidden, inner, dtype=dtype, seed=3) / 4,
    ]
    leaves[0][sum(counts) :] = float("nan")
    return [leaf.requires_grad_() for leaf in leaves], torch.tensor(counts, device=DEVICE)


def compare_experts(
    implementation: str,
    counts: list[int],
    rows: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    late: bool = False,
) -> None:
    leaves, device_counts = make_experts(counts, rows, hidden, inner, dtype)
    if late:
        rest = with_late_gradients(*leaves[1:])
        got = late_grouped_swiglu(leaves[0], device_counts, *rest[:3], implementation, rest[3])
    else:
        got = fused_grouped_swiglu(leaves[0], device_counts, *leaves[1:], implementation)
    wanted_leaves = [exact(leaf) for leaf in leaves]
    want = reference_grouped_swiglu(wanted_leaves[0], torch.tensor(counts), *wanted_leaves[1:])
    assert got.dtype == dtype
    assert not got[sum(counts) :].any()
    # The bf16 intermediates round, so errors are those of sums of rounded products.
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 3e-2}[dtype]
    assert_near(got, want, tolerance, "output")
    projection = random(*got.shape, dtype=torch.bfloat16, seed=7)
    projection[sum(counts) :] = float("nan")
    mine = torch.autograd.grad(got, leaves, projection.to(dtype))
    theirs = torch.autograd.grad(want, wanted_leaves, projection.cpu().double().nan_to_num())
    assert not mine[0][sum(counts) :].any()
    for name, a, b in zip(("x", "w1", "w3", "w2"), mine, theirs, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, tolerance, f"gradient of {name}")


@on_kernels
@BOTH
@pytest.mark.parametrize(
    ("counts", "rows"),
    [([3, 0, 5], 8), ([0, 2, 1, 0], 7), ([0, 0], 3), ([66, 1], 70), ([1] * 9, 9)],
)
@pytest.mark.parametrize("late", [False, True])
def test_experts(counts: list[int], rows: int, dtype: torch.dtype, late: bool) -> None:
    compare_experts("triton", counts, rows, 20, 12, dtype, late)


@on_kernels
@pytest.mark.parametrize(("size", "dtype"), [(66, torch.float32), (130, torch.bfloat16)])
def test_experts_of_several_tiles(size: int, dtype: torch.dtype) -> None:
    compare_experts("triton", [size, 0, 10], size + 15, size // 2 + 1, size, dtype)


@on_kernels
@pytest.mark.parametrize(("counts", "rows"), [([3, 0, 5], 8), ([4, 0, 0], 7), ([0, 0], 3)])
@pytest.mark.parametrize("late", [False, True])
def test_experts_on_grouped_mm(counts: list[int], rows: int, late: bool) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    compare_experts("grouped_mm", counts, rows, 32, 24, torch.bfloat16, late)


@on_kernels
def test_late_gradients_are_computed_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too: a node whose gradients are all None would run in another thread."""
    log = []

    def logged(*arguments: Any, implementation: str) -> Any:
        log.append("weights")
        return weights_backward(*arguments, implementation)

    monkeypatch.setattr(triton_experts, "weights_backward", logged)
    (x, *weights), counts = make_experts([3, 0, 5], 8, 16, 24, torch.float32)
    before = x.view_as(x)
    before.register_hook(lambda _: log.append("before"))
    *matrices, late = with_late_gradients(*weights)
    after = before.view_as(x)
    after.register_hook(lambda _: log.append("after"))
    late_grouped_swiglu(after, counts, *matrices, "triton", late).sum().backward()
    assert log == ["after", "weights", "before"]


@on_kernels
@on_gpu_only
@BOTH
@pytest.mark.parametrize("implementation", ["triton", "grouped_mm"])
def test_larger_experts(implementation: str, dtype: torch.dtype) -> None:
    """In memory that held NaN before: the allocator hands out what was just freed."""
    takes_it = dtype == torch.bfloat16 and torch.cuda.get_device_capability() == (9, 0)
    if implementation == "grouped_mm" and not takes_it:
        pytest.skip("needs bf16 on Hopper")
    for size in (2**20, 2**22, 2**24):
        poison = [torch.full((size,), float("nan"), device="cuda") for _ in range(8)]
        del poison
    compare_experts(implementation, [700, 0, 1, 1500, 130, 0], 2400, 512, 776, dtype)


def layer(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """The public ops as a model calls them."""
    routing = route(x.float() @ gate.t(), 2, num_tokens=x.shape[0] - 10)
    routing = drop_over_capacity(routing, 4, x.shape[0] // 2)
    order = permutation(routing.experts, 4)
    rows = grouped_swiglu(permute(x, order), order.counts, *weights)
    rows = transpose_segments(rows, order.counts.view(2, 2))
    rows = transpose_segments(rows, order.counts.view(2, 2).t())  # and back
    return unpermute(rows, routing.weights, order)


def make_layer() -> list[Tensor]:
    (_, *weights), _ = make_experts([0] * 4, 0, 64, 96, torch.bfloat16)
    x = random(300, 64, dtype=torch.bfloat16).requires_grad_()
    return [x, random(4, 64).requires_grad_(), *weights]


@on_kernels
@on_gpu_only
def test_the_host_does_not_wait() -> None:
    leaves = make_layer()
    wanted = torch.autograd.grad(layer(*leaves).float().square().sum(), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = torch.autograd.grad(layer(*leaves).float().square().sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)  # bit for bit: no sum depends on chance


@on_kernels
@on_gpu_only
def test_the_layer_on_a_gpu_equals_that_of_the_cpu() -> None:
    leaves = make_layer()
    wanted_leaves = [exact(leaf) for leaf in leaves]
    # In fp32, so that both choose the same experts; the logits are far from equal.
    want = layer(wanted_leaves[0].float(), *(leaf.float() for leaf in wanted_leaves[1:]))
    got = layer(*leaves)
    assert_near(got, want, 3e-2, "output")
    gradients = torch.autograd.grad(got.float().square().sum(), leaves)
    wanted = torch.autograd.grad(want.square().sum(), wanted_leaves)
    for index, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        assert_near(a, b, 6e-2, f"gradient {index}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_addresses_of_a_million_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 2^32 numbers."""
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB")
    monkeypatch.undo()
    tokens, hidden = 2**20, 2048
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    routing = route(torch.randn(tokens, 32, device="cuda"), 2)
    order = permutation(routing.experts, 32)
    assert torch.equal(order.counts, routing.counts)
    assert torch.equal(order.destinations.flatten().sort()[0], torch.arange(2 * tokens).cuda())
    rows, weights = permute(x, order), routing.weights.requires_grad_()
    token = torch.arange(0, tokens, 1009, device="cuda")
    for choice in range(2):
        assert torch.equal(rows[order.destinations[token, choice]], x[token])
    out = unpermute(rows, weights, order)
    assert_near(out[token], x[token], 1e-2, "output")
    d_rows, d_weights = torch.autograd.grad(out, [rows, weights], x, retain_graph=True)
    first = order.destinations[token, 0]
    assert_near(d_rows[first], weights[token, :1] * x[token].float(), 1e-2, "rows")
    norms = x[token].float().square().sum(1, keepdim=True).expand(-1, 2)
    assert_near(d_weights[token], norms, 1e-4, "weights")
    (dx,) = torch.autograd.grad(rows, x, rows)
    assert torch.equal(dx[token], 2 * x[token])


# How torch sees the ops.


@on_kernels
def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check: Callable[..., Any] = torch.library.opcheck
    logits = random(5, 4).requires_grad_()
    check(_route, (logits, 2, 3))
    with torch.no_grad():
        probabilities, weights, experts, _ = _route(logits, 2, 3)
        saved = (probabilities, weights, experts, torch.float32)
        check(_route_backward, (probabilities, weights, *saved))
        check(_route_backward, (probabilities, None, *saved))
    check(triton_permutation, (experts, 4))
    order = triton_permutation(experts, 4)[::2]
    x = random(5, 16).requires_grad_()
    check(triton_permute, (x, *order))
    check(triton_transpose_segments, (x, torch.tensor([[1, 2], [0, 2]], device=DEVICE)))
    rows = random(10, 16).requires_grad_()
    check(triton_unpermute, (rows, weights.requires_grad_(), *order))
    with torch.no_grad():
        check(triton_unpermute_backward, (x, rows, weights, *order))
    leaves, counts = make_experts([2, 3], 5, 8, 16, torch.float32)
    inputs = (leaves[0], counts, *leaves[1:])
    check(_grouped_swiglu, (*inputs, "triton"))
    with torch.no_grad():
        _, gate, up = _grouped_swiglu(*inputs, "triton")
        for need_weights in (True, False):
            check(_grouped_swiglu_backward, (leaves[0], *inputs, gate, up, "triton", need_weights))


def kernel_layer(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """`layer` by the entries that take the interpreter's tensors too."""
    experts, shares, probabilities, _ = triton_route(x @ gate.t(), 1, 5)
    destinations, counts, num_kept = triton_permutation(experts, 2)
    rows = triton_permute(x, destinations, num_kept)
    rows = fused_grouped_swiglu(rows, counts, *weights, "triton")
    out = triton_unpermute(rows, shares + 1, destinations, num_kept)
    return out + probabilities.sum()


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("public", [False, pytest.param(True, marks=on_gpu_only)])
def test_compiled_whole(public: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (x, *weights), _ = make_experts([3, 3], 6, 16, 24, torch.float32)
    leaves = [x, random(2, 16).requires_grad_(), *weights]
    model, tolerance = kernel_layer, 1e-5
    if public:
        leaves, model, tolerance = make_layer(), layer, 3e-2
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor"
    )
    got, want = compiled(*leaves), model(*leaves)
    assert_near(got, want, tolerance, "output")
    gradients = torch.autograd.grad(got.float().square().sum(), leaves)
    wanted = torch.autograd.grad(want.float().square().sum(), leaves)
    for index, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        assert_near(a, b, tolerance, f"gradient {index}")


@pytest.mark.slow
@compiles_only
@BOTH
def test_compiles_for_hopper(
    dtype: torch.dtype, compiled_for_hopper: list[tuple[str, Any]]
) -> None:
    """16-byte accesses to rows; tensor cores for bf16; nothing spilled."""
    logits = torch.zeros(40, 32, requires_grad=True)
    experts, weights, probabilities, _ = triton_route(logits, 2, None)
    order = triton_permutation(torch.zeros_like(experts), 32)[::2]
    x = torch.zeros(40, 6144, dtype=dtype, requires_grad=True)
    rows = triton_permute(x, *order)
    counts = torch.zeros(32, dtype=torch.int64)
    leaves = [
        torch.zeros(32, *shape, dtype=dtype) for shape in ((96, 6144), (96, 6144), (6144, 96))
    ]
    y = fused_grouped_swiglu(rows, counts, *(w.requires_grad_() for w in leaves), "triton")
    y = triton_transpose_segments(y, torch.zeros(8, 4, dtype=torch.int64))
    (triton_unpermute(y, weights, *order).sum() + probabilities.sum()).backward()
    kernels = dict(compiled_for_hopper)
    assert len(kernels) == 13
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 99 * 1024, name
    for name in (
        "permute_kernel",
        "unpermute_kernel",
        "unpermute_backward_kernel",
        "transpose_segments_kernel",
        "add_kernel",
    ):
        assert "st.global.v4.b32" in kernels[name].asm["ptx"], name
    for name in ("multiply_kernel", "outer_kernel"):
        assert ("wgmma.mma_async" in kernels[name].asm["ptx"]) == (dtype == torch.bfloat16), name
