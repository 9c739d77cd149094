"""The Triton kernels of lightning attention against the recurrence in fp64 and the reference.

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
from test_lightning import boundaries, recurrence
from torch import Tensor

from fulmen.kernels.lightning import launch, op
from fulmen.kernels.lightning.launch import (
    _attend,
    _attend_backward,
    choose_num_pieces,
    choose_tile,
    triton_lightning_attention,
)
from fulmen.kernels.lightning.reference import chunked_lightning_attention

SLOPES = [0.0, 0.3]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
"""Largest error over largest value. bf16: the interpreter truncates where the GPU rounds."""

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def make_inputs(
    lengths: list[int],
    *,
    batch: int = 1,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    slopes: list[float] = SLOPES,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Leaves (q, k, v, state that enters each row), slopes, boundaries (None for a whole row)."""
    generator = torch.Generator().manual_seed(seed)
    heads, tokens = len(slopes), sum(lengths)
    packed = len(lengths) > 1
    shape = (batch, tokens, heads, dim)
    leaves = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    leaves.append(torch.randn(batch, heads, dim, dim, generator=generator))
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    bounds = boundaries(lengths).to(DEVICE) if packed else None
    return leaves, torch.tensor(slopes, device=DEVICE), bounds


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().cpu().requires_grad_() for x in leaves]


def compare(
    mine: list[Tensor],
    wanted: list[Tensor],
    leaves: list[Tensor],
    wanted_leaves: list[Tensor],
    tolerance: float,
) -> None:
    """Results, and the gradients of a random projection of all of them."""
    generator = torch.Generator().manual_seed(7)
    loss, wanted_loss = torch.zeros((), device=DEVICE), torch.zeros((), dtype=torch.float64)
    wanted_loss = wanted_loss.to(wanted[0].device)
    for index, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        assert_near(a, b, tolerance, f"result {index}")
        # Numbers that bf16 holds exactly, so that both sides are handed the same gradient.
        weight = torch.randn(a.shape, generator=generator).bfloat16().float()
        loss = loss + (a.float() * weight.to(a.device)).sum()
        wanted_loss = wanted_loss + (b * weight.to(b.device, b.dtype)).sum()
    got = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(wanted_loss, wanted_leaves)
    names = ("q", "k", "v", "state")
    for name, leaf, a, b in zip(names, leaves, got, want, strict=False):
        assert a.dtype == leaf.dtype
        assert a.shape == leaf.shape
        assert_near(a, b, tolerance, f"gradient of {name}")


def compare_with_recurrence(
    lengths: list[int], *, piece_tokens: int = 0, slopes: list[float] = SLOPES, **options: Any
) -> None:
    leaves, device_slopes, bounds = make_inputs(lengths, slopes=slopes, **options)
    q, k, v, state = leaves
    out, final = triton_lightning_attention(
        q, k, v, device_slopes, bounds, state, True, piece_tokens=piece_tokens
    )
    assert final is not None
    assert out.dtype == q.dtype
    assert final.dtype == torch.float32
    wanted_leaves = exact(leaves)
    *wanted_qkv, entering = wanted_leaves
    real = [length for length in lengths if length]
    if len(lengths) > 1:
        nothing = torch.zeros(len(real) - 1, *entering.shape[1:], dtype=torch.float64)
        entering = torch.cat([entering, nothing])
    wanted, leaving = recurrence(*wanted_qkv, device_slopes.cpu().double(), real, entering)
    leaving = leaving[-1:] if len(lengths) > 1 else leaving
    compare([out, final], [wanted, leaving], leaves, wanted_leaves, TOLERANCE[q.dtype])


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "batch", "piece_tokens"),
    [(1, 1, 0), (63, 1, 0), (65, 2, 0), (150, 1, 64), (193, 2, 64), (130, 1, 128), (128, 1, 64)],
)
def test_rows(tokens: int, batch: int, piece_tokens: int, dtype: torch.dtype) -> None:
    compare_with_recurrence([tokens], batch=batch, piece_tokens=piece_tokens, dtype=dtype)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "piece_tokens"),
    [
        ([1, 63, 64, 65], 0),
        ([1, 63, 64, 65], 64),  # one document is cut
        ([63, 64, 65], 0),  # a document begins at a chunk's last token
        ([15, 16, 17, 130], 64),  # blocks of the fp32 kernels; a document of three segments
        ([10, 0, 60], 64),
        ([0, 70, 0], 0),
        ([1] * 9, 64),
        ([70, 200], 128),
    ],
)
def test_packed_documents(lengths: list[int], piece_tokens: int, dtype: torch.dtype) -> None:
    compare_with_recurrence(lengths, piece_tokens=piece_tokens, dtype=dtype)


