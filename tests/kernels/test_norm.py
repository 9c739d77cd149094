"""RMSNorm and DeepNorm: the reference against torch, the Triton kernels against it in fp64.

With a GPU the kernels' tests run on it (marker gpu), without one in Triton's interpreter.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import (
    DEVICE,
    INTERPRETED,
    compiles_only,
    on_gpu_only,
    on_kernels,
    run_in_interpreter,
    without_kernels,
)
from torch import Tensor

from fulmen.kernels import registry
from fulmen.kernels.common import DTYPES
from fulmen.kernels.norm import deepnorm, plan, rms_norm
from fulmen.kernels.norm.reference import deepnorm_reference, rms_norm_reference
from fulmen.kernels.norm.triton_norm import (
    _norm,
    _norm_backward,
    triton_deepnorm,
    triton_rms_norm,
)

EPS = 1e-5
ALPHA, BETA = 2.5, 0.75
SIZES = [(3, 5), (1, 256), (2, 600), (19, 1000)]
"""(rows, hidden). In pieces: one masked, one whole, two and a masked one, two warps. 19 rows are
more than the interpreter's programs, so that each takes several."""

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def make_leaves(
    shape: tuple[int, ...],
    num_inputs: int,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    device: str = DEVICE,
) -> list[Tensor]:
    """Inputs of `shape` and a weight, as leaves."""
    generator = torch.Generator().manual_seed(sum(shape))
    leaves = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_inputs)]
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    leaves.append(weight.to(weight_dtype or dtype))
    return [leaf.to(device).requires_grad_() for leaf in leaves]


def assert_rounded(mine: Tensor, wanted: Tensor, dtype: torch.dtype, name: str) -> None:
    """Every number is off by fp32's errors and one rounding to `dtype`; NaN fails."""
    assert mine.dtype == dtype, name
    assert mine.shape == wanted.shape, name
    if not wanted.numel():
        return
    wanted = wanted.detach().double()
    bound = 4e-6 * wanted.abs().max() + 1e-7
    if dtype == torch.bfloat16:
        # Half a unit in the last place; the interpreter truncates, which loses a whole one.
        bound = bound + wanted.abs() * 2.0 ** (-7 if INTERPRETED else -8)
    error = (mine.detach().double() - wanted).abs()
    assert bool((error <= bound).all()), f"{name}: {(error - bound).max()} too far"


