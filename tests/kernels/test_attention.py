"""Causal softmax attention against the formula written out in fp64."""

import math

import pytest
import torch
from torch import Tensor

from fulmen.kernels.attention import softmax_attention

DIM = 6


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


def make(batch: int, tokens: int, keys: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, heads, DIM)] + [(batch, keys, kv_heads, DIM)] * 2
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def assert_same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    mine = torch.autograd.grad((got * weight).sum(), leaves)
    theirs = torch.autograd.grad((want * weight).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 17])
def test_grouped_queries(kv_heads: int, tokens: int) -> None:
    leaves = make(2, tokens, tokens, 4, kv_heads)
    assert_same(softmax_attention(*leaves), written_out(*leaves), leaves)


@pytest.mark.fast
@pytest.mark.parametrize("lengths", [[17], [1, 5, 11], [1] * 17, [16, 1], [6, 0, 11]])
def test_packed_documents(lengths: list[int]) -> None:
    leaves = make(1, 17, 17, 4, 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    got = softmax_attention(*leaves, cu_seqlens=cu_seqlens)
    assert_same(got, written_out(*leaves, lengths), leaves)


@pytest.mark.fast
@pytest.mark.parametrize(("tokens", "keys"), [(1, 9), (3, 9), (8, 9)])
def test_queries_behind_a_cache(tokens: int, keys: int) -> None:
    leaves = make(2, tokens, keys, 4, 2)
    assert_same(softmax_attention(*leaves), written_out(*leaves), leaves)


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
def test_bad_arguments_are_named() -> None:
    q, k, v = (x.detach() for x in make(2, 5, 5, 4, 3))
    with pytest.raises(ValueError, match=r"4 query heads .* 3 kv heads"):
        softmax_attention(q, k, v)
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        softmax_attention(q, q, q, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
