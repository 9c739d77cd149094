"""Head and cross entropy in one op, against the two done apart."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulmen.kernels.cross_entropy import linear_cross_entropy, op, summed_cross_entropy

TOKENS, HIDDEN, VOCAB = 37, 12, 50


@pytest.fixture(params=[1, 4 * VOCAB, 4 * VOCAB * 5 + 3, 2**28])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time (twice: by rounding up, exactly), five, all."""
    monkeypatch.setattr(op, "CHUNK_BYTES", request.param)


def make(dtype: torch.dtype, *, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[::5] = op.IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    kept = labels != op.IGNORE_INDEX
    loss = loss + z_loss * logits.logsumexp(1)[kept].square().sum()
    return loss, *torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.fast
@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
)
def test_loss_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = make(dtype)
    want, *want_gradients = reference(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss - want) <= tolerance * want
    gradients = torch.autograd.grad(3 * loss, [hidden, weight])
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert got.dtype == dtype
        assert (got - 3 * exact).abs().max() <= tolerance * (3 * exact).abs().max()


@pytest.mark.fast
@pytest.mark.usefixtures("_chunks")
def test_the_loss_of_each_token() -> None:
    hidden, weight, labels = make(torch.float64)
    total, losses = summed_cross_entropy(hidden, weight, labels)
    want = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(losses, want.detach(), rtol=1e-12, atol=1e-12)
    assert not losses.requires_grad
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-12)


@pytest.mark.fast
@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_z_loss(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = make(dtype)
    want, *want_gradients = reference(hidden, weight, labels, z_loss=0.1)
    loss = linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    assert abs(loss - want) <= tolerance * want
    gradients = torch.autograd.grad(loss, [hidden, weight])
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert (got - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.fast
def test_the_loss_scale_is_not_rounded_to_the_gradients_type() -> None:
    """1 + 2^-8 would become 1 in bf16; in fp32 it moves most numbers to the next."""
    hidden, weight, labels = make(torch.bfloat16)
    scale = torch.tensor(1 + 2**-8)
    loss = linear_cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    scaled = torch.autograd.grad(loss * scale, [hidden, weight])
    for a, b in zip(once, scaled, strict=True):
        assert (a != b)[a != 0].float().mean() > 0.5


@pytest.mark.fast
@pytest.mark.parametrize("label", [-1, -101, VOCAB, 2**40])
def test_a_label_outside_the_vocabulary_shows(label: int) -> None:
    hidden, weight, labels = make(torch.float32)
    labels[3] = label
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_compiled_whole() -> None:
    hidden, weight, labels = make(torch.float32)

    def model(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(1.5 * hidden, weight, labels, z_loss=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), model(hidden))
    got = torch.autograd.grad(compiled(hidden), [hidden, weight])
    torch.testing.assert_close(got, torch.autograd.grad(model(hidden), [hidden, weight]))


@pytest.mark.fast
@pytest.mark.usefixtures("_chunks")
def test_ignored_labels_add_nothing() -> None:
    hidden, weight, labels = make(torch.float64)
    kept = labels != op.IGNORE_INDEX
    loss = linear_cross_entropy(hidden, weight, labels)
    short = linear_cross_entropy(hidden[kept], weight, labels[kept])
    assert abs(loss - short) <= 1e-12 * short
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad[~kept] == 0).all()
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)).item() == 0


@pytest.mark.fast
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient(frozen: str) -> None:
    hidden, weight, labels = make(torch.float64)
    want, *want_gradients = reference(hidden, weight, labels)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, labels)
    assert abs(loss - want) <= 1e-12 * want
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    moving = 0 if frozen == "weight" else 1
    torch.testing.assert_close((hidden, weight)[moving].grad, want_gradients[moving])


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.fast
def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_BYTES", 4 * VOCAB * 8)
    hidden, weight, labels = make(torch.float32, tokens=400)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert largest.numel == max(8 * VOCAB, hidden.numel(), weight.numel())
    assert largest.numel < 400 * VOCAB / 4


@pytest.mark.fast
def test_text01s_vocabulary_fits_a_chunk() -> None:
    assert op.CHUNK_BYTES // (4 * 200_064) >= 128  # tokens at a time: enough for a matrix product


@pytest.mark.fast
def test_bad_shapes_are_named() -> None:
    hidden, weight, labels = make(torch.float32)
    with pytest.raises(ValueError, match=r"hidden must be \[tokens, hidden_size\]"):
        linear_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(ValueError, match=r"got \(37, 12\) and \(36,\)"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"weight must be \[vocab_size, hidden_size\]"):
        linear_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"torch.bfloat16 for \(37, 12\) torch.float32"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"labels must be int64, got torch.int32"):
        linear_cross_entropy(hidden, weight, labels.int())


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    """Evaluation: a parameter reports that it needs its gradient even under no_grad."""
    products: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "mm" in str(func):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    weight = torch.nn.Parameter(torch.randn(11, 4))
    hidden, labels = torch.randn(6, 4), torch.arange(6)
    with torch.no_grad(), Record():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert len(products) == 1
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"))