@on_kernels
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_head_dims(dim: int) -> None:
    """From 128 on a head is cut into slices."""
    compare_with_recurrence([70, 1], dim=dim, slopes=[0.02], piece_tokens=64, dtype=torch.bfloat16)


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("piece_tokens", [0, 512])
def test_larger(dim: int, piece_tokens: int, dtype: torch.dtype) -> None:
    slopes = [2.0 ** -(i / 2) for i in range(16)]
    leaves, device_slopes, bounds = make_inputs(
        [1000, 1, 3000, 97], dim=dim, dtype=dtype, slopes=slopes
    )
    wanted_leaves = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = triton_lightning_attention(
        *leaves[:3], device_slopes, bounds, None, False, piece_tokens=piece_tokens
    )
    wanted, _ = chunked_lightning_attention(
        *wanted_leaves[:3], device_slopes.double(), bounds, None, False
    )
    compare([out], [wanted], leaves[:3], wanted_leaves[:3], 2 * TOLERANCE[dtype])


@on_kernels
@pytest.mark.parametrize("piece_tokens", [0, 64])
@pytest.mark.parametrize("lengths", [[140], [75, 65]])
def test_reference_without_states(lengths: list[int], piece_tokens: int) -> None:
    (q, k, v, _), slopes, bounds = make_inputs(lengths)
    out, final = triton_lightning_attention(
        q, k, v, slopes, bounds, None, False, piece_tokens=piece_tokens
    )
    assert final is None
    wanted, _ = chunked_lightning_attention(q, k, v, slopes, bounds, None, False)
    compare([out], [wanted], [q, k, v], [q, k, v], TOLERANCE[q.dtype])


@on_kernels
@pytest.mark.parametrize("piece_tokens", [0, 64])
def test_gradient_through_the_final_state_alone(piece_tokens: int) -> None:
    leaves, slopes, _ = make_inputs([100], batch=2)
    q, k, v, state = leaves
    _, final = triton_lightning_attention(
        q, k, v, slopes, None, state, True, piece_tokens=piece_tokens
    )
    assert final is not None
    wanted_leaves = exact(leaves)
    _, wanted = recurrence(*wanted_leaves[:3], slopes.cpu(), [100], wanted_leaves[3])
    compare([final], [wanted], leaves[1:], wanted_leaves[1:], TOLERANCE[q.dtype])
    assert not torch.autograd.grad(
        triton_lightning_attention(q, k, v, slopes, None, None, True)[1].sum(), q
    )[0].any()


