"""Mixture of experts: router, dispatch, SwiGLU experts, load-balancing loss."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.kernels.moe import (
    drop_over_capacity,
    grouped_swiglu,
    permutation,
    permute,
    route,
    unpermute,
)
from fulmen.models.chunks import in_chunks
from fulmen.models.config import ModelConfig, MoEConfig


class MoEStats(NamedTuple):
    """What one layer reports of a micro-batch; padding is not counted."""

    aux_loss: Tensor
    """fp32 scalar, 1 at perfect balance, not yet weighted."""
    counts: Tensor
    """`[num_experts]` int64 assignments the router asked for, dropped ones included."""
    num_dropped: Tensor
    """int64 scalar, assignments over capacity."""


class Experts(nn.Module):
    """The SwiGLU experts of one layer, stacked on the first dim."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = (config.num_experts, config.expert_hidden_size, config.hidden_size)
        self.w1 = nn.Parameter(torch.empty(inner))
        self.w3 = nn.Parameter(torch.empty(inner))
        self.w2 = nn.Parameter(torch.empty(inner[0], inner[2], inner[1]))
        self.chunk_tokens: int | None = None
        """Tokens that are dispatched at a time, and again backward; None = all, once."""

    def forward(
        self, x: Tensor, experts: Tensor, weights: Tensor, most_rows: int | None = None
    ) -> Tensor:
        """The weighted sum of each token's experts, `[tokens, hidden_size]` like `x`.

        Args:
            x: `[tokens, hidden_size]`.
            experts: `[tokens, k]` as in `Routing`, and so are the weights.
            weights: `[tokens, k]`.
            most_rows: that any expert gets of these tokens, if a limit is known.
        """
        matrices = self.matrices()
        if self.chunk_tokens is None:
            return self.dispatch(x, experts, weights, most_rows, matrices)

        def some(x: Tensor, experts: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
            # Any number of the row's assignments may fall into one chunk: no limit is known.
            return self.dispatch(x, experts, weights, None, matrices)

        return in_chunks(some, self.chunk_tokens, (x, experts, weights), matrices)[0]

    def matrices(self) -> tuple[Tensor, ...]:
        """w1, w3 and w2 as `dispatch` gets them; expert parallelism's seam."""
        return self.w1, self.w3, self.w2

    def dispatch(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        most_rows: int | None,
        matrices: tuple[Tensor, ...],
    ) -> Tensor:
        """Send tokens to their experts and sum what comes back; expert parallelism's seam."""
        order = permutation(experts, self.w1.shape[0])
        w1, w3, w2 = matrices
        outputs = grouped_swiglu(permute(x, order), order.counts, w1, w3, w2)
        return unpermute(outputs, weights, order)


class Router(nn.Linear):
    """Logits in fp32 also in bf16 training, where rounding would decide between close experts."""

    chunk_tokens: int | None = None
    """Tokens whose fp32 copy exists at a time, and again backward; None = all, kept."""

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden_size]` to `[tokens, num_experts]`."""
        if self.chunk_tokens is None:
            return self._logits(x, self.weight)
        return in_chunks(self._logits, self.chunk_tokens, (x,), (self.weight,))[0]

    @staticmethod
    def _logits(x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), weight.to(dtype))


class MoE(nn.Module):
    """`sum_i gate_i * expert_i(x)` over the chosen experts (arXiv:2501.08313, equation 1).

    The capacity limit holds in training mode only; evaluation and inference drop nothing.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.num_experts_per_token = config.num_experts_per_token
        self.capacity_factor = moe.capacity_factor
        self.global_router = moe.global_router
        self.aux_loss_scope = moe.aux_loss_scope
        self.gate = Router(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor, num_tokens: int | None = None) -> tuple[Tensor, MoEStats]:
        """`[batch, tokens, hidden_size]` in and out; tokens from `num_tokens` on are padding."""
        flat = x.flatten(0, 1)
        routing = route(self.gate(flat), self.num_experts_per_token, num_tokens=num_tokens)
        num_tokens = flat.shape[0] if num_tokens is None else num_tokens
        counts = routing.counts
        aux_loss = load_balancing_loss(
            self.count_over_row(counts),
            routing.probabilities[:num_tokens],
            self.num_experts_per_token,
        )
        num_dropped = counts.new_zeros(())
        if self.capacity_factor is not None and self.training:
            allowed = self.allowance(counts, self._capacity(num_tokens))
            routing = drop_over_capacity(routing, self.num_experts, allowed)
            num_dropped = (counts - allowed).clamp(min=0).sum()
        output = self.experts(flat, routing.experts, routing.weights, self._most_rows(flat))
        return output.view_as(x), MoEStats(aux_loss, counts, num_dropped)

    def _capacity(self, num_tokens: int) -> int:
        assert self.capacity_factor is not None
        mean = num_tokens * self.num_experts_per_token / self.num_experts
        return math.ceil(self.capacity_factor * mean)

    def _most_rows(self, flat: Tensor) -> int | None:
        if self.capacity_factor is None or self.global_router or not self.training:
            return None
        tokens = flat.shape[0]  # with padding, so that it is the same on every rank
        return min(self._capacity(tokens), tokens)

    def count_over_row(self, counts: Tensor) -> Tensor:
        """Assignments over all ranks that the load-balancing loss spans; a seam of the plan."""
        return counts

    def allowance(self, counts: Tensor, capacity: int) -> int | Tensor:
        """Assignments that each expert takes of these tokens; the global router's seam."""
        return capacity


def load_balancing_loss(
    counts: Tensor, probabilities: Tensor, num_experts_per_token: int
) -> Tensor:
    """`E * sum_i f_i m_i`: f_i the share of assignments, m_i the mean routing probability.

    The paper prints `(1/E) sum f m`, which is 1/E^2 at balance and would vanish beside its
    coefficient of 0.01; we take the usual factor E (Switch, arXiv:2101.03961, equation 4), with
    shares that sum to 1, so that balance gives 1 whatever E and k. Counted before any drop, over
    one micro-batch. `counts` is `[E]`, over all of its tokens, `probabilities` `[tokens, E]`; where
    these are a part of the tokens, so is the loss, and the parts add up.
    """
    num_assignments = counts.sum().clamp(min=1)
    shares = counts.to(probabilities.dtype) / num_assignments
    mean_over = num_assignments / num_experts_per_token
    return counts.numel() * (shares * probabilities.sum(0)).sum() / mean_over