def compare(
    mine: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor]
) -> None:
    """Results, and gradients of a random projection, against the reference in fp64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, wanted = mine(*leaves), reference(*wide)
    assert_rounded(out, wanted, leaves[0].dtype, "output")
    assert out.is_contiguous()
    # Numbers that bf16 holds exactly, so that both sides are handed the same gradient.
    generator = torch.Generator().manual_seed(7)
    d_out = torch.randn(out.shape, generator=generator).bfloat16().to(DEVICE)
    gradients = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    wanted_gradients = torch.autograd.grad(wanted, wide, d_out.double())
    for index, (leaf, a, b) in enumerate(zip(leaves, gradients, wanted_gradients, strict=True)):
        assert_rounded(a, b, leaf.dtype, f"gradient {index}")


def compare_rms_norm(leaves: list[Tensor]) -> None:
    compare(
        lambda x, weight: triton_rms_norm(x, weight, EPS),
        lambda x, weight: rms_norm_reference(x, weight, EPS),
        leaves,
    )


def compare_deepnorm(leaves: list[Tensor], alpha: float = ALPHA, beta: float = BETA) -> None:
    compare(
        lambda x, f, weight: triton_deepnorm(x, f, weight, EPS, alpha=alpha, beta=beta),
        lambda x, f, weight: deepnorm_reference(x, f, weight, EPS, alpha=alpha, beta=beta),
        leaves,
    )


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_op_is_torchs(dtype: torch.dtype) -> None:
    x, weight = make_leaves((2, 3, 48), 1, dtype=dtype, device="cpu")
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (48,), weight, EPS))


@pytest.mark.fast
def test_bf16_is_rounded_once() -> None:
    """Rounding the sum, or the normalised row before the weight, would move a third."""
    x, f, weight = make_leaves((64, 48), 2, dtype=torch.bfloat16, device="cpu")
    wide = [leaf.double() for leaf in (x, f, weight)]
    pairs = [
        (rms_norm(x, weight, EPS), rms_norm(wide[0], wide[2], EPS)),
        (
            deepnorm(x, f, weight, EPS, alpha=ALPHA, beta=BETA),
            deepnorm(*wide, EPS, alpha=ALPHA, beta=BETA),
        ),
    ]
    for mine, wanted in pairs:
        assert (mine != wanted.bfloat16()).double().mean() < 0.01


@pytest.mark.fast
def test_gradients_of_the_references() -> None:
    x, f, weight = make_leaves((3, 7), 2, dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, f, w: deepnorm(x, f, w, EPS, alpha=ALPHA, beta=BETA), (x, f, weight)
    )


@pytest.mark.fast
def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[hidden\].*\(4,\).*\(2, 8\)"):
        rms_norm(x, torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"deepnorm: weight must be \[hidden\]"):
        deepnorm(x, x, torch.ones(1, 8), EPS, alpha=1.0, beta=1.0)
    for update in (torch.zeros(3, 8), x.bfloat16()):
        with pytest.raises(ValueError, match="residual and update must share shape and dtype"):
            deepnorm(x, update, weight, EPS, alpha=1.0, beta=1.0)


@pytest.mark.fast
def test_what_the_kernels_cannot_take_is_named() -> None:
    wide = torch.zeros(1, 16385)
    with pytest.raises(ValueError, match="rms_norm: triton needs a hidden size of at most 16384"):
        triton_rms_norm(wide, wide[0], EPS)
    half = torch.zeros(1, 8).half()
    with pytest.raises(ValueError, match="deepnorm: triton needs bf16 or fp32"):
        triton_deepnorm(half, half, torch.ones(8), EPS, alpha=1.0, beta=1.0)
    registry.configure({"norm": "triton"})
    try:
        with pytest.raises(ValueError, match=r"kernels\.norm=triton: needs a CUDA tensor"):
            rms_norm(torch.zeros(1, 8), torch.ones(8), EPS)
    finally:
        registry.configure({"norm": registry.AUTO})


@pytest.mark.fast
@pytest.mark.parametrize("hidden", [128, 2048, 3072, 6144, 7168, 8192, 16384])
@pytest.mark.parametrize(
    ("num_inputs", "warps"),
    [
        (1, plan.FORWARD_WARPS_PER_PROCESSOR),
        (2, plan.FORWARD_WARPS_PER_PROCESSOR),
        (2, plan.BACKWARD_WARPS_PER_PROCESSOR),
        (3, plan.BACKWARD_WARPS_PER_PROCESSOR),
    ],
)
def test_the_plan_fits_and_fills_a_multiprocessor(
    hidden: int, num_inputs: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "num_processors", lambda *_: 132)
    for dtype in DTYPES:
        x = torch.empty(2**20, hidden, dtype=dtype, device="meta")
        made = plan.make_plan(x, num_inputs=num_inputs, warps_per_processor=warps)
        together, rest = divmod(made.programs, 132)
        assert rest == 0
        assert 1 <= together <= 32
        assert together * made.num_warps * 32 * made.registers <= 65536
        pieces = -(-hidden // made.piece)
        assert pieces <= 4
        assert hidden < 256 or pieces * made.piece <= 1.2 * hidden
        row = num_inputs * pieces * made.piece * x.element_size()
        in_flight = together * (made.num_stages - 1) * row
        assert in_flight + together * 2048 <= 227 * 1024
        assert hidden < 2048 or in_flight >= 32 * 1024
        few = plan.make_plan(x[:3], num_inputs=num_inputs, warps_per_processor=warps)
        assert few.programs == 3


@pytest.mark.fast
@pytest.mark.parametrize("kib", [98, 162])  # of an L40S and an A100
def test_the_plan_fits_other_chips(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "shared_bytes", lambda *_: kib * 1024)
    warps = plan.BACKWARD_WARPS_PER_PROCESSOR
    depths = set()
    for dtype, hidden in product(DTYPES, (2048, 6144, 8192, 16384)):
        x = torch.empty(9, hidden, dtype=dtype, device="meta")
        made = plan.make_plan(x, num_inputs=3, warps_per_processor=warps)
        row = 3 * -(-hidden // made.piece) * made.piece * x.element_size()
        assert (made.num_stages - 1) * row <= kib * 1024
        depths.add(made.num_stages)
    assert depths == {1, 2, 3}


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_sizes(rows: int, hidden: int, dtype: torch.dtype) -> None:
    compare_rms_norm(make_leaves((rows, hidden), 1, dtype=dtype))
    compare_deepnorm(make_leaves((rows, hidden), 2, dtype=dtype))


@on_kernels
def test_a_weight_of_another_type() -> None:
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        compare_rms_norm(make_leaves((3, 48), 1, dtype=dtype, weight_dtype=other))
        compare_deepnorm(make_leaves((3, 48), 2, dtype=dtype, weight_dtype=other))


@on_kernels
def test_leading_dims_and_no_rows() -> None:
    for shape in ((48,), (2, 3, 2, 48), (0, 48), (2, 0, 48)):
        compare_rms_norm(make_leaves(shape, 1, dtype=torch.float32))
        compare_deepnorm(make_leaves(shape, 2, dtype=torch.bfloat16))


@on_kernels
def test_strided_inputs() -> None:
    """Parts of a joint tensor, rows stored by column, and gradients that arrive expanded."""
    joint = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    left, right = joint.split(48, dim=-1)
    turned = left.transpose(0, 2).contiguous().transpose(0, 2)
    weight = torch.linspace(0.5, 1.5, 96, device=DEVICE)[::2]
    for pair in ((left, right), (turned, right), (left[:, :1].expand(2, 5, 48), turned)):
        leaves = [x.detach().requires_grad_() for x in (*pair, weight)]
        compare_rms_norm(leaves[1:])
        compare_deepnorm(leaves)
    x, w = right.detach().requires_grad_(), weight.detach().requires_grad_()
    got = torch.autograd.grad(triton_rms_norm(x, w, EPS).sum(), (x, w))
    want = torch.autograd.grad(rms_norm_reference(x, w, EPS).sum(), (x, w))
    for a, b in zip(got, want, strict=True):
        assert_rounded(a, b, torch.float32, "gradient of a sum")


@on_kernels
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (4.5, -2.0)])
def test_alpha_and_beta(alpha: float, beta: float) -> None:
    compare_deepnorm(make_leaves((3, 48), 2, dtype=torch.float32), alpha, beta)


@on_kernels
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_tiny_and_huge_rows(scale: float) -> None:
    """eps keeps a row of zeros finite; no square overflows."""
    x, weight = make_leaves((3, 48), 1, dtype=torch.float32)
    x = (x.detach() * scale).requires_grad_()
    out = triton_rms_norm(x, weight, EPS)
    assert_rounded(out, rms_norm_reference(x.double(), weight.double(), EPS), out.dtype, "output")
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@on_kernels
def test_the_same_bits_again() -> None:
    x, weight = make_leaves((19, 1000), 1, dtype=torch.float32)
    runs = [torch.autograd.grad(triton_rms_norm(x, weight, EPS).square().sum(), (x, weight))]
    runs.append(torch.autograd.grad(triton_rms_norm(x, weight, EPS).square().sum(), (x, weight)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@on_kernels
@pytest.mark.parametrize("has_update", [False, True])
def test_opcheck(has_update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, f, weight = make_leaves((2, 2, 24), 2, dtype=torch.float32)
    update = f if has_update else None
    torch.library.opcheck(_norm, (x, update, weight, EPS, ALPHA, BETA))
    with torch.no_grad():
        out, inverse_rms = _norm(x, update, weight, EPS, ALPHA, BETA)
        arguments = (out, x, update, weight, inverse_rms, ALPHA, BETA)
        torch.library.opcheck(_norm_backward, arguments)


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def model(x: Tensor, f: Tensor, weight: Tensor) -> Tensor:
        h = triton_rms_norm(x * 1.5, weight, EPS)
        return triton_deepnorm(h, f, weight, EPS, alpha=ALPHA, beta=BETA).square()

    check_compiled(model, make_leaves((2, 3, 48), 2, dtype=torch.float32), dynamic)


def check_compiled(model: Callable[..., Tensor], leaves: list[Tensor], dynamic: bool) -> None:
    """`torch.compile(fullgraph=True)` gives the eager results and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(
        model,
        fullgraph=True,
        dynamic=dynamic,
        backend="inductor" if DEVICE == "cuda" else "aot_eager",
    )
    got, want = compiled(*leaves), model(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), leaves)
    for a, b in zip(gradients, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_the_choice_compiles() -> None:
    torch._dynamo.reset()

    def model(x: Tensor, weight: Tensor) -> Tensor:
        return deepnorm(rms_norm(x, weight, EPS), x, weight, EPS, alpha=ALPHA, beta=BETA)

    x, weight = torch.randn(3, 8), torch.ones(8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), model(x, weight))


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [2048, 5000, 6144, 8192, 16384])
@pytest.mark.parametrize("rows", [100, 3001])
def test_larger(rows: int, hidden: int, dtype: torch.dtype) -> None:
    compare_rms_norm(make_leaves((rows, hidden), 1, dtype=dtype))
    compare_deepnorm(make_leaves((rows, hidden), 2, dtype=dtype))