@on_kernels
def test_strided_inputs() -> None:
    """Views of a joint projection, and rows stored by head; the gradient arrives expanded."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 70, 2, 3 * 16, generator=generator).to(DEVICE).requires_grad_()
    q, k, v = qkv.split(16, dim=-1)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    slopes = torch.tensor([0.1, 0.0], device=DEVICE)
    out, _ = triton_lightning_attention(q, k, v, slopes, None, None, False, piece_tokens=64)
    wanted, _ = chunked_lightning_attention(q, k, v, slopes, None, None, False)
    compare([out], [wanted], [qkv], [qkv], TOLERANCE[torch.float32])
    # The sum's gradient is one number, expanded to all strides 0.
    got = torch.autograd.grad(
        triton_lightning_attention(q, k, v, slopes, None, None, False)[0].sum(),
        qkv,
        retain_graph=True,  # of the split
    )
    wanted, _ = chunked_lightning_attention(q, k, v, slopes, None, None, False)
    want = torch.autograd.grad(wanted.sum(), qkv)
    assert_near(got[0], want[0], TOLERANCE[torch.float32], "gradient of a sum")


@on_kernels
@pytest.mark.parametrize("piece_tokens", [0, 64])
def test_no_slope_overflows(piece_tokens: int) -> None:
    slopes = [0.0, 1e-4, 1.0, 1e4, float("inf")]
    leaves, device_slopes, _ = make_inputs([140], slopes=slopes)
    q, k, v, state = leaves
    out, final = triton_lightning_attention(
        q, k, v, device_slopes, None, state, True, piece_tokens=piece_tokens
    )
    assert final is not None
    wanted_leaves = exact(leaves)
    finite = device_slopes.cpu().double().clamp(max=1e4)
    wanted = recurrence(*wanted_leaves[:3], finite, [140], wanted_leaves[3])
    compare([out, final], list(wanted), leaves, wanted_leaves, TOLERANCE[torch.float32])


@on_kernels
@pytest.mark.parametrize("piece_tokens", [0, 64])
def test_a_document_does_not_see_another_one(piece_tokens: int) -> None:
    """Whatever finite numbers it holds (a NaN may spread over its row; the loss is NaN anyway)."""
    lengths = [40, 90, 70]
    (q, k, v, _), slopes, bounds = make_inputs(lengths)
    results = []
    for value in (0.5, -1e4):
        leaves = [x.detach().clone() for x in (q, k, v)]
        for x in leaves:
            x[:, 40:130] = value
            x.requires_grad_()
        out, final = triton_lightning_attention(
            *leaves, slopes, bounds, None, True, piece_tokens=piece_tokens
        )
        assert final is not None
        loss = out[:, :40].sum() + out[:, 130:].sum() + final.sum()
        results.append([out, *torch.autograd.grad(loss, leaves)])
    for clean, dirty in zip(*results, strict=True):
        for part in (slice(0, 40), slice(130, 200)):
            assert torch.equal(clean[:, part], dirty[:, part])


@on_kernels
def test_cutting_changes_rounding_only() -> None:
    (q, k, v, state), slopes, bounds = make_inputs([200, 30])
    results = [
        triton_lightning_attention(q, k, v, slopes, bounds, state, True, piece_tokens=segment)
        for segment in (0, 64, 128, 1024)
    ]
    for out, final in results[1:]:
        assert final is not None
        assert results[0][1] is not None
        assert_near(out, results[0][0], 1e-6, "output")
        assert_near(final, results[0][1], 1e-6, "final state")


@on_kernels
def test_packed_documents_with_states_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public op calls the kernels for each document."""
    monkeypatch.setattr(op, "why_not", lambda q: "")  # also in the interpreter
    lengths = [70, 0, 1, 65]
    (q, k, v, _), slopes, bounds = make_inputs(lengths)
    states = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    leaves = [q, k, v, states.to(DEVICE).requires_grad_()]
    out, final = op.lightning_attention(
        q, k, v, slopes, cu_seqlens=bounds, initial_state=leaves[3], output_final_state=True
    )
    assert final is not None
    wanted_leaves = exact(leaves)
    wanted = recurrence(*wanted_leaves[:3], slopes.cpu().double(), lengths, wanted_leaves[3])
    compare([out, final], list(wanted), leaves, wanted_leaves, TOLERANCE[torch.float32])


@on_kernels
def test_nothing_to_do() -> None:
    (q, k, v, state), slopes, _ = make_inputs([0])
    out, final = triton_lightning_attention(q, k, v, slopes, None, state, True)
    assert out.shape == q.shape
    assert final is not None
    assert torch.equal(final, state)


