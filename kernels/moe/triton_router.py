"""The router on Triton: softmax, top-k, renormalised weights and counts in one kernel.

A program owns a few tokens and holds their logits over all experts in registers. Floor: logits
read and probabilities written once, 8 bytes per token and expert (2 MB at 8192 tokens and 32
experts, below a microsecond): the launch costs more.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_SIZE = 1024
"""Eight numbers a thread."""
MOST_TOKENS = 32
"""Per program; 8192 tokens then fill the chip."""
NUM_WARPS = 4


@triton.jit
def tokens_of(tokens, NUM_EXPERTS, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """(token numbers [BLOCK_TOKENS, 1], expert numbers [1, BLOCK_EXPERTS], which exist)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    return token, expert, (token < tokens) & (expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["tokens", "num_tokens"])
def route_kernel(
    logits,
    experts,
    weights,
    probabilities,
    counts,
    tokens,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    token, expert, inside = tokens_of(tokens, NUM_EXPERTS, BLOCK_TOKENS, BLOCK_EXPERTS)
    x = tl.load(logits + token * NUM_EXPERTS + expert, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(expert < NUM_EXPERTS, x, float("-inf"))
    exponentials = tl.exp(x - tl.max(x, 1)[:, None])
    p = exponentials / tl.sum(exponentials, 1)[:, None]
    tl.store(probabilities + token * NUM_EXPERTS + expert, p, mask=inside)

    # Chosen by logits, which rounding makes equal less often than probabilities. NaN comes first,
    # like in a sort, so that each choice is an expert whatever the logits are.
    rank = tl.where(x == x, x, float("inf"))
    free = (expert < NUM_EXPERTS) & (token >= 0)
    choice = tl.arange(0, BLOCK_CHOICES)[None, :]
    chosen_expert = tl.zeros([BLOCK_TOKENS, BLOCK_CHOICES], tl.int32)
    chosen_p = tl.zeros([BLOCK_TOKENS, BLOCK_CHOICES], tl.float32)
    for number in tl.static_range(NUM_CHOICES):
        best = tl.max(tl.where(free, rank, float("-inf")), 1)[:, None]
        first = tl.min(tl.where(free & (rank == best), expert, BLOCK_EXPERTS), 1)[:, None]
        taken = expert == first
        best_p = tl.sum(tl.where(taken, p, 0.0), 1)[:, None]
        chosen_expert = tl.where(choice == number, first, chosen_expert)
        chosen_p = tl.where(choice == number, best_p, chosen_p)
        free = free & (expert != first)
    routed = token < num_tokens
    weight = tl.where(routed, chosen_p / tl.sum(chosen_p, 1)[:, None], 0.0)
    chosen_expert = tl.where(routed, chosen_expert, NUM_EXPERTS)
    target = token * NUM_CHOICES + choice
    kept = (token < tokens) & (choice < NUM_CHOICES)
    tl.store(experts + target, chosen_expert.to(tl.int64), mask=kept)
    tl.store(weights + target, weight, mask=kept)

    asked = (expert < NUM_EXPERTS) & routed & (free == 0)
    count = tl.sum(asked.to(tl.int32), 0)
    column = tl.arange(0, BLOCK_EXPERTS)
    # Integers: the same sum in any order.
    tl.atomic_add(
        counts + column,
        count.to(tl.int64),
        mask=(column < NUM_EXPERTS) & (count > 0),
        sem="relaxed",
    )


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    d_probabilities,
    d_weights,
    probabilities,
    weights,
    experts,
    d_logits,
    tokens,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    HAS_D_PROBABILITIES: tl.constexpr,
    HAS_D_WEIGHTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Both are softmaxes, over all logits and over the chosen ones: `dx = y (dy - sum y dy)`."""
    token, expert, inside = tokens_of(tokens, NUM_EXPERTS, BLOCK_TOKENS, BLOCK_EXPERTS)
    target = token * NUM_EXPERTS + expert
    gradient = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], tl.float32)
    if HAS_D_PROBABILITIES:
        p = tl.load(probabilities + target, mask=inside, other=0.0)
        dp = tl.load(d_probabilities + target, mask=inside, other=0.0)
        gradient = p * (dp - tl.sum(p * dp, 1)[:, None])
    if HAS_D_WEIGHTS:
        first = token * NUM_CHOICES
        mean = tl.zeros([BLOCK_TOKENS, 1], tl.float32)
        for number in tl.static_range(NUM_CHOICES):
            w = tl.load(weights + first + number, mask=token < tokens, other=0.0)
            dw = tl.load(d_weights + first + number, mask=token < tokens, other=0.0)
            mean += w * dw
        for number in tl.static_range(NUM_CHOICES):
            w = tl.load(weights + first + number, mask=token < tokens, other=0.0)
            dw = tl.load(d_weights + first + number, mask=token < tokens, other=0.0)
            chosen = tl.load(experts + first + number, mask=token < tokens, other=-1)
            gradient += tl.where(expert == chosen, w * (dw - mean), 0.0)
    tl.store(d_logits + target, gradient.to(d_logits.dtype.element_ty), mask=inside)


def _options(num_experts: int) -> dict[str, int]:
    block_experts = triton.next_power_of_2(num_experts)
    return {
        "BLOCK_TOKENS": max(1, min(MOST_TOKENS, TILE_SIZE // block_experts)),
        "BLOCK_EXPERTS": block_experts,
        "num_warps": NUM_WARPS,
    }


def _allocate(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, num_experts = logits.shape
    return (
        torch.empty(tokens, num_experts, dtype=torch.float32, device=logits.device),
        torch.empty(tokens, k, dtype=torch.float32, device=logits.device),
        torch.empty(tokens, k, dtype=torch.int64, device=logits.device),
    )


# opcheck adds up all outputs, which wants one that has a gradient first.
@torch.library.custom_op("fulmen::route", mutates_args=())
def _route(logits: Tensor, k: int, num_tokens: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, weights, experts, counts."""
    tokens, num_experts = logits.shape
    probabilities, weights, experts = _allocate(logits, k)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    options = _options(num_experts)
    if tokens:
        with torch.cuda.device_of(logits):
            route_kernel[(triton.cdiv(tokens, options["BLOCK_TOKENS"]),)](
                logits.contiguous(),
                experts,
                weights,
                probabilities,
                counts,
                tokens,
                tokens if num_tokens is None else min(tokens, num_tokens),
                NUM_EXPERTS=num_experts,
                NUM_CHOICES=k,
                BLOCK_CHOICES=triton.next_power_of_2(k),
                **options,
            )
    return probabilities, weights, experts, counts


@_route.register_fake
def _(logits: Tensor, k: int, num_tokens: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = torch.empty(logits.shape[1], dtype=torch.int64, device=logits.device)
    return *_allocate(logits, k), counts


@torch.library.custom_op("fulmen::route_backward", mutates_args=())
def _route_backward(
    d_probabilities: Tensor | None,
    d_weights: Tensor | None,
    probabilities: Tensor,
    weights: Tensor,
    experts: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the logits. Autograd chooses the layout of what it hands in."""
    tokens, num_experts = probabilities.shape
    d_logits = torch.empty(tokens, num_experts, dtype=dtype, device=probabilities.device)
    options = _options(num_experts)
    if tokens:
        with torch.cuda.device_of(d_logits):
            route_backward_kernel[(triton.cdiv(tokens, options["BLOCK_TOKENS"]),)](
                probabilities if d_probabilities is None else d_probabilities.contiguous(),
                weights if d_weights is None else d_weights.contiguous(),
                probabilities,
                weights,
                experts,
                d_logits,
                tokens,
                NUM_EXPERTS=num_experts,
                NUM_CHOICES=experts.shape[1],
                HAS_D_PROBABILITIES=d_probabilities is not None,
                HAS_D_WEIGHTS=d_weights is not None,
                **options,
            )
    return d_logits


@_route_backward.register_fake
def _(
    d_probabilities: Tensor | None,
    d_weights: Tensor | None,
    probabilities: Tensor,
    weights: Tensor,
    experts: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(probabilities.shape, dtype=dtype, device=probabilities.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    probabilities, weights, experts, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(experts, counts)
    ctx.save_for_backward(probabilities, weights, experts)
    ctx.dtype = inputs[0].dtype


def _backward(
    ctx: Any,
    d_probabilities: Tensor | None,
    d_weights: Tensor | None,
    _experts: Tensor | None,
    _counts: Tensor | None,
) -> tuple[Tensor | None, None, None]:
    if d_weights is None and d_probabilities is None:
        return None, None, None
    saved = ctx.saved_tensors
    return _route_backward(d_probabilities, d_weights, *saved, ctx.dtype), None, None


_route.register_autograd(_backward, setup_context=_setup_context)


def triton_route(
    logits: Tensor, k: int, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, probabilities, counts; for fp32 or bf16 logits `[tokens, num_experts]`."""
    probabilities, weights, experts, counts = _route(logits, k, num_tokens)
    return experts, weights, probabilities, counts
