"""Causal softmax attention against the formula written out in fp64, by every back end there is.

On the CPU the calls of back ends that need a GPU go to stand-ins with the same parameters.
"""

import inspect
import itertools
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fulmen.kernels.attention import back_ends, op, softmax_attention
from fulmen.kernels.attention.back_ends import LONG_DOCUMENT, PACKAGES, ranking, why_not
from fulmen.kernels.attention.reference import reference_attention
from fulmen.kernels.registry import configure

DIM = 6
ON_GPU = ["flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_varlen", "cudnn", "sdpa"]
TOLERANCE = 2e-2
"""Largest error over largest value, bf16: 8 bits, and the weights are rounded too."""


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Query by query and head by head; the queries are the last positions of the keys."""
    tokens, heads, dim = q.shape[1:]
    group, offset = heads // k.shape[2], k.shape[1] - tokens
    ends = torch.tensor(lengths or [k.shape[1]]).cumsum(0).tolist()
    starts = [0, *ends]
    rows = []
    for token in range(tokens):
        position = token + offset
        first = max(start for start in starts if start <= position)
        heads_out = []
        for head in range(heads):
            keys = k[:, first : position + 1, head // group]
            values = v[:, first : position + 1, head // group]
            scores = torch.einsum("bd,bsd->bs", q[:, token, head], keys) / math.sqrt(dim)
            heads_out.append(torch.einsum("bs,bsd->bd", scores.softmax(-1), values))
        rows.append(torch.stack(heads_out, 1))
    return torch.stack(rows, 1)


def make(
    batch: int, tokens: int, keys: int, heads: int, kv_heads: int, dim: int = DIM
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, heads, dim)] + [(batch, keys, kv_heads, dim)] * 2
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    mine = torch.autograd.grad((got * weight).sum(), leaves)
    theirs = torch.autograd.grad((want * weight).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("attention", [softmax_attention, reference_attention])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 17])
def test_grouped_queries(attention: Any, kv_heads: int, tokens: int) -> None:
    leaves = make(2, tokens, tokens, 4, kv_heads)
    assert_same(attention(*leaves), written_out(*leaves), leaves)


@pytest.mark.fast
@pytest.mark.parametrize("attention", [softmax_attention, reference_attention])
@pytest.mark.parametrize("lengths", [[17], [1, 5, 11], [1] * 17, [16, 1], [6, 0, 11]])
def test_packed_documents(attention: Any, lengths: list[int]) -> None:
    leaves = make(1, 17, 17, 4, 2)
    got = attention(*leaves, cu_seqlens=boundaries(lengths))
    assert_same(got, written_out(*leaves, lengths), leaves)


def test_packed_documents_around_a_block() -> None:
    lengths = [1, 63, 64, 65]
    leaves = make(1, 193, 193, 2, 1)
    bounds = boundaries(lengths)
    got = softmax_attention(*leaves, cu_seqlens=bounds, max_seqlen=65, host_cu_seqlens=bounds)
    assert_same(got, written_out(*leaves, lengths), leaves)


@pytest.mark.fast
@pytest.mark.parametrize("attention", [softmax_attention, reference_attention])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 9), (3, 9), (8, 9)])
def test_queries_behind_a_cache(attention: Any, tokens: int, keys: int) -> None:
    leaves = make(2, tokens, keys, 4, 2)
    assert_same(attention(*leaves), written_out(*leaves), leaves)


@pytest.mark.fast
def test_a_document_does_not_see_another_one() -> None:
    q, k, v = (x.detach() for x in make(1, 30, 30, 4, 2))
    cu_seqlens = torch.tensor([0, 8, 20, 30], dtype=torch.int32)
    clean = softmax_attention(q, k, v, cu_seqlens=cu_seqlens)
    for x in (q, k, v):
        x[:, 8:20] = float("nan")
    dirty = softmax_attention(q, k, v, cu_seqlens=cu_seqlens)
    assert torch.equal(clean[:, :8], dirty[:, :8])
    assert torch.equal(clean[:, 20:], dirty[:, 20:])
    assert dirty[:, 8:20].isnan().all()


@pytest.mark.fast
def test_bf16() -> None:
    low = [x.detach().bfloat16() for x in make(1, 40, 40, 4, 2)]
    got = softmax_attention(*low)
    want = written_out(*(x.double() for x in low))
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.fast
@pytest.mark.parametrize("bounds", [None, [0], [0, 0], [0, 0, 0]])
def test_no_tokens(bounds: list[int] | None) -> None:
    leaves = make(1, 0, 0, 4, 2)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    got = softmax_attention(*leaves, cu_seqlens=cu_seqlens)
    assert got.shape == (1, 0, 4, DIM)
    assert [x.shape for x in torch.autograd.grad(got.sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.fast
def test_bad_arguments_are_named() -> None:
    q, k, v = (x.detach() for x in make(2, 5, 5, 4, 3))
    with pytest.raises(ValueError, match=r"4 query heads .* 3 kv heads"):
        softmax_attention(q, k, v)
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        softmax_attention(q, q, q, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"more queries than keys: q \[2, 5, 4, 6\], k \[2, 4,"):
        softmax_attention(q, q[:, 1:], q[:, 1:])
    with pytest.raises(ValueError, match="do not agree"):
        softmax_attention(q, q, q[:, 1:])
    with pytest.raises(ValueError, match=r"types differ: .*float64, .*float32"):
        softmax_attention(q, q.float(), q.float())


# The choice.


@pytest.fixture
def chosen() -> Iterator[Any]:
    """Asks for a back end until the test ends."""
    yield lambda name: configure({"attention": name})
    configure({"attention": "auto"})


def best(available: set[str], **sizes: Any) -> str:
    sizes = {"documents": 1, "lengths_known": True, "compiling": False} | sizes
    names = ranking(**sizes)
    assert sorted(names) == sorted(ON_GPU)
    return next(name for name in names if name in available)


@pytest.mark.fast
def test_which_back_end_is_best() -> None:
    own = {"torch_varlen", "cudnn", "sdpa"}
    row: dict[str, Any] = {"tokens": 65536, "keys": 65536}
    long = row | {"documents": 65536 // LONG_DOCUMENT}
    many = row | {"documents": 65536 // LONG_DOCUMENT + 1}
    assert best(own, **row) == "cudnn"
    assert best(own, **row, compiling=True) == "cudnn"
    assert best(own, **long) == "cudnn"
    assert best(own, **many) == "torch_varlen"
    assert best(own, **long, lengths_known=False) == "torch_varlen"
    assert best(own, **long, compiling=True) == "torch_varlen"
    assert best(own, tokens=64, keys=65) == "torch_varlen"
    assert best(own, tokens=1, keys=65) == "sdpa"
    for sizes in (row, long, many):
        assert best(own | {"flash_attn_3", "flash_attn_2"}, **sizes) == "flash_attn_3"
        assert best(own | {"flash_attn_3", "flash_attn_4"}, **sizes) == "flash_attn_4"
        assert best(own | {"flash_attn_4"}, **sizes, compiling=True) != "flash_attn_4"
    assert best(own | {"flash_attn_2"}, **many) == "flash_attn_2"
    assert best(own | {"flash_attn_2"}, **row) == "cudnn"


@pytest.mark.fast
def test_a_missing_package_is_named_with_the_line_that_installs_it(chosen: Any) -> None:
    leaves = make(1, 5, 5, 4, 2)
    missing = [name for name in PACKAGES if back_ends._import_problem(name)]
    assert missing or torch.cuda.is_available()
    for name in missing:
        chosen(name)
        with pytest.raises(ValueError, match=rf"^kernels.attention={name}: .*pip install ") as info:
            softmax_attention(*leaves)
        assert PACKAGES[name][1] in str(info.value)


@pytest.mark.fast
def test_a_back_end_that_cannot_take_the_call_says_why(
    chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen("cudnn")
    with pytest.raises(ValueError, match=r"kernels.attention=cudnn: needs a CUDA tensor"):
        softmax_attention(*make(1, 5, 5, 4, 2))
    with pytest.raises(ValueError, match=r"must be auto or one of .*torch_varlen"):
        chosen("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    low = torch.bfloat16
    assert why_not("cudnn", "cuda", 0, torch.float32, 128) == "needs bf16 or fp16"
    assert why_not("cudnn", "cuda", 0, low, 256).endswith("multiple of 8, up to 128")
    assert why_not("torch_varlen", "cuda", 0, low, 20).endswith("multiple of 8, up to 256")
    assert why_not("cudnn", "cuda", 0, low, 128) == "needs compute capability 9 or 10"
    assert why_not("sdpa", "cuda", 0, torch.float32, 20) == ""


# Calls, with stand-ins for what needs a GPU.


def stand_in_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Boundaries for queries and keys of their own."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert 2 <= max_q >= int(cu_q.diff().max())
    assert 2 <= max_k >= int(cu_k.diff().max())
    spans = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    parts = [
        reference_attention(q[None, a:b], k[None, c:d], v[None, c:d])[0] for (a, b), (c, d) in spans
    ]
    return torch.cat(parts)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen(*args: Any, **options: Any) -> Tensor:
        bound = inspect.signature(varlen_attn).bind(*args, **options)
        assert bound.arguments["window_size"] == (-1, 0)
        assert bound.arguments.get("enable_gqa", True)
        return stand_in_varlen(*args)

    def package_varlen(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Any:
        assert causal
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return stand_in_varlen(q, k, v, *(options[name] for name in names)), None

    package = ModuleType("package")
    package.flash_attn_varlen_func = package_varlen  # type: ignore[attr-defined]
    package.flash_attn_func = lambda q, k, v, **_: reference_attention(q, k, v)  # type: ignore[attr-defined]
    package.cute = package  # type: ignore[attr-defined]
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setattr(back_ends, "varlen_attn", varlen)
    monkeypatch.setattr(op, "why_not", lambda *_: "")


@pytest.mark.fast
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ON_GPU)
def test_every_back_end_is_called_right(name: str, chosen: Any) -> None:
    chosen(name)
    for batch, tokens, keys in ((2, 7, 7), (2, 3, 9), (1, 1, 9)):
        leaves = make(batch, tokens, keys, 4, 2)
        assert_same(softmax_attention(*leaves), written_out(*leaves), leaves)
    for lengths in ([1, 5, 11], [6, 0, 11], [17]):
        leaves = make(1, 17, 17, 4, 2)
        bounds = boundaries(lengths)
        for more in ({}, {"max_seqlen": max(lengths), "host_cu_seqlens": bounds}):
            got = softmax_attention(*leaves, cu_seqlens=bounds, **more)
            assert_same(got, written_out(*leaves, lengths), leaves)
    joint = make(1, 17, 17, 8, 8)[0]
    got = softmax_attention(*joint.split([4, 2, 2], 2), cu_seqlens=boundaries([6, 11]))
    assert_same(got, written_out(*joint.split([4, 2, 2], 2), [6, 11]), [joint])


def test_one_graph_holds_rows_and_varlen(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Varlen on the meta device: torch's own op, its shapes, whatever the bound of the lengths."""
    compiled = torch.compile(softmax_attention, backend="aot_eager", fullgraph=True)
    for tokens in (9, 13):
        leaves = make(2, tokens, tokens, 4, 2)
        assert_same(compiled(*leaves), written_out(*leaves), leaves)

    able = torch.compiler.assume_constant_result(lambda *_: "")
    monkeypatch.setattr(op, "why_not", able)
    chosen("torch_varlen")
    leaves = [x.detach().bfloat16().to("meta").requires_grad_() for x in make(1, 30, 30, 4, 2)]
    bounds = torch.zeros(4, dtype=torch.int32, device="meta")
    for longest in (None, 17, 12):
        got = compiled(*leaves, cu_seqlens=bounds, max_seqlen=longest)
        assert got.shape == leaves[0].shape
        gradients = torch.autograd.grad(got.sum(), leaves)
        assert [x.shape for x in gradients] == [x.shape for x in leaves]
    torch.compiler.reset()