@on_kernels
def test_what_the_kernels_cannot_take_is_named() -> None:
    (q, k, v, _), slopes, _ = make_inputs([4])

    def call(*tensors: Tensor, piece_tokens: int = 0) -> None:
        triton_lightning_attention(*tensors, slopes, None, None, False, piece_tokens=piece_tokens)

    with pytest.raises(ValueError, match="need q in float32 or bfloat16"):
        call(q.half(), k.half(), v.half())
    with pytest.raises(ValueError, match=r"need v in float32 or bfloat16 and q, k, v of one"):
        call(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"k must be contiguous in its last dimension"):
        call(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    for dim in (8, 24, 512):
        wide = [torch.zeros(1, 4, 3, dim, device=DEVICE) for _ in range(3)]
        with pytest.raises(ValueError, match=f"power of two from 16 to 256, got {dim}"):
            call(*wide)
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        call(q, k, v, piece_tokens=100)


@on_kernels
@pytest.mark.parametrize(
    ("lengths", "piece_tokens", "with_states"), [([70], 0, False), ([65, 1], 64, True)]
)
def test_opcheck(
    lengths: list[int], piece_tokens: int, with_states: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second case has as many cuts as there may be: states of others are never written."""
    monkeypatch.undo()
    (q, k, v, state), slopes, bounds = make_inputs(lengths, slopes=[0.1])
    initial = state if with_states else None
    arguments = (q, k, v, slopes, bounds, initial, with_states, piece_tokens)
    torch.library.opcheck(_attend, arguments)
    with torch.no_grad():
        out, final, states, documents = _attend(*arguments)
        words = None if bounds is None else documents
        d_final = final if with_states else None
        backward = (out, d_final, q, k, v, slopes, words, initial, states, piece_tokens)
        torch.library.opcheck(_attend_backward, backward)


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (q, k, v, _), slopes, bounds = make_inputs([30, 50])

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, final = triton_lightning_attention(q * 1.5, k, v, slopes, bounds, None, True)
        assert final is not None
        return out.sum(-1) + final.sum()

    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor"
    )
    want = model(q, k, v)
    got = compiled(q, k, v)
    assert_near(got, want, 1e-6, "output")
    wanted = torch.autograd.grad(want.square().sum(), [q, k, v])
    gradients = torch.autograd.grad(got.square().sum(), [q, k, v])
    for name, a, b in zip("qkv", gradients, wanted, strict=True):
        assert_near(a, b, 1e-6, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("piece_tokens", [0, 2**16])
def test_addresses_of_a_million_tokens(piece_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^32 numbers a tensor; the last tokens equal those of a short row, by decay."""
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB")
    monkeypatch.undo()
    tokens, tail, shown = 2**20, 4096, 512
    slopes = torch.linspace(0.02, 1.0, 64, device="cuda")
    shape = (1, tokens, 64, 64)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    )
    out, _ = triton_lightning_attention(
        q, k, v, slopes, None, None, False, piece_tokens=piece_tokens
    )
    ends = [x[:, -tail:].detach().float().requires_grad_() for x in (q, k, v)]
    wanted, _ = chunked_lightning_attention(*ends, slopes, None, None, False)
    assert_near(out[:, -shown:], wanted[:, -shown:], 1.6e-2, "output")
    weight = torch.randn(1, tail, 64, 64, device="cuda").bfloat16()
    whole = torch.zeros_like(out)
    whole[:, -tail:] = weight
    gradients = torch.autograd.grad(out, [q, k, v], whole)
    wanted_gradients = torch.autograd.grad(wanted, ends, weight.float())
    for name, a, b in zip("qkv", gradients, wanted_gradients, strict=True):
        assert_near(a[:, -shown:], b[:, -shown:], 1.6e-2, name)


@pytest.mark.fast
def test_tile_loads_get_aligned_rows() -> None:
    """Also where torch calls a tensor contiguous: an odd address, an odd stride of a single row."""
    shape = (1, 5, 2, 16)
    odd_address = torch.zeros(1 + 160, dtype=torch.bfloat16)[1:].view(shape)
    odd_stride = torch.zeros(64, dtype=torch.bfloat16).as_strided((1, 1, 2, 16), (32, 1, 16, 1))
    for x in (odd_address, odd_stride):
        assert x.is_contiguous()
        ready = launch.addressable(x)
        assert ready.data_ptr() % 16 == 0
        assert not any(stride % 8 for stride in ready.stride()[:3])
    plain = torch.zeros(shape, dtype=torch.bfloat16)
    assert launch.addressable(plain) is plain


@pytest.mark.fast
def test_the_plan_fills_the_chip() -> None:
    def choose(tokens: int, heads: int, batch: int = 1) -> int:
        programs = batch * heads * 128 // choose_tile(torch.bfloat16, 128).block_values
        return choose_num_pieces(tokens // 64, programs, 132)

    assert choose(2**15, 64) == 1  # 128 programs on 132 multiprocessors
    assert choose(2**15, 16, batch=4) == 1
    assert choose(2**15, 16) == 4  # 128 programs
    assert choose(2**15, 36) == 7  # 504 programs in four waves
    assert choose(2**15, 80) == 3  # whole, the second wave of 160 programs would be 28
    assert choose(2**15, 1) == 64  # no piece below eight chunks
    assert choose(384, 1) == 1
    for heads in (1, 2, 4, 8, 16, 32):
        assert choose(2**17, heads) * heads * 2 >= 0.75 * 132


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own order")
@pytest.mark.parametrize("piece_tokens", [0, 64])
@pytest.mark.parametrize("lengths", [[10, 0, 60], [0, 0, 70, 0], [3, 5, 70, 1, 0, 130], [70, 0, 0]])
def test_no_program_writes_what_is_another_s(
    lengths: list[int], piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program runs first, and what lies around each allocation stays as it was."""
    from triton.runtime.interpreter import interpreter_builder

    guards: list[Tensor] = []
    allocate, place = torch.empty, interpreter_builder.set_grid_idx

    def guarded(*shape: Any, **options: Any) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        flat = allocate(size.numel() + 16384, **options).fill_(77)
        guards.extend([flat[:8192], flat[8192 + size.numel() :]])
        return flat[8192 : 8192 + size.numel()].view(size)

    def reverse(x: int, y: int, z: int) -> None:
        place(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", reverse)
    compare_with_recurrence(lengths, piece_tokens=piece_tokens, dtype=torch.bfloat16)
    assert guards
    assert all(bool((guard == 77).all()) for guard in guards)


@on_kernels
@pytest.mark.parametrize("lengths", [[300], [100, 30, 170]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_in_windows(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a row that would fill the chip alone run in turn."""
    monkeypatch.setattr(launch, "WINDOW_TOKENS", 128)
    monkeypatch.setattr(launch, "choose_num_pieces", lambda *_: 1)
    compare_with_recurrence(lengths, dtype=dtype)


@on_kernels
@pytest.mark.parametrize("lengths", [[1], [64, 64], [63, 1, 0, 1, 65, 70], [1] * 129, [0, 64, 0]])
def test_documents_as_bits(lengths: list[int]) -> None:
    """The bound before token t: bit t of the words, and of those in reverse the bit before."""
    bounds = boundaries(lengths)
    tokens = sum(lengths)
    plan = launch.make_plan(torch.empty(1, tokens, 1, 64, dtype=torch.bfloat16), 64)
    words = launch.find_documents(plan, bounds.to(DEVICE)).tolist()
    inside = {bound for bound in bounds.tolist() if 0 < bound < tokens}
    for reverse, row in enumerate(words):
        assert len(row) % 2 == 0
        bits = {
            64 * (entry - 1) + bit + reverse
            for entry, word in enumerate(row)
            for bit in range(64)
            if word >> bit & 1
        }
        assert bits == inside


@pytest.mark.slow
@compiles_only
@pytest.mark.parametrize(
    ("dtype", "dim", "piece_tokens"),
    [
        (torch.bfloat16, 128, 0),
        (torch.bfloat16, 128, 64),
        (torch.bfloat16, 64, 0),
        (torch.bfloat16, 256, 64),
        (torch.float32, 128, 64),
    ],
)
def test_compiles_for_hopper(
    dtype: torch.dtype, dim: int, piece_tokens: int, compiled_for_hopper: list[tuple[str, Any]]
) -> None:
    """Tensor cores, the copy engine, and enough shared memory."""
    cut = piece_tokens > 0
    leaves = [torch.zeros(1, 256, 4, dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    state = torch.zeros(1, 4, dim, dim, requires_grad=True) if cut else None
    bounds = boundaries([100, 156]) if cut else None
    out, final = triton_lightning_attention(
        *leaves, torch.ones(4), bounds, state, cut, piece_tokens=piece_tokens
    )
    loss = out.sum() if final is None else out.sum() + final.sum()
    loss.backward()
    names = {name for name, _ in compiled_for_hopper}
    in_pieces = {"documents_kernel", "local_state_kernel", "carry_kernel"}
    assert names == {"scan_kernel"} | (in_pieces if cut else set())
    for name, kernel in compiled_for_hopper:
        assert kernel.metadata.shared <= 227 * 1024
        if dtype == torch.bfloat16 and name == "scan_kernel":
            assert "wgmma.mma_async" in kernel.asm["ptx"], name
            assert "cp.async.bulk.tensor" in kernel.asm["ptx"], name
