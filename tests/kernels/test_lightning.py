"""Lightning attention against its recurrence, token by token in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fulmen.kernels.lightning import lightning_attention
from fulmen.kernels.lightning.reference import CHUNK_TOKENS
from fulmen.models.layers import decay_slopes

EXACT = 1e-10  # fp64 against fp64; only the order of sums differs
SLOPES = torch.tensor([0.0, 0.004, 1.0, 40.0], dtype=torch.float64)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: list[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`S <- exp(-slope) S + k v^T`, `o = q^T S`; rows are cut into sequences of these lengths."""
    batch, _, heads, dim = q.shape
    sequences = batch if len(lengths) == 1 else len(lengths)
    decay = torch.exp(-slopes.double())[:, None, None]
    start = torch.zeros(sequences, heads, dim, dim, dtype=q.dtype) if state is None else state
    outputs, finals, first = [], [], 0
    for index, length in enumerate(lengths):
        current = start if len(lengths) == 1 else start[index : index + 1]
        for token in range(first, first + length):
            current = decay * current + k[:, token, :, :, None] * v[:, token, :, None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, token], current))
        finals.append(current)
        first += length
    output = torch.stack(outputs, 1) if outputs else torch.zeros_like(q)
    return output, torch.cat(finals)


def inputs(batch: int, tokens: int, sequences: int, *, dim: int = 5, seed: int = 0) -> list[Tensor]:
    """q, k, v and an initial state, fp64 leaves."""
    generator = torch.Generator().manual_seed(seed)
    heads = SLOPES.numel()
    shapes = [(batch, tokens, heads, dim)] * 3 + [(sequences, heads, dim, dim)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_gradients_equal(mine: list[Tensor], theirs: list[Tensor], leaves: list[Tensor]) -> None:
    """Gradients of a random projection of all results."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in mine]
    sums = [
        sum((w * x).sum() for w, x in zip(weights, results, strict=True))
        for results in (mine, theirs)
    ]
    got = torch.autograd.grad(sums[0], leaves)
    want = torch.autograd.grad(sums[1], leaves)
    for name, a, b in zip(("q", "k", "v", "state"), got, want, strict=False):
        scale = b.abs().max().clamp(min=1)
        assert (a - b).abs().max() <= EXACT * scale, name


@pytest.mark.fast
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_row_equals_the_recurrence(batch: int, tokens: int) -> None:
    q, k, v, state = leaves = inputs(batch, tokens, batch)
    got = lightning_attention(q, k, v, SLOPES, initial_state=state, output_final_state=True)
    want = recurrence(q, k, v, SLOPES, [tokens], state)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= EXACT * b.abs().max().clamp(min=1)
    assert_gradients_equal(list(got), list(want), leaves)


@pytest.mark.fast
@pytest.mark.parametrize(
    "lengths", [[1, 63, 64, 65], [64, 64], [3, 1, 1, 200], [130, 2], [257], [1] * 70, [10, 0, 60]]
)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_documents_equal_the_recurrence(lengths: list[int], with_state: bool) -> None:
    q, k, v, state = inputs(1, sum(lengths), len(lengths))
    leaves = [q, k, v, state] if with_state else [q, k, v]
    got = lightning_attention(
        q,
        k,
        v,
        SLOPES,
        cu_seqlens=boundaries(lengths),
        initial_state=state if with_state else None,
        output_final_state=with_state,
    )
    want = recurrence(q, k, v, SLOPES, lengths, state if with_state else None)
    results = [(a, b) for a, b in zip(got, want, strict=True) if a is not None]
    assert len(results) == (2 if with_state else 1)
    for a, b in results:
        assert (a - b).abs().max() <= EXACT * b.abs().max().clamp(min=1)
    assert_gradients_equal([a for a, _ in results], [b for _, b in results], leaves)


@pytest.mark.fast
def test_gradient_through_the_final_state_alone() -> None:
    leaves = inputs(2, 100, 2)
    q, k, v, state = leaves
    _, got = lightning_attention(q, k, v, SLOPES, initial_state=state, output_final_state=True)
    _, want = recurrence(q, k, v, SLOPES, [100], state)
    assert got is not None
    assert_gradients_equal([got], [want], [k, v, state])


@pytest.mark.fast
@settings(deadline=None, max_examples=25, database=None)
@given(data=st.data())
def test_any_boundaries(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 2**20))
    q, k, v, _ = leaves = inputs(1, sum(lengths), 1, dim=2, seed=seed)
    got, _ = lightning_attention(q, k, v, SLOPES, cu_seqlens=boundaries(lengths))
    want, _ = recurrence(q, k, v, SLOPES, lengths)
    assert (got - want).abs().max() <= EXACT * want.abs().max().clamp(min=1)
    assert_gradients_equal([got], [want], leaves[:3])


@pytest.mark.fast
def test_a_document_does_not_see_another_one() -> None:
    lengths = [40, 50, 60]
    q, k, v, _ = (x.detach() for x in inputs(1, 150, 1))
    clean, _ = lightning_attention(q, k, v, SLOPES, cu_seqlens=boundaries(lengths))
    for x in (q, k, v):
        x[:, 40:90] = 1e30
    dirty, _ = lightning_attention(q, k, v, SLOPES, cu_seqlens=boundaries(lengths))
    outside = [slice(0, 40), slice(90, 150)]
    for part in outside:
        assert torch.equal(clean[:, part], dirty[:, part])


@pytest.mark.fast
def test_the_state_continues_a_row() -> None:
    q, k, v, _ = (x.detach() for x in inputs(1, 150, 1))
    whole, final = lightning_attention(q, k, v, SLOPES, output_final_state=True)
    state, parts = None, []
    for part in (slice(0, 70), slice(70, 71), slice(71, 150)):
        output, state = lightning_attention(
            q[:, part],
            k[:, part],
            v[:, part],
            SLOPES,
            initial_state=state,
            output_final_state=True,
        )
        parts.append(output)
    assert final is not None
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-11)


@pytest.mark.fast
@pytest.mark.parametrize("slope", [0.0, 1e-4, 0.917, 1.0, 1e4])
def test_no_slope_overflows(slope: float) -> None:
    q, k, v, _ = inputs(1, 3 * CHUNK_TOKENS + 1, 1)
    slopes = torch.full((SLOPES.numel(),), slope)
    got, _ = lightning_attention(q, k, v, slopes)
    want, _ = recurrence(q, k, v, slopes, [q.shape[1]])
    assert (got - want).abs().max() <= EXACT * want.abs().max()
    for gradient in torch.autograd.grad(got.sum(), [q, k, v]):
        assert gradient.isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_lower_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """Largest error over largest value. bf16: the sums are fp32, so rounding of q, k, v aside (both
    sides get the rounded ones) what is left is the rounding of the output and of the gradients."""
    slopes = decay_slopes(4, 1, 8, torch.device("cpu"))
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(1, 200, 1)[:3]]
    exact = [x.detach().double().requires_grad_() for x in low]
    got, _ = lightning_attention(*low, slopes, cu_seqlens=boundaries([77, 123]))
    want, _ = recurrence(*exact, slopes, [77, 123])
    assert got.dtype == dtype
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = torch.autograd.grad((got * weight).sum(), low)
    theirs = torch.autograd.grad((want * weight.double()).sum(), exact)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.fast
def test_the_state_is_fp32_for_bf16() -> None:
    q, k, v, _ = (x.detach().bfloat16() for x in inputs(1, 9, 1))
    _, state = lightning_attention(q, k, v, SLOPES.float(), output_final_state=True)
    assert state is not None
    assert state.dtype == torch.float32


@pytest.mark.fast
def test_bad_arguments_are_named() -> None:
    q, k, v, state = (x.detach() for x in inputs(2, 6, 2))
    with pytest.raises(ValueError, match="must share one shape"):
        lightning_attention(q, k[:, :5], v, SLOPES)
    with pytest.raises(ValueError, match="must share one shape"):
        lightning_attention(q[0], k[0], v[0], SLOPES)
    with pytest.raises(ValueError, match=r"slopes must be \[4\]"):
        lightning_attention(q, k, v, SLOPES[:3])
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        lightning_attention(q, k, v, SLOPES, cu_seqlens=boundaries([2, 4]))
    with pytest.raises(ValueError, match=r"initial_state must be \(2, 4, 5, 5\)"):
        lightning_attention(q, k, v, SLOPES, initial_state=state[:1])
