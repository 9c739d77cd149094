"""Lightning attention on a part of a row: a state enters from the left and one leaves to the right.

For rows that are spread over ranks. The passes stand apart, without autograd, so that the caller
can exchange states between them (`parallel/lasp.py`). In all of them

- q, k, v, d_out and the gradients are `[1, tokens, heads, head_dim]`, a state is
  `[heads, head_dim, head_dim]`, key index first, fp32 (fp64 for fp64 inputs);
- `cu_seqlens` are the documents' boundaries inside the part, from 0 to `tokens`, none of them
  empty, or None for a single one; the entering state is that of the first document, the gradient
  of the leaving state that of the last one; zeros, where a document does not go on beyond the part;
- `kept` is what the forward pass hands to the backward ones, tensors to save.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fulmen.kernels.lightning.op import why_not
from fulmen.kernels.lightning.reference import (
    chunked_lightning_attention,
    reference_closing_state,
    reference_combine_states,
)
from fulmen.kernels.registry import choose


def closing_state(k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """State that one document's tokens leave: `sum_j l^(n-1-j) k_j v_j^T`, `l = exp(-slope)`."""
    return _closing_state(k, v, slopes, reverse=False)


def opening_gradient(q: Tensor, d_out: Tensor, slopes: Tensor) -> Tensor:
    """Gradient of the state that enters one document: `sum_i l^(i+1) q_i d_out_i^T`."""
    return _closing_state(q, d_out, slopes, reverse=True)


def combine_states(
    gathered: Tensor, slopes: Tensor, first: int, end: int, tokens: int, *, reverse: bool
) -> Tensor:
    """What parts `first` to `end` (not included) add to the state behind them.

    `sum_s l^(tokens (end - 1 - s)) gathered_s`, `l = exp(-slope)`: of parts of `tokens` each, the
    last one's state comes as it is, earlier ones' have crossed the parts between. In `reverse`
    states go the other way: `l^(tokens (s - first))`.

    `gathered` is `[parts, heads, head_dim, head_dim]`; without a part the sum is 0.
    """
    if end <= first:
        return gathered.new_zeros(gathered.shape[1:])
    if end == first + 1:
        return gathered[first].clone()  # a view would keep all of them
    if _runs_on_triton(gathered):
        from fulmen.kernels.lightning import launch_part

        return launch_part.combine_states(
            gathered, _ready(slopes), first, end, tokens, reverse=reverse
        )
    return reference_combine_states(gathered[first:end], slopes, tokens, reverse=reverse)


def _closing_state(k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool) -> Tensor:
    if _runs_on_triton(k):
        from fulmen.kernels.lightning import launch_part

        return launch_part.closing_state(k, v, _ready(slopes), reverse=reverse)
    return reference_closing_state(k, v, slopes, reverse=reverse)


def part_forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, entering: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and what is kept for the backward passes."""
    if _runs_on_triton(q):
        from fulmen.kernels.lightning import launch_part

        bounds, entering = _ready_bounds(cu_seqlens), _ready(entering)
        return launch_part.forward(q, k, v, _ready(slopes), bounds, entering)
    out, _ = chunked_lightning_attention(q, k, v, slopes, cu_seqlens, entering[None], False)
    return out, ()


def part_backward_q(
    d_out: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    kept: Sequence[Tensor],
) -> Tensor:
    """Gradient of q."""
    if _runs_on_triton(k):
        from fulmen.kernels.lightning import launch_part

        return launch_part.backward_q(d_out, k, v, _ready(slopes), _ready(entering), kept)
    state = entering.transpose(1, 2)[None]
    return chunked_lightning_attention(d_out, v, k, slopes, cu_seqlens, state, False)[0]


def part_backward_kv(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    d_leaving: Tensor,
    kept: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v; the entering state has no say in them."""
    if _runs_on_triton(k):
        from fulmen.kernels.lightning import launch_part

        return launch_part.backward_kv(d_out, q, k, v, _ready(slopes), _ready(d_leaving), kept)
    with torch.enable_grad():
        k, v = (x.detach().requires_grad_() for x in (k, v))
        out, leaving = chunked_lightning_attention(q, k, v, slopes, cu_seqlens, None, True)
        assert leaving is not None
        dk, dv = torch.autograd.grad((out, leaving), (k, v), (d_out, d_leaving[None]))
    return dk, dv


def _runs_on_triton(x: Tensor) -> bool:
    return choose("lightning", ("triton", why_not(x)), ("torch", "")) == "triton"


def _ready(x: Tensor) -> Tensor:
    """Slopes or a state as the kernels read them."""
    return x.float().contiguous()


def _ready_bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None or cu_seqlens.shape[0] == 2:
        return None  # a single document's chunks need no words
    return cu_seqlens.int().contiguous()
