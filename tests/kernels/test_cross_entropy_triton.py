"""The Triton path of head and cross entropy against fp64, in blocks and chunks of every kind.

With a GPU the tests run on it (marker gpu), without one in Triton's interpreter.
"""

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
from test_cross_entropy import make, reference
from torch import Tensor

from fulmen.kernels.cross_entropy import linear_cross_entropy, op
from fulmen.kernels.cross_entropy import triton_cross_entropy as on_triton
from fulmen.kernels.cross_entropy.triton_cross_entropy import (
    _linear_cross_entropy,
    _scale,
    plan_chunks,
    triton_linear_cross_entropy,
    triton_summed_cross_entropy,
)

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Of the largest value. bf16 logits of 10 are off by 0.03; the interpreter truncates gradients."""
TOKENS, VOCAB = 21, 50  # hidden size 12
TEXT01 = {"hidden_size": 6144, "vocab": 200_064, "element_size": 2, "need_weight": True}

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(params=["one chunk", "chunks", "grad_weight and chunks", "grad_weight, four slabs"])
def _any_cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 tokens of 12 hidden numbers and 50 words, cut as larger ones are."""
    cut(monkeypatch, request.param)


@pytest.fixture
def _cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "grad_weight and chunks")


def cut(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Sets the constants of the plan: tile, slabs, rows of a chunk outside the weight gradient."""
    tile, slabs, rows = {
        "one chunk": (64, 1, 24),
        "chunks": (32, 1, 8),
        "grad_weight and chunks": (32, 3, 8),  # slabs of 32 and 18 columns
        "grad_weight, four slabs": (16, 4, 11),  # the last of 2
    }[kind]
    monkeypatch.setattr(on_triton, "TILE", tile)
    monkeypatch.setattr(on_triton, "NUM_SLABS", slabs)
    monkeypatch.setattr(on_triton, "ROW_MULTIPLE", rows)
    monkeypatch.setattr(on_triton, "CHUNK_BYTES", 1)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors]


def compare(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float, tolerance: float
) -> None:
    """Loss and gradients of 3 times the loss, of the Triton path and in fp64."""
    want, *want_gradients = reference(hidden, weight, labels, z_loss=z_loss)
    leaves = on_device(hidden, weight)
    loss, losses = triton_summed_cross_entropy(*leaves, labels.to(DEVICE), z_loss=z_loss)
    assert loss.dtype == losses.dtype == torch.float32
    assert_near(loss, want, tolerance, "loss")
    assert not losses.requires_grad
    alone = [reference(hidden[i : i + 1], weight, labels[i : i + 1], z_loss=z_loss)[0]
             for i in range(len(labels))]  # fmt: skip
    assert_near(losses, torch.stack(alone), tolerance, "losses")
    gradients = torch.autograd.grad(3 * loss, leaves)
    for name, x, got, exact in zip("xw", leaves, gradients, want_gradients, strict=True):
        assert got.dtype == x.dtype
        assert_near(got, 3 * exact, tolerance, name)


@on_kernels
@pytest.mark.usefixtures("_any_cut")
@pytest.mark.parametrize(("dtype", "z_loss"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_loss_and_gradients(dtype: torch.dtype, z_loss: float) -> None:
    hidden, weight, labels = make(dtype, tokens=TOKENS)
    compare(hidden, weight, labels, z_loss=z_loss, tolerance=TOLERANCE[dtype])


@on_kernels
def test_loss_and_gradients_as_shipped() -> None:
    hidden, weight, labels = make(torch.bfloat16, tokens=TOKENS)
    compare(hidden, weight, labels, z_loss=0.1, tolerance=TOLERANCE[torch.bfloat16])


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_visits_are_summed_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, "grad_weight and chunks")
    tokens = 12 + 8 * 24
    inputs = make(dtype, tokens=tokens)
    assert len(plan_chunks(tokens, 12, VOCAB, element_size=2, need_weight=True)) == 25
    exact = reference(*inputs, z_loss=0.0)[2]
    errors = []
    for visits in (4,) if dtype == torch.float32 else (4, 64):
        monkeypatch.setattr(on_triton, "SUMMED_CHUNKS", visits)
        hidden, weight, labels = inputs
        leaves = on_device(hidden, weight)
        loss = triton_linear_cross_entropy(*leaves, labels.to(DEVICE), z_loss=0.0)
        (got,) = torch.autograd.grad(loss, leaves[1:])
        errors.append(float((got.cpu().double() - exact).norm() / exact.norm()))
    assert errors[0] < (1e-5 if dtype == torch.float32 else 0.7 * errors[1])


@on_kernels
def test_fewer_tokens_than_hidden_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks fill a part of the weight gradient's memory; no chunk follows."""
    cut(monkeypatch, "grad_weight and chunks")
    hidden, weight, labels = make(torch.float32, tokens=9)
    assert len(plan_chunks(9, 12, VOCAB, element_size=4, need_weight=True)) == 1
    compare(hidden, weight, labels, z_loss=0.1, tolerance=TOLERANCE[torch.float32])


@pytest.mark.fast
def test_the_cuts_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 12, "vocab": VOCAB, "element_size": 2}
    found = {}
    for kind in ("one chunk", "chunks", "grad_weight and chunks", "grad_weight, four slabs"):
        cut(monkeypatch, kind)
        plan = plan_chunks(TOKENS, **sizes, need_weight=True)
        found[kind] = [(chunk.stop - chunk.start, chunk.slab) for chunk in plan]
        assert [chunk.start for chunk in plan[1:]] == [chunk.stop for chunk in plan[:-1]]
        frozen = plan_chunks(TOKENS, **sizes, need_weight=False)
        assert {chunk.slab for chunk in frozen} == {64}
    assert found["one chunk"] == [(21, 64)]
    assert found["chunks"] == [(8, 64), (8, 64), (5, 64)]
    assert found["grad_weight and chunks"] == [(12, 32), (8, 64), (1, 64)]
    assert found["grad_weight, four slabs"] == [(12, 16), (9, 64)]


