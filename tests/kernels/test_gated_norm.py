"""RMSNorm times sigmoid gate: the reference against torch, the Triton kernels against it in fp64.

With a GPU the kernels' tests run on it (marker gpu), without one in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import (
    DEVICE,
    compiles_only,
    on_gpu_only,
    on_kernels,
    run_in_interpreter,
    without_kernels,
)
from test_norm import SIZES, assert_rounded, assert_streams, check_compiled, compare, make_leaves
from torch import Tensor

from fulmen.kernels import registry
from fulmen.kernels.gated_norm import gated_rms_norm
from fulmen.kernels.gated_norm.reference import gated_rms_norm_reference
from fulmen.kernels.gated_norm.triton_gated_norm import (
    _gated_norm,
    _gated_norm_backward,
    triton_gated_rms_norm,
)

EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def compare_with_reference(leaves: list[Tensor]) -> None:
    compare(
        lambda x, gate, weight: triton_gated_rms_norm(x, gate, weight, EPS),
        lambda x, gate, weight: gated_rms_norm_reference(x, gate, weight, EPS),
        leaves,
    )


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_is_torchs(dtype: torch.dtype) -> None:
    x, gate, weight = make_leaves((2, 3, 48), 2, dtype=dtype, device="cpu")
    wanted = torch.sigmoid(gate) * F.rms_norm(x, (48,), weight, EPS)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, EPS), wanted)


@pytest.mark.fast
def test_bf16_is_rounded_once() -> None:
    leaves = make_leaves((64, 48), 2, dtype=torch.bfloat16, device="cpu")
    wanted = gated_rms_norm(*(leaf.double() for leaf in leaves), EPS)
    assert (gated_rms_norm(*leaves, EPS) != wanted.bfloat16()).double().mean() < 0.01


@pytest.mark.fast
def test_gradients_of_the_reference() -> None:
    leaves = make_leaves((3, 7), 2, dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(lambda *inputs: gated_rms_norm(*inputs, EPS), leaves)


@pytest.mark.fast
def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must be \[hidden\].*\(4,\) for \(2, 8\)"):
        gated_rms_norm(x, x, torch.ones(4), EPS)
    for gate in (torch.zeros(3, 8), x.bfloat16()):
        with pytest.raises(ValueError, match="x and gate must share shape and dtype"):
            gated_rms_norm(x, gate, weight, EPS)


@pytest.mark.fast
def test_what_the_kernels_cannot_take_is_named() -> None:
    wide = torch.zeros(1, 16385)
    with pytest.raises(ValueError, match="triton needs a hidden size of at most 16384"):
        triton_gated_rms_norm(wide, wide, wide[0], EPS)
    half = torch.zeros(1, 8).half()
    with pytest.raises(ValueError, match="gated_rms_norm: triton needs bf16 or fp32"):
        triton_gated_rms_norm(half, half, torch.ones(8), EPS)
    registry.configure({"gated_norm": "triton"})
    try:
        with pytest.raises(ValueError, match=r"kernels\.gated_norm=triton: needs a CUDA tensor"):
            gated_rms_norm(torch.zeros(1, 8), torch.zeros(1, 8), torch.ones(8), EPS)
    finally:
        registry.configure({"gated_norm": registry.AUTO})


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_sizes(rows: int, hidden: int, dtype: torch.dtype) -> None:
    compare_with_reference(make_leaves((rows, hidden), 2, dtype=dtype))


@on_kernels
def test_a_weight_of_another_type() -> None:
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        compare_with_reference(make_leaves((3, 48), 2, dtype=dtype, weight_dtype=other))


@on_kernels
def test_leading_dims_and_no_rows() -> None:
    for shape in ((48,), (2, 3, 2, 48), (0, 48), (2, 0, 48)):
        compare_with_reference(make_leaves(shape, 2, dtype=torch.bfloat16))


@on_kernels
def test_strided_inputs() -> None:
    """Parts of a joint tensor, rows stored by column, and gradients that arrive expanded."""
    joint = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    left, right = joint.split(48, dim=-1)
    turned = left.transpose(0, 2).contiguous().transpose(0, 2)
    weight = torch.linspace(0.5, 1.5, 96, device=DEVICE)[::2]
    for pair in ((left, right), (turned, right), (left[:, :1].expand(2, 5, 48), turned)):
        compare_with_reference([x.detach().requires_grad_() for x in (*pair, weight)])
    leaves = [x.detach().requires_grad_() for x in (left, right, weight)]
    got = torch.autograd.grad(triton_gated_rms_norm(*leaves, EPS).sum(), leaves)
    want = torch.autograd.grad(gated_rms_norm_reference(*leaves, EPS).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert_rounded(a, b, torch.float32, "gradient of a sum")


@on_kernels
def test_gates_that_are_shut_or_open() -> None:
    """exp(-gate) overflows below -88: the gate is then 0, and nothing is NaN."""
    x, gate, weight = make_leaves((3, 48), 2, dtype=torch.float32)
    gate = (gate.detach() * 1000).requires_grad_()
    compare_with_reference([x, gate, weight])
    infinite = torch.full_like(x, float("-inf"))
    infinite[:, ::2] = float("inf")
    compare_with_reference([x, infinite.detach().requires_grad_(), weight])


@on_kernels
def test_the_same_bits_again() -> None:
    leaves = make_leaves((19, 1000), 2, dtype=torch.float32)
    first, second = (
        torch.autograd.grad(triton_gated_rms_norm(*leaves, EPS).square().sum(), leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_kernels
def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    leaves = make_leaves((2, 2, 24), 2, dtype=torch.float32)
    torch.library.opcheck(_gated_norm, (*leaves, EPS))
    with torch.no_grad():
        out, inverse_rms = _gated_norm(*leaves, EPS)
        torch.library.opcheck(_gated_norm_backward, (out, *leaves, inverse_rms))


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def model(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return triton_gated_rms_norm(x * 1.5, gate, weight, EPS).square()

    check_compiled(model, make_leaves((2, 3, 48), 2, dtype=torch.float32), dynamic)


@pytest.mark.fast
def test_the_choice_compiles() -> None:
    torch._dynamo.reset()
    x, gate, weight = make_leaves((3, 8), 2, dtype=torch.float32, device="cpu")
    compiled = torch.compile(gated_rms_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, gate, weight, EPS), gated_rms_norm(x, gate, weight, EPS))


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [2048, 4096, 5000, 6144, 8192, 16384])
@pytest.mark.parametrize("rows", [100, 3001])
def test_larger(rows: int, hidden: int, dtype: torch.dtype) -> None:
    compare_with_reference(make_leaves((rows, hidden), 2, dtype=dtype))


@on_kernels
@on_gpu_only
def test_the_op_runs_on_triton() -> None:
    leaves = make_leaves((3, 64), 2, dtype=torch.bfloat16)
    name = type(gated_rms_norm(*leaves, EPS).grad_fn).__name__
    assert "fulmen_gated_norm" in name, name


@on_kernels
@on_gpu_only
def test_addresses_beyond_two_billion(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^31 numbers and more a tensor; only the last rows have a gradient."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    monkeypatch.undo()
    rows, hidden, shown = 270_000, 8192, 64
    leaves = [
        torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(2)
    ]
    weight = torch.linspace(0.5, 1.5, hidden, device="cuda").requires_grad_()
    d_out = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    d_out[-shown:] = torch.randn(shown, hidden, device="cuda").bfloat16()
    out = triton_gated_rms_norm(*leaves, weight, EPS)
    got = torch.autograd.grad(out, [*leaves, weight], d_out)
    wide = [x.detach()[-shown:].double().requires_grad_() for x in leaves]
    wide.append(weight.detach().double().requires_grad_())
    wanted = gated_rms_norm_reference(*wide, EPS)
    want = torch.autograd.grad(wanted, wide, d_out[-shown:].double())
    assert_rounded(out[-shown:], wanted, torch.bfloat16, "output")
    for index, (a, b) in enumerate(zip(got[:2], want[:2], strict=True)):
        assert_rounded(a[-shown:], b, torch.bfloat16, f"gradient {index}")
    assert_rounded(got[2], want[2], torch.float32, "gradient of the weight")


@pytest.mark.slow
@compiles_only
@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.bfloat16, 8192), (torch.bfloat16, 2000), (torch.float32, 8192)]
)
def test_compiles_for_hopper(
    dtype: torch.dtype, hidden: int, compiled_for_hopper: list[tuple[str, Any]]
) -> None:
    x, gate = (torch.zeros(300, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(hidden, dtype=dtype, requires_grad=True)
    triton_gated_rms_norm(x, gate, weight, EPS).sum().backward()
    assert_streams(compiled_for_hopper, {"forward_kernel", "backward_kernel"})