# On a GPU.

without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=ON_GPU)
def back_end(request: pytest.FixtureRequest, chosen: Any) -> str:
    reason = why_not(request.param, "cuda", 0, torch.bfloat16, 64)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    chosen(request.param)
    return request.param


def on_gpu(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().bfloat16().cuda().requires_grad_() for x in leaves]


def assert_close(mine: Tensor, wanted: Tensor, name: str, least: float = 0.1) -> None:
    """Against the largest value, or `least` where values of order 1 cancel to nothing."""
    assert mine.isfinite().all(), name
    error = (mine.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE * wanted.abs().max().clamp(min=least), f"{name}: {error}"


def check_on_gpu(
    leaves: list[Tensor], lengths: list[int] | None = None, attention: Any = softmax_attention
) -> None:
    """Results and gradients, of bf16 leaves, against fp64; the host waits for nothing."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weight = torch.randn_like(leaves[0])
    options: dict[str, Any] = {}
    host = None
    if lengths is not None:
        host = boundaries(lengths)
        options = {"cu_seqlens": host.cuda(), "max_seqlen": max(lengths), "host_cu_seqlens": host}
    torch.autograd.grad(attention(*leaves, **options), leaves, weight)  # what compiles may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention(*leaves, **options)
        mine = torch.autograd.grad(got, leaves, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference_attention(*exact, host)
    theirs = torch.autograd.grad(want, exact, weight.double())
    assert got.dtype == torch.bfloat16
    for name, a, b in zip("oqkv", (got, *mine), (want, *theirs), strict=True):
        assert_close(a, b, name)


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("tokens", "kv_heads"), [(1, 2), (2, 8), (65, 1), (192, 2), (700, 2)])
def test_rows_on_the_gpu(back_end: str, tokens: int, kv_heads: int, dim: int) -> None:
    check_on_gpu(on_gpu(make(2, tokens, tokens, 8, kv_heads, dim)))


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[1, 63, 64, 65], [1] * 5, [0, 130, 0, 257, 1, 0], [300]])
def test_packed_documents_on_the_gpu(back_end: str, lengths: list[int], dim: int) -> None:
    tokens = sum(lengths)
    check_on_gpu(on_gpu(make(1, tokens, tokens, 8, 2, dim)), lengths)


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize(("tokens", "keys"), [(1, 2), (1, 300), (3, 300), (129, 300)])
def test_queries_behind_a_cache_on_the_gpu(back_end: str, tokens: int, keys: int) -> None:
    check_on_gpu(on_gpu(make(2, tokens, keys, 8, 2, 64)))


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("tokens", [192, 704])
def test_very_negative_scores_on_the_gpu(back_end: str, tokens: int) -> None:
    """All scores near -120: exp(0 - log_sum_exp) of a padded key overflows."""
    leaves = make(1, tokens, tokens, 8, 2, 64)
    with torch.no_grad():
        leaves[0].mul_(0.1)[..., 0] = 1.0
        leaves[1].mul_(0.1)[..., 0] = -120 * math.sqrt(64)
    leaves = on_gpu(leaves)
    host = boundaries([tokens - 64, 64])
    for bounds in (None, host):
        got = softmax_attention(
            *leaves, cu_seqlens=None if bounds is None else bounds.cuda(), host_cu_seqlens=bounds
        )
        assert_close(got, reference_attention(*(x.double() for x in leaves), bounds), "o")
        # Large equal keys cancel in q's gradient: its digits are lost, whoever computes it.
        for gradient in torch.autograd.grad(got, leaves, torch.randn_like(got)):
            assert gradient.isfinite().all()


@pytest.mark.gpu
@without_gpu
def test_views_and_loose_bounds_on_the_gpu(back_end: str) -> None:
    joint = torch.randn(1, 200, 12, 64, dtype=torch.bfloat16, device="cuda")
    views = joint.split([8, 2, 2], 2)
    bounds = boundaries([90, 110]).cuda()
    got = softmax_attention(*views, cu_seqlens=bounds)
    assert_close(got, reference_attention(*(x.double() for x in views), bounds), "o")


@pytest.mark.gpu
@without_gpu
def test_one_graph_on_the_gpu(back_end: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(softmax_attention, fullgraph=back_end != "flash_attn_4")
    for tokens in (130, 150):
        check_on_gpu(on_gpu(make(2, tokens, tokens, 8, 2, 64)), attention=compiled)
    # Calls per document break the graph.
    torch.compiler.reset()
    whole = back_end not in ("flash_attn_4", "cudnn", "sdpa")
    compiled = torch.compile(softmax_attention, fullgraph=whole)
    for lengths in ([100, 57], [80, 77], [120, 90]):
        leaves = on_gpu(make(1, sum(lengths), sum(lengths), 8, 2, 64))
        check_on_gpu(leaves, lengths, attention=compiled)


def test_cudnn_takes_large_rows_by_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 2**20 * 16 * 128  # a million tokens of 16 heads
    assert [back_ends.head_groups(row, n) for n in (1, 2, 3, 8)] == [0, 2, 3, 2]
    assert back_ends.head_groups(row - 1, 2) == 1
    leaves = make(1, 20, 20, 8, 4)
    want = reference_attention(*leaves)
    gradient = torch.randn_like(want)
    theirs = torch.autograd.grad(want, leaves, gradient)
    monkeypatch.setattr(back_ends, "TOO_LARGE", want.numel() // 3)
    calls: list[int] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def record(q: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(q.shape[1])
        return sdpa(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    got = back_ends.attend_with_sdpa(*leaves, None, cudnn=True)
    mine = torch.autograd.grad(got, leaves, gradient)
    assert calls == [2] * 4
    for a, b in zip((got, *mine), (want, *theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_more_elements_than_32_bits_on_the_gpu(back_end: str, kv_heads: int) -> None:
    """One document, of which the last eight queries are checked: they see every key."""
    tokens, heads, dim, last = 2**18 + 100, 64, 128, 8
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    shapes = [(1, tokens, heads, dim)] + [(1, tokens, kv_heads, dim)] * 2
    leaves = [torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shapes]
    for x in leaves:
        x.requires_grad_()
    if back_end == "cudnn" and kv_heads == 1:
        with pytest.raises(ValueError, match=r"cudnn: needs fewer than 2\^31 numbers"):
            softmax_attention(*leaves)
        return
    got = softmax_attention(*leaves)
    gradient = torch.zeros_like(got)
    gradient[:, -last:] = torch.randn_like(gradient[:, -last:])
    mine = torch.autograd.grad(got, leaves, gradient)
    exact = [x.detach().float() for x in (leaves[0][:, -last:], *leaves[1:])]
    for x in exact:
        x.requires_grad_()
    want = reference_attention(*exact)
    theirs = torch.autograd.grad(want, exact, gradient[:, -last:].float())
    assert_close(got[:, -last:], want, "o", least=0.0)
    assert_close(mine[0][:, -last:], theirs[0], "q", least=0.0)
    assert not mine[0][:, :-last].any()
    for name, a, b in zip("kv", mine[1:], theirs[1:], strict=True):
        assert_close(a, b, name, least=0.0)