@on_kernels
@on_gpu_only
def test_the_op_runs_on_triton() -> None:
    x, f, weight = make_leaves((3, 64), 2, dtype=torch.bfloat16)
    name = type(rms_norm(x, weight, EPS).grad_fn).__name__
    assert "fulmen_norm" in name, name
    out = deepnorm(x, f, weight, EPS, alpha=ALPHA, beta=BETA)
    assert type(out.grad_fn).__name__ == name


@on_kernels
@on_gpu_only
def test_addresses_beyond_two_billion(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^31 numbers and more a tensor; only the last rows have a gradient."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    monkeypatch.undo()
    rows, hidden, shown = 360_000, 6144, 64
    leaves = [
        torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(2)
    ]
    weight = torch.linspace(0.5, 1.5, hidden, device="cuda").requires_grad_()
    d_out = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    d_out[-shown:] = torch.randn(shown, hidden, device="cuda").bfloat16()
    out = triton_deepnorm(*leaves, weight, EPS, alpha=ALPHA, beta=BETA)
    got = torch.autograd.grad(out, [*leaves, weight], d_out)
    wide = [x.detach()[-shown:].double().requires_grad_() for x in leaves]
    wide.append(weight.detach().double().requires_grad_())
    wanted = deepnorm_reference(*wide, EPS, alpha=ALPHA, beta=BETA)
    want = torch.autograd.grad(wanted, wide, d_out[-shown:].double())
    assert_rounded(out[-shown:], wanted, torch.bfloat16, "output")
    for index, (a, b) in enumerate(zip(got[:2], want[:2], strict=True)):
        assert_rounded(a[-shown:], b, torch.bfloat16, f"gradient {index}")
    assert_rounded(got[2], want[2], torch.float32, "gradient of the weight")


def assert_streams(kernels: list[tuple[str, Any]], names: set[str]) -> None:
    """Rows come by 16-byte asynchronous copies, and together fit a multiprocessor's memory."""
    assert {name for name, _ in kernels} == names | {"column_sum_kernel"}
    for name, kernel in kernels:
        if name != "column_sum_kernel":
            assert "cp.async.cg.shared.global" in kernel.asm["ptx"], name
            assert ".maxnreg" in kernel.asm["ptx"], name
            warps = 32 if name == "forward_kernel" else 16
            together = warps // kernel.metadata.num_warps
            assert together * (kernel.metadata.shared + 1024) <= 228 * 1024, name


@pytest.mark.slow
@compiles_only
@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.bfloat16, 6144), (torch.bfloat16, 2000), (torch.float32, 6144)]
)
def test_compiles_for_hopper(
    dtype: torch.dtype, hidden: int, compiled_for_hopper: list[tuple[str, Any]]
) -> None:
    x, f = (torch.zeros(300, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(hidden, dtype=dtype, requires_grad=True)
    triton_rms_norm(x, weight, EPS).sum().backward()
    triton_deepnorm(x, f, weight, EPS, alpha=ALPHA, beta=BETA).sum().backward()
    assert_streams(compiled_for_hopper, {"forward_kernel", "backward_kernel"})
