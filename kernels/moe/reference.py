"""The mixture-of-experts ops in plain torch; nothing here but the experts waits for a device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype
from fulmen.kernels.swiglu import swiglu


def reference_route(
    logits: Tensor, k: int, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, probabilities and counts of `Routing`."""
    num_experts = logits.shape[1]
    logits = logits.to(accumulation_dtype(logits))
    probabilities = torch.softmax(logits, -1)
    # Not topk, which leaves open which of several equal ones it takes.
    experts = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = probabilities.gather(1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    if num_tokens is not None:
        padding = torch.arange(logits.shape[0], device=logits.device)[:, None] >= num_tokens
        experts = experts.masked_fill(padding, num_experts)
        weights = weights.masked_fill(padding, 0)
    return experts, weights, probabilities, _count(experts, num_experts)


def reference_permutation(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Destinations, counts and the number of kept assignments of `Permutation`."""
    order = experts.flatten().argsort(stable=True)
    counts = _count(experts, num_experts)
    return _invert(order).view_as(experts), counts, counts.sum(0, keepdim=True)


def reference_permute(x: Tensor, destinations: Tensor, num_kept: Tensor) -> Tensor:
    repeated = x.unsqueeze(1).expand(-1, destinations.shape[1], -1).flatten(0, 1)
    rows = repeated[_invert(destinations.flatten())]
    row = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    return torch.where(row < num_kept, rows, 0)


def reference_unpermute(
    rows: Tensor, weights: Tensor | None, destinations: Tensor, num_kept: Tensor
) -> Tensor:
    kept = destinations < num_kept
    parts = rows[destinations.flatten()].unflatten(0, destinations.shape)
    parts = torch.where(kept.unsqueeze(-1), parts, 0).to(accumulation_dtype(rows))
    if weights is not None:
        parts = parts * torch.where(kept, weights, 0).unsqueeze(-1)
    return parts.sum(1).to(rows.dtype)


def reference_transpose_segments(x: Tensor, sizes: Tensor) -> Tensor:
    by_outer, by_inner = sizes.flatten(), sizes.t().flatten()
    starts = (by_outer.cumsum(0) - by_outer).view(sizes.shape).t().flatten()
    ends = by_inner.cumsum(0)
    row = torch.arange(x.shape[0], device=x.device)
    segment = torch.searchsorted(ends, row, right=True)
    last = sizes.numel() - 1
    moved = row + (starts - ends + by_inner)[segment.clamp(max=last)]
    return x.index_select(0, torch.where(segment <= last, moved, row))


def reference_grouped_swiglu(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> Tensor:
    """A loop over the experts; the host learns the counts."""
    sizes = counts.tolist()
    *parts, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
    # unbind, not w1[e]: the backward of an index would add a full-size zero tensor per expert.
    outputs = [
        swiglu(part @ a.t(), part @ b.t()) @ c.t()
        for part, a, b, c in zip(parts, w1.unbind(), w3.unbind(), w2.unbind(), strict=True)
    ]
    return torch.cat([*outputs, rest.new_zeros(rest.shape[0], w2.shape[1])])


def reference_experts(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_grouped_swiglu`, and for a backward pass by hand the rows of gate and up."""
    gate, up = (_multiply(x, w.transpose(1, 2), counts) for w in (w1, w3))
    return _multiply(swiglu(gate, up), w2.transpose(1, 2), counts), gate, up


def reference_rows_backward(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradient of x, and what `reference_weights_backward` takes."""
    accumulate = accumulation_dtype(x)
    d_inner, g, u = (part.to(accumulate) for part in (_multiply(dy, w2, counts), gate, up))
    silu = F.silu(g)
    d_gate = torch.ops.aten.silu_backward(d_inner * u, g).to(x.dtype)
    d_up = (d_inner * silu).to(x.dtype)
    dx = _multiply(d_gate, w1, counts) + _multiply(d_up, w3, counts)
    return dx, (dy, x, d_gate, d_up, (silu * u).to(x.dtype), counts)


def reference_weights_backward(
    dy: Tensor, x: Tensor, d_gate: Tensor, d_up: Tensor, inner: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, w3 and w2."""
    return _outer(d_gate, x, counts), _outer(d_up, x, counts), _outer(dy, inner, counts)


def _multiply(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """`x_r @ matrices_e` for each row r of expert e, 0 behind the last."""
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    for rows, matrix, target in zip(
        _by_expert(x, counts), matrices, _by_expert(out, counts), strict=True
    ):
        torch.mm(rows, matrix, out=target)
    return out


def _outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """For each expert the sum of `a_r^T b_r` over its rows."""
    parts = zip(_by_expert(a, counts), _by_expert(b, counts), strict=True)
    return torch.stack([rows.t() @ others for rows, others in parts])


def _by_expert(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    sizes = counts.tolist()
    return x[: sum(sizes)].split(sizes)


def _count(experts: Tensor, num_experts: int) -> Tensor:
    flat = experts.flatten()
    counts = flat.new_zeros(num_experts + 1)  # not bincount, which makes the host wait for a GPU
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def _invert(order: Tensor) -> Tensor:
    """The inverse of a permutation of 0 .. n-1."""
    numbers = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, numbers)
