"""SiLU with the split by head, RoPE and SwiGLU: references and Triton kernels against fp64.

With a GPU the kernels run on it (marker gpu), without one in Triton's interpreter.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import (
    DEVICE,
    assert_near,
    compiles_only,
    on_gpu_only,
    on_kernels,
    run_in_interpreter,
    without_kernels,
)
from torch import Tensor

from fulmen.kernels import registry
from fulmen.kernels.rope import rope
from fulmen.kernels.rope.reference import reference_rope
from fulmen.kernels.rope.triton_rope import _rotate, triton_rope
from fulmen.kernels.silu_qkv import silu_qkv
from fulmen.kernels.silu_qkv.reference import reference_silu_qkv
from fulmen.kernels.silu_qkv.triton_silu_qkv import triton_silu_qkv, triton_silu_qkv_backward
from fulmen.kernels.swiglu import swiglu
from fulmen.kernels.swiglu.reference import reference_swiglu
from fulmen.kernels.swiglu.triton_swiglu import triton_swiglu, triton_swiglu_backward

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Largest error over largest value. bf16: the interpreter truncates where the GPU rounds."""
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = DEVICE
) -> Tensor:
    """A leaf with numbers from about -12 to 12, where SiLU bends and where it does not."""
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()


def tables(tokens: int, rotary_dim: int, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    """Of two packed documents: positions restart."""
    position = torch.arange(tokens) % max(1, tokens // 2)
    angle = position[:, None] * 10_000.0 ** -(
        torch.arange(rotary_dim // 2) / max(1, rotary_dim // 2)
    )
    return angle.cos().to(device), angle.sin().to(device)


def stored(x: Tensor, a: int, b: int) -> Tensor:
    """The same numbers, in memory with two dimensions exchanged."""
    return x.transpose(a, b).contiguous().transpose(a, b)


def compare(
    mine: Callable[..., Any],
    wanted: Callable[..., Any],
    leaves: list[Tensor],
    *,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Results and gradients against fp64; `layout` stores the gradients that come in."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    tolerance = TOLERANCE[leaves[0].dtype]
    got, want = mine(*leaves), wanted(*exact)
    if isinstance(got, Tensor):
        got, want = (got,), (want,)
    weights = []
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == leaves[0].dtype
        assert a.is_contiguous()
        assert_near(a, b, tolerance, f"result {index}")
        weights.append(random(*a.shape, dtype=a.dtype, seed=7 + index).detach())
    gradients = torch.autograd.grad(got, leaves, [layout(x) for x in weights])
    wanted_gradients = torch.autograd.grad(want, exact, [x.double() for x in weights])
    for index, (a, b) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        assert a.dtype == leaves[0].dtype
        assert_near(a, b, tolerance, f"gradient {index}")


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [((1, 1, 48), 1), ((2, 37, 2 * 3 * 16), 2), ((1, 33, 3 * 3 * 24), 3), ((1, 5, 2 * 384), 2)],
)
def test_silu_qkv(shape: tuple[int, ...], heads: int, dtype: torch.dtype) -> None:
    compare(
        lambda x: triton_silu_qkv(x, heads),
        lambda x: reference_silu_qkv(x, heads),
        [random(*shape, dtype=dtype)],
    )


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_qkv_in_other_layouts(dtype: torch.dtype) -> None:
    """A strided projection; gradients stored by head."""

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[..., 48:]

    compare(
        lambda x: triton_silu_qkv(strided(x), 2),
        lambda x: reference_silu_qkv(strided(x), 2),
        [random(7, 2, 48 + 2 * 48, dtype=dtype)],
        layout=lambda x: stored(x, 1, 2),
    )


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rotary_dim"),
    [
        ((1, 1, 1, 16), 16),
        ((2, 19, 3, 16), 8),
        ((1, 9, 8, 128), 64),
        ((2, 5, 2, 24), 12),
        ((1, 70, 5, 6), 2),
    ],
)
def test_rope(shape: tuple[int, ...], rotary_dim: int, dtype: torch.dtype) -> None:
    cos, sin = tables(shape[1], rotary_dim)
    compare(
        lambda x: triton_rope(x, cos, sin),
        lambda x: reference_rope(x, cos, sin),
        [random(*shape, dtype=dtype)],
    )


ROPE_VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[..., 16:32],
    lambda x: stored(x[..., :16], 1, 2),
    lambda x: stored(x[..., :16], 2, 3),
    lambda x: x[:1, ..., :16].expand(2, -1, -1, -1),
]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ROPE_VIEWS)
def test_rope_in_other_layouts(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Part of a joint projection, heads before tokens, head_dim not last, one row for all."""
    cos, sin = tables(7, 8)
    for last in (2, 3):  # of the gradient; 3 needs a copy
        compare(
            lambda x: triton_rope(view(x), cos, sin),
            lambda x: reference_rope(view(x), cos, sin),
            [random(2, 7, 3, 32, dtype=dtype)],
            layout=lambda x, last=last: stored(x, 1, last),
        )


@on_kernels
def test_gradients_of_sums() -> None:
    """One number, expanded: all strides are 0."""
    cos, sin = tables(11, 8)
    joint, x, gate = random(1, 5, 96), random(2, 11, 3, 16), random(5, 130)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = [
        (lambda x: triton_silu_qkv(x, 2)[1], lambda x: reference_silu_qkv(x, 2)[1], joint),
        (lambda x: triton_rope(x, cos, sin), lambda x: reference_rope(x, cos, sin), x),
        (lambda x: triton_swiglu(x, x), lambda x: reference_swiglu(x, x), gate),
    ]
    for mine, wanted, leaf in pairs:
        (got,) = torch.autograd.grad(mine(leaf).sum(), leaf)
        (want,) = torch.autograd.grad(wanted(leaf).sum(), leaf)
        assert_near(got, want, TOLERANCE[torch.float32], "gradient")


@on_kernels
def test_rope_takes_other_tables() -> None:
    x = random(1, 6, 2, 16)
    cos, sin = tables(6, 16)
    other = [table.double().t().contiguous().t() for table in (cos, sin)]
    assert torch.equal(triton_rope(x, *other), triton_rope(x, cos, sin))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 130), (37, 256), (9, 1, 384), (2, 3072)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves = [random(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    compare(triton_swiglu, reference_swiglu, leaves)


SWIGLU_VIEWS: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
    lambda x: x.chunk(2, dim=-1),
    lambda x: x[:, :3].chunk(2, dim=-1),
    lambda x: stored(x, 1, 2).chunk(2, dim=1),
    lambda x: x.unbind(),
]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", SWIGLU_VIEWS)
def test_swiglu_in_other_layouts(
    view: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    """Halves of a joint projection, rows at no one distance, columns, gate behind up."""
    for last in (0, -1):
        compare(
            lambda x: triton_swiglu(*view(x)),
            lambda x: reference_swiglu(*view(x)),
            [random(2, 4, 264, dtype=dtype)],
            layout=lambda x, last=last: stored(x, last, -2),
        )


@on_kernels
def test_large_numbers() -> None:
    """exp overflows to infinity where SiLU and its slope are 0."""
    x = torch.tensor([[-1e4, -100.0, -89.0, 0.0, 89.0, 1e4]], device=DEVICE).requires_grad_()
    compare(triton_swiglu, reference_swiglu, [x, torch.ones_like(x).requires_grad_()])
    compare(lambda x: triton_silu_qkv(x, 1), lambda x: reference_silu_qkv(x, 1), [x[None]])


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(dtype: torch.dtype) -> None:
    compare(
        lambda x: triton_silu_qkv(x, 2),
        lambda x: reference_silu_qkv(x, 2),
        [random(1, 0, 96, dtype=dtype)],
    )
    cos, sin = tables(0, 8)
    compare(
        lambda x: triton_rope(x, cos, sin),
        lambda x: reference_rope(x, cos, sin),
        [random(1, 0, 2, 16, dtype=dtype)],
    )
    for shape in ((0, 130), (3, 0)):
        leaves = [random(*shape, dtype=dtype), random(*shape, dtype=dtype)]
        compare(triton_swiglu, reference_swiglu, leaves)


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_text01(dtype: torch.dtype) -> None:
    """Through the public ops, which choose the kernels there."""
    compare(
        lambda x: silu_qkv(x, 64),
        lambda x: reference_silu_qkv(x, 64),
        [random(1, 1001, 24576, dtype=dtype)],
    )
    cos, sin = tables(1001, 64)
    for heads in (64, 8):
        compare(
            lambda x: rope(x, cos, sin),
            lambda x: reference_rope(x, cos, sin),
            [random(2, 1001, heads, 128, dtype=dtype)],
        )
    leaves = [random(1001, 9216, dtype=dtype, seed=seed) for seed in (0, 1)]
    compare(swiglu, reference_swiglu, leaves)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", ["silu_qkv", "rope", "rope by head", "swiglu"])
def test_addresses_of_a_million_tokens(op: str) -> None:
    """More than 2^31 numbers a tensor; the last tokens equal those of a short call."""
    if torch.cuda.get_device_properties(0).total_memory < 75 * 2**30:
        pytest.skip("needs 75 GiB")
    tokens, tail = 2**20, 100
    cos, sin = tables(tokens, 32)
    shape = {"silu_qkv": (33 * 192,), "swiglu": (2 * 2112,)}.get(op, (33, 64))
    x = torch.empty(1, tokens, *shape, device="cuda", dtype=torch.bfloat16).normal_()
    if op == "rope by head":
        x = x.view(1, 33, tokens, 64).transpose(1, 2)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        if op == "silu_qkv":
            return silu_qkv(x, 33)
        if op == "swiglu":
            return (swiglu(*x.chunk(2, dim=-1)),)
        return (rope(x, cos[-x.shape[1] :], sin[-x.shape[1] :]),)

    end = x[:, -tail:].clone().requires_grad_()
    x.requires_grad_()
    whole, short = call(x), call(end)
    gradient = torch.autograd.grad(whole, x, whole)[0]
    wanted_gradient = torch.autograd.grad(short, end, short)[0]
    assert_near(gradient[:, -tail:], wanted_gradient, 8e-3, "gradient")
    for index, (a, b) in enumerate(zip(whole, short, strict=True)):
        assert_near(a[:, -tail:], b, 8e-3, f"result {index}")


@compiles_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_of_16_bytes(dtype: torch.dtype, compiled_for_hopper: list[tuple[str, Any]]) -> None:
    """At Text-01's widths, with nothing exchanged between threads and full multiprocessors."""
    x = torch.zeros(1, 40, 8 * 3 * 128, dtype=dtype, requires_grad=True)
    sum(part.sum() for part in triton_silu_qkv(x, 8)).backward()
    heads = x.unflatten(2, (8, 384))[..., :128]
    triton_rope(heads, torch.zeros(40, 32), torch.zeros(40, 32)).sum().backward()
    joint = torch.zeros(9, 2 * 9216, dtype=dtype, requires_grad=True)
    triton_swiglu(*joint.chunk(2, dim=-1)).sum().backward()
    assert len(compiled_for_hopper) == 6
    for name, kernel in compiled_for_hopper:
        accesses = set(re.findall(r"(?:ld|st)\.global\.\S+", kernel.asm["ptx"]))
        assert accesses == {"ld.global.v4.b32", "st.global.v4.b32"}, name
        assert "ttg.convert_layout" not in kernel.asm["ttgir"], name


@on_kernels
def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    qkv = random(1, 5, 96)
    torch.library.opcheck(triton_silu_qkv, (qkv, 2))
    q, k, v = (x.detach() for x in triton_silu_qkv(qkv, 2))
    torch.library.opcheck(triton_silu_qkv_backward, (q, k, v, qkv.detach(), 2))
    torch.library.opcheck(_rotate, (random(2, 5, 3, 16), *tables(5, 8), False))
    gate, up = random(3, 66).chunk(2, dim=-1)
    torch.library.opcheck(triton_swiglu, (gate, up))
    plain = [x.detach().clone() for x in (gate, gate, up)]
    torch.library.opcheck(triton_swiglu_backward, tuple(plain))


Ops = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def check_compiled(ops: Ops, dynamic: bool, device: str) -> None:
    split, rotate, gated = ops

    def layer(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = split(qkv * 1.5, 2)
        return gated(rotate(q, cos, sin), rotate(k, cos, sin)) + v

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (6, 9):
        x = random(1, tokens, 96, device=device)
        cos, sin = tables(tokens, 8, device)
        want, got = layer(x, cos, sin), compiled(x, cos, sin)
        assert_near(got, want, 1e-6, "output")
        (wanted,) = torch.autograd.grad(want.square().sum(), x)
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
        assert_near(gradient, wanted, 1e-6, "gradient")


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check_compiled((triton_silu_qkv, triton_rope, triton_swiglu), dynamic, DEVICE)
    check_compiled((silu_qkv, rope, swiglu), dynamic, DEVICE)


@pytest.mark.fast
def test_formulas() -> None:
    """The references, which the CPU runs, against the definitions in other words."""
    x = random(2, 5, 2 * 3 * 4, device="cpu")
    parts = silu_qkv(x, 2)
    for index, part in enumerate(parts):
        assert part.is_contiguous()
        for head in range(2):
            first = 12 * head + 4 * index
            wanted = F.silu(x[..., first : first + 4])
            assert_near(part[:, :, head], wanted, 1e-6, "silu_qkv")
    cos, sin = tables(5, 6, "cpu")
    x = random(2, 5, 3, 8, device="cpu")
    turned = torch.complex(x[..., :3], x[..., 3:6]) * torch.complex(cos, sin)[:, None]
    got = rope(x, cos, sin)
    assert_near(got, torch.cat([turned.real, turned.imag, x[..., 6:]], -1), 1e-6, "rope")
    assert rope(x, cos[:, :0], sin[:, :0]) is x
    gate, up = x.unbind()
    assert_near(swiglu(gate, up), gate * gate.sigmoid() * up, 1e-6, "swiglu")


@pytest.mark.fast
def test_rounded_once() -> None:
    """bf16 results are within half a step of the exact ones."""
    x = random(1, 50, 3 * 16, device="cpu", dtype=torch.bfloat16)
    cos, sin = tables(50, 8, "cpu")

    def all_ops(x: Tensor) -> list[Tensor]:
        return [*silu_qkv(x, 1), rope(x[:, :, None], cos, sin), swiglu(x, x)]

    for got, want in zip(all_ops(x), all_ops(x.double()), strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - want).abs() <= 1.001 * 2**-8 * want.abs() + 1e-6).all()


@pytest.mark.fast
def test_what_the_ops_cannot_take_is_named() -> None:
    x = torch.zeros(1, 5, 96)
    for heads in (0, 5, 64):
        with pytest.raises(ValueError, match=f"tokens, {heads} heads"):
            silu_qkv(x, heads)
    with pytest.raises(ValueError, match=r"must be \[batch, tokens, heads, head_dim\] and cos"):
        rope(x, torch.zeros(5, 2), torch.zeros(5, 2))
    for shape in ((4, 2), (5, 9), (1, 5, 2)):
        with pytest.raises(ValueError, match=r"got \(1, 5, 6, 16\)"):
            rope(x.view(1, 5, 6, 16), torch.zeros(shape), torch.zeros(shape))
    for up in (x[:, :4], x.double()):
        with pytest.raises(ValueError, match=r"one shape .* and one dtype"):
            swiglu(x, up)


@pytest.mark.fast
def test_the_cpu_takes_the_reference() -> None:
    x = torch.zeros(1, 5, 96)
    table = torch.zeros(5, 2)
    calls: dict[str, Callable[[], Any]] = {
        "silu_qkv": lambda: silu_qkv(x, 2),
        "rope": lambda: rope(x[:, :, None], table, table),
        "swiglu": lambda: swiglu(x, x),
    }
    for op, call in calls.items():
        call()
        registry.configure({op: "triton"})
        try:
            with pytest.raises(ValueError, match=f"{op}=triton: needs a CUDA tensor$"):
                call()
        finally:
            registry.configure({op: registry.AUTO})