@on_kernels
@pytest.mark.usefixtures("_cut")
def test_ignored_labels() -> None:
    """Their rows are zero even where the logits are not numbers; alone they cost nothing."""
    hidden, weight, labels = make(torch.float32, tokens=TOKENS)
    (x, w, y) = on_device(hidden, weight, labels)
    ignored = torch.full_like(y, op.IGNORE_INDEX)
    loss = triton_linear_cross_entropy(x, w, ignored, z_loss=0.1)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, [x, w]))
    broken = x.detach().clone()
    broken[y == op.IGNORE_INDEX] = float("nan")
    broken.requires_grad_()
    loss = triton_linear_cross_entropy(broken, w.detach(), y, z_loss=0.1)
    (got,) = torch.autograd.grad(loss, [broken])
    want_loss, want, _ = reference(hidden, weight, labels, z_loss=0.1)
    assert_near(loss, want_loss, 3e-6, "loss")
    assert_near(got, want, 3e-6, "hidden")


@on_kernels
@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize(("shift", "width"), [(0.0, 4e3), (1e4, 1.0), (-1e4, 100.0)])
def test_extreme_logits(shift: float, width: float) -> None:
    """Logits of +-1e4 beside each other, and all of them far from 0."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, VOCAB, generator=generator) * width + shift
    hidden = torch.eye(TOKENS)  # so the weights are the logits
    weight = logits.t().contiguous().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    want, _, want_weight = reference(hidden, weight, labels)
    leaf, x, y = on_device(weight, hidden, labels)
    loss = triton_linear_cross_entropy(x, leaf, y)
    assert_near(loss, want, 1e-6, "loss")
    assert_near(torch.autograd.grad(loss, leaf)[0], want_weight, 1e-6, "weight")


@on_kernels
@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("label", [-1, VOCAB, -(2**40)])
def test_a_label_outside_the_vocabulary_shows(label: int) -> None:
    x, w, y = on_device(*make(torch.float32, tokens=TOKENS))
    y[3] = label
    assert triton_linear_cross_entropy(x, w, y).isnan()


@on_kernels
@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_only_what_needs_a_gradient(frozen: str) -> None:
    hidden, weight, labels = make(torch.float32, tokens=TOKENS)
    want, *want_gradients = reference(hidden, weight, labels)
    x, w, y = on_device(hidden, weight, labels)
    x.requires_grad_(frozen in ("weight", "no_grad"))
    w.requires_grad_(frozen in ("hidden", "no_grad"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = triton_linear_cross_entropy(x, w, y)
    assert_near(loss, want, 3e-6, "loss")
    assert loss.requires_grad == (frozen in ("hidden", "weight"))
    if loss.requires_grad:
        loss.backward()
        got, exact = (x, want_gradients[0]) if frozen == "weight" else (w, want_gradients[1])
        assert got.grad is not None
        assert_near(got.grad, exact, 3e-6, "gradient")


@on_kernels
def test_strided_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "grad_weight and chunks")
    hidden, weight, labels = make(torch.float32, tokens=TOKENS)
    want, *want_gradients = reference(hidden, weight, labels)
    wide = torch.cat([hidden, hidden], dim=1).detach().to(DEVICE)
    x = wide[:, :12].requires_grad_()
    w = weight.detach().t().contiguous().t().to(DEVICE).requires_grad_()
    y = torch.stack([labels, labels], dim=1).to(DEVICE)[:, 0]
    assert not x.is_contiguous()
    assert not y.is_contiguous()
    loss = triton_linear_cross_entropy(x, w, y)
    assert_near(loss, want, 3e-6, "loss")
    for got, exact in zip(torch.autograd.grad(loss, [x, w]), want_gradients, strict=True):
        assert_near(got, exact, 3e-6, "gradient")


@on_kernels
def test_no_tokens() -> None:
    x, w, y = on_device(*make(torch.bfloat16, tokens=0))
    loss = triton_linear_cross_entropy(x, w, y)
    assert loss == 0
    loss.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert w.grad is not None
    assert w.grad.shape == w.shape
    assert not w.grad.any()


@on_kernels
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_gradients_are_scaled_in_place_and_once(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes `weight.grad` is the memory that forward filled: no second copy exists."""
    made: list[int] = []
    allocate = on_triton._new_gradients

    def record(*args: Any) -> tuple[Tensor, Tensor]:
        gradients = allocate(*args)
        made.extend(x.data_ptr() for x in gradients)
        return gradients

    monkeypatch.setattr(on_triton, "_new_gradients", record)
    x, w, y = on_device(*make(torch.bfloat16, tokens=TOKENS))
    loss = triton_linear_cross_entropy(x, w, y) * torch.tensor(scale, device=DEVICE)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert [x.grad.data_ptr(), w.grad.data_ptr()] == made
    loss = triton_linear_cross_entropy(x, w, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_kernels
def test_scale() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for numel in (1, 4096, 5001):
            x = torch.randn(numel, device=DEVICE).to(dtype)
            want = (x.double() * (1 + 2**-8)).to(dtype)
            _scale(x, torch.tensor(1 + 2**-8, device=DEVICE))
            assert_near(x, want, 8e-3 if dtype == torch.bfloat16 else 1e-7, "scaled")
            same = x.clone()
            _scale(x, torch.tensor(1.0, device=DEVICE))
            assert torch.equal(x, same)


@on_kernels
@pytest.mark.parametrize("needs", [(True, True), (True, False)])
def test_opcheck(needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cut(monkeypatch, "grad_weight and chunks")
    x, w, y = on_device(*make(torch.float32, tokens=TOKENS))
    x.requires_grad_(needs[0])
    w.requires_grad_(needs[1])
    torch.library.opcheck(_linear_cross_entropy, (x, w, y, 0.1, *needs))
    torch.library.opcheck(_scale, (x.detach().clone(), torch.tensor(2.0, device=DEVICE)))


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, w, y = on_device(*make(torch.float32, tokens=TOKENS))

    def model(x: Tensor) -> Tensor:
        return triton_linear_cross_entropy(1.5 * x, w, y, z_loss=0.1) / 7

    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor"
    )
    want, got = model(x), compiled(x)
    assert_near(got, want, 1e-6, "loss")
    wanted = torch.autograd.grad(want, [x, w])
    for a, b in zip(torch.autograd.grad(got, [x, w]), wanted, strict=True):
        assert_near(a, b, 1e-6, "gradient")


@pytest.mark.fast
def test_text01_takes_three_visits_and_less_than_3_gib() -> None:
    plan = plan_chunks(8192, **TEXT01)
    assert [chunk.stop - chunk.start for chunk in plan] == [6144, 1408, 640]
    gradients = (200_064 + 8192) * 6144 * 2
    for chunk in plan:
        memory = (chunk.stop - chunk.start) * chunk.slab * 2  # the spare block, or all
        summed = 6144 * 6144 * 4 if chunk.slab < 200_064 else 0  # grad_hidden in fp32
        assert gradients + memory + summed <= 2.95 * 2**30
    assert [chunk.stop - chunk.start for chunk in plan_chunks(1000, **TEXT01)] == [1000]
    whole = plan_chunks(6144, **TEXT01)
    assert [(chunk.start, chunk.stop) for chunk in whole] == [(0, 6144)]


@pytest.mark.fast
def test_blocks_inside_grad_weight_hold_no_slab_that_is_not_used_up() -> None:
    """Block s must end where the slab that overwrites it ends, for any sizes."""
    for vocab, hidden_size in ((200_064, 6144), (32_000, 2048), (50_257, 768), (131_073, 4096)):
        plan = plan_chunks(
            2**16, hidden_size=hidden_size, vocab=vocab, element_size=2, need_weight=True
        )
        for chunk in plan:
            rows, slab = chunk.stop - chunk.start, chunk.slab
            assert slab >= vocab or (rows <= hidden_size and slab % on_triton.TILE == 0)
            assert slab % 16 == 0
            assert -(-vocab // slab) <= on_triton.NUM_SLABS
        assert plan[-1].stop == 2**16


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("tokens", [1500, 8192])
def test_text01s_vocabulary(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients against the torch path, and the memory that it takes."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    monkeypatch.undo()
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, 6144, **options)
    weight = torch.randn(200_064, 6144, **options).mul_(0.02)
    labels = torch.randint(200_064, (tokens,), generator=generator, device="cuda")
    labels[::7] = op.IGNORE_INDEX
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(*leaves, labels, z_loss=1e-4)
    (loss / tokens).backward()
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2**30
    wanted, _ = op.chunked_linear_cross_entropy(
        *leaves, labels, z_loss=1e-4, chunk_bytes=op.CHUNK_BYTES
    )
    assert_near(loss, wanted, 1e-4, "loss")
    want = torch.autograd.grad(wanted / tokens, leaves)
    for leaf, exact in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        error = (leaf.grad - exact).float().norm() / exact.float().norm()
        assert error <= 1e-2


@pytest.mark.slow
@compiles_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_for_hopper(
    dtype: torch.dtype, compiled_for_hopper: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies and stores of 16 bytes, and room for two programs on a multiprocessor."""
    monkeypatch.setattr(on_triton, "CHUNK_BYTES", 1)
    hidden = torch.zeros(16, 4, dtype=dtype, requires_grad=True)
    weight = torch.zeros(200_064, 4, dtype=dtype, requires_grad=True)
    triton_linear_cross_entropy(hidden, weight, torch.arange(16)).backward()
    kernels = dict(compiled_for_hopper)
    assert set(kernels) == {"cross_entropy_kernel", "scale_kernel"}
    kernel = kernels["cross_entropy_kernel"]
    assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
    assert "st.global.v4.b32" in kernel.asm["ptx"]
    assert 2 * (kernel.metadata.shared + 1024) <= 228 * 1024
    assert "ld.global.v4.b32" in kernels["scale_kernel"].asm["ptx"]
