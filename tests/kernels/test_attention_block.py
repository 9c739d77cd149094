"""Attention by blocks: outputs, log-sum-exps, and gradients that add up to those of the whole."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fulmen.kernels.attention import Documents, attend_block, attend_block_backward, block
from fulmen.kernels.attention import reference as reference_module
from fulmen.kernels.attention.back_ends import LONG_DOCUMENT, why_not
from fulmen.kernels.attention.block import ranking
from fulmen.kernels.attention.reference import (
    reference_attention,
    reference_block,
    reference_block_backward,
)
from fulmen.kernels.registry import configure

ATEN = torch.ops.aten
DIM = 6
TOLERANCE = 2e-2
"""Largest error over largest value, bf16; as in test_attention.py."""


def make(tokens: int, keys: int, heads: int, kv_heads: int, dim: int = DIM) -> list[Tensor]:
    """q, k, v, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, dim)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, shapes[0])]


def documents_of(lengths: list[int], device: str = "cpu") -> Documents:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Documents(tuple(lengths), bounds)


def whole(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: list[int]) -> list[Tensor]:
    """Output and gradients by autograd, causal in documents."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference_attention(*(x[None] for x in leaves), documents_of(lengths).cu_seqlens)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


@pytest.mark.fast
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[17], [1, 5, 11], [1] * 17, [16, 1]])
@pytest.mark.parametrize("piece", [1024, 4])
def test_documents(
    lengths: list[int], kv_heads: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "PIECE", piece)
    q, k, v, do = make(17, 17, 4, kv_heads)
    documents = documents_of(lengths)
    out, lse = attend_block(q, k, v, documents)
    gradients = attend_block_backward(do, q, k, v, out, lse, documents)
    for mine, want in zip((out, *gradients), whole(q, k, v, do, lengths), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("piece", [1024, 4])
def test_blocks_add_up(kv_heads: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 9 of 20 tokens: 4 and 7 keys before them, and their own."""
    monkeypatch.setattr(reference_module, "PIECE", piece)
    q, k, v, do = make(20, 20, 4, kv_heads)
    last = slice(11, 20)
    blocks = [(slice(0, 4), None), (slice(4, 11), None), (last, documents_of([9]))]
    parts = [attend_block(q[last], k[x], v[x], documents) for x, documents in blocks]
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = sum(out * torch.exp(one - lse).t()[:, :, None] for out, one in parts)
    assert isinstance(out, Tensor)

    do[:11] = 0
    want, dq, dk, dv = whole(q, k, v, do, [20])
    torch.testing.assert_close(out, want[last], rtol=0, atol=1e-12)
    sum_dq = torch.zeros_like(out)
    for x, documents in blocks:
        mine = attend_block_backward(do[last], q[last], k[x], v[x], out, lse, documents)
        sum_dq += mine[0]
        torch.testing.assert_close(mine[1], dk[x], rtol=0, atol=1e-12)
        torch.testing.assert_close(mine[2], dv[x], rtol=0, atol=1e-12)
    torch.testing.assert_close(sum_dq, dq[last], rtol=0, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("lengths", [None, [5, 12]])
def test_types_and_no_tokens(lengths: list[int] | None) -> None:
    q, k, v, do = (x.bfloat16() for x in make(17, 17, 4, 2))
    documents = None if lengths is None else documents_of(lengths)
    out, lse = attend_block(q, k, v, documents)
    assert (out.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (4, 17))
    exact, exact_lse = attend_block(q.double(), k.double(), v.double(), documents)
    assert (out - exact).abs().max() <= TOLERANCE * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
    gradients = attend_block_backward(do, q, k, v, out, lse, documents)
    assert {x.dtype for x in gradients} == {torch.float32}

    nothing = None if lengths is None else Documents((), torch.zeros(1, dtype=torch.int32))
    keys = k if lengths is None else k[:0]
    out, lse = attend_block(q[:0], keys, keys, nothing)
    assert (out.shape, lse.shape) == ((0, 4, DIM), (4, 0))
    gradients = attend_block_backward(do[:0], q[:0], keys, keys, out, lse, nothing)
    assert [x.shape for x in gradients] == [(0, 4, DIM), keys.shape, keys.shape]
    assert not any(x.any() for x in gradients)


# The choice, and the calls of torch's own operators.


@pytest.fixture
def chosen() -> Iterator[Any]:
    """Asks for a back end until the test ends."""
    yield lambda name: configure({"attention_block": name})
    configure({"attention_block": "auto"})


@pytest.mark.fast
def test_large_blocks_go_to_cudnn(chosen: Any) -> None:
    n = LONG_DOCUMENT
    assert ranking(n, n, 1)[0] == ranking(3 * n, 3 * n, 3)[0] == "cudnn"
    assert ranking(n, n // 2, None)[0] == "cudnn"
    assert ranking(n, n // 2 - 1, None)[0] == ranking(n - 1, n - 1, 1)[0] == "flash"
    assert ranking(3 * n - 1, 3 * n - 1, 3)[0] == "flash"
    for name in ("cudnn", "flash"):
        chosen(name)
        with pytest.raises(ValueError, match=f"kernels.attention_block={name}: needs a CUDA tens"):
            attend_block(*make(5, 5, 4, 2)[:3])


class _Ops:
    """Stand-ins for `torch.ops.aten`: the same parameters by position, computed by the formula."""

    def _flash_attention_forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        bind("_flash_attention_forward", (q, k, v, *rest))
        cu_q, cu_k, max_q, max_k, dropout, causal, debug = rest
        assert (dropout, debug) == (0.0, False)
        if cu_q is None:
            assert (max_q, max_k) == (q.shape[1], k.shape[1])
            lengths = [q.shape[1]] if causal else None
            out, lse = reference_block(q[0], k[0], v[0], lengths)
            return out[None], lse[None], None, None, None
        return *reference_block(q, k, v, packed(cu_q, cu_k, max_q, max_k, causal)), None, None, None

    def _flash_attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
    ) -> Any:
        bind("_flash_attention_backward", (do, q, k, v, out, lse, *rest))
        assert lse.is_contiguous()
        cu_q, cu_k, max_q, max_k, dropout, causal, _seed, _unused = rest
        assert dropout == 0.0
        tensors = (do, q, k, v, out, lse)
        if cu_q is not None:
            lengths = packed(cu_q, cu_k, max_q, max_k, causal)
            return reference_block_backward(*tensors, lengths)
        lengths = [q.shape[1]] if causal else None
        parts = reference_block_backward(*(x[0] for x in tensors), lengths)
        return tuple(x[None] for x in parts)

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *rest: Any
    ) -> Any:
        bind("_scaled_dot_product_cudnn_attention", (q, k, v, bias, with_lse, *rest))
        assert bias is None
        assert with_lse
        assert min(q.shape[2], k.shape[2]) > 1
        causal = bool(rest[1]) if rest else False
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out, lse = reference_block(q, k, v, [q.shape[0]] if causal else None)
        return out.transpose(0, 1)[None], lse[None, :, :, None], *[None] * 7

    def _scaled_dot_product_cudnn_attention_backward(self, *args: Any) -> Any:
        bind("_scaled_dot_product_cudnn_attention_backward", args)
        do, q, k, v, out = (x[0].transpose(0, 1) for x in args[:5])
        lse, _seed, _offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal = args[5:]
        assert (bias, cu_q, cu_k, dropout) == (None, None, None, 0.0)
        assert (max_q, max_k, lse.shape) == (q.shape[0], k.shape[0], (1, *q.shape[1::-1], 1))
        lengths = [q.shape[0]] if causal else None
        parts = reference_block_backward(do, q, k, v, out, lse[0, :, :, 0], lengths)
        return tuple(x.transpose(0, 1)[None] for x in parts)


def packed(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> list[int]:
    lengths = cu_q.diff().tolist()
    assert causal
    assert cu_q is cu_k
    assert max_q == max_k == max(2, *lengths)
    return lengths


def bind(name: str, args: tuple) -> None:
    """The arguments fit the schema of torch's operator: on the meta device, in bf16."""
    operator = getattr(ATEN, name)

    def as_meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to("meta", torch.bfloat16 if x.is_floating_point() else x.dtype)

    operator(*(as_meta(x) for x in args))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["flash", "cudnn"])
@pytest.mark.parametrize("lengths", [None, [17], [1, 5, 11]])
def test_torch_is_called_right(
    name: str, lengths: list[int] | None, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "why_not", lambda *_: "")
    monkeypatch.setattr(torch.ops, "aten", _Ops())
    block._cudnn_lse_dims.cache_clear()
    chosen(name)
    for keys in (17, 1) if lengths is None else (17,):
        q, k, v, do = make(17, keys, 4, 2)
        documents = None if lengths is None else documents_of(lengths)
        out, lse = attend_block(q, k, v, documents)
        want, want_lse = reference_block(q, k, v, lengths)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        both = torch.cat([lse, lse], 1)[:, :17]  # as views of what is longer
        mine = attend_block_backward(do, q, k, v, out, both, documents)
        theirs = reference_block_backward(do, q, k, v, out, lse, lengths)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
    block._cudnn_lse_dims.cache_clear()


# On a GPU.

without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def assert_close(mine: Tensor, wanted: Tensor, name: str, least: float = 0.1) -> None:
    assert mine.isfinite().all(), name
    error = (mine.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE * wanted.abs().max().clamp(min=least), f"{name}: {error}"


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("name", ["flash", "cudnn"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(
    ("tokens", "keys", "lengths"),
    [
        (1, 1, None),
        (1, 300, None),
        (300, 1, None),
        (129, 700, None),
        (700, 129, None),
        (300, 300, [300]),
        (193, 193, [1, 63, 64, 65]),
        (5, 5, [1] * 5),
    ],
)
def test_blocks_on_the_gpu(
    tokens: int,
    keys: int,
    lengths: list[int] | None,
    kv_heads: int,
    dim: int,
    name: str,
    chosen: Any,
) -> None:
    """Against fp64, with an output and log-sum-exp over more keys than the block has."""
    reason = why_not("torch_varlen" if name == "flash" else name, "cuda", 0, torch.bfloat16, dim)
    if reason:
        pytest.skip(f"{name}: {reason}")
    chosen(name)
    q, k, v, do = (x.bfloat16().cuda() for x in make(tokens, keys, 8, kv_heads, dim))
    kv = torch.cat([k, v], 1)
    k, v = kv[:, :kv_heads], kv[:, kv_heads:]  # as they come: halves of one tensor
    documents = None if lengths is None else documents_of(lengths, "cuda")
    attend_block_backward(do, q, k, v, *attend_block(q, k, v, documents), documents)  # plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = attend_block(q, k, v, documents)
        total = torch.logaddexp(lse, torch.zeros_like(lse))  # another key of score 0, value 0
        whole_out = (out * torch.exp(lse - total).t()[:, :, None]).bfloat16()
        mine = attend_block_backward(do, q, k, v, whole_out, total, documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [x.double() for x in (do, q, k, v)]
    want, want_lse = reference_block(*exact[1:], lengths)
    assert_close(out, want, "out")
    assert (lse.dtype, lse.shape) == (torch.float32, (8, tokens))
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-2)
    want_total = torch.logaddexp(want_lse, torch.zeros_like(want_lse))
    want_whole = want * torch.exp(want_lse - want_total).t()[:, :, None]
    theirs = reference_block_backward(*exact, want_whole, want_total, lengths)
    for which, a, b in zip("qkv", mine, theirs, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, which)
