"""Causal softmax attention with grouped queries over every back end, one row or packed."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulmen.kernels.attention import softmax_attention
from kernel_cases.case import (
    Case,
    Cost,
    Expected,
    Inputs,
    Provider,
    Settings,
    random,
    through_registry,
)
from kernel_cases.lightning import bounds_of, documents_of

BACK_ENDS = ("flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_varlen", "cudnn", "sdpa")
"""Of fulmen.kernels.attention; one that is not installed says so in its row."""
SCORES = 2**26
"""Of the truth, alive at once."""


def cases(settings: Settings) -> list[Case]:
    lengths = [(tokens,) for tokens in settings.lengths_or(8192, 32768)]
    return [case(documents, settings) for documents in lengths + documents_of(settings)]


def case(documents: tuple[int, ...], settings: Settings) -> Case:
    """Operations count the causal half; backward counts 2.5 times forward."""
    tokens, heads, head_dim = sum(documents), settings.heads, settings.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        counts = (heads, settings.kv_heads, settings.kv_heads, heads)
        *leaves, gradient = (
            random((1, tokens, count, head_dim), device, dtype) for count in counts
        )
        return Inputs(
            leaves, (bounds_of(documents, device), bounds_of(documents, "cpu")), (gradient,)
        )

    def call(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, host: Tensor | None) -> Tensor:
        return softmax_attention(
            q, k, v, cu_seqlens=bounds, max_seqlen=max(documents), host_cu_seqlens=host
        )

    def sdpa(back_end: SDPBackend) -> Callable[[], Provider]:
        def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(back_end):
                output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return output.transpose(1, 2)

        return lambda: Provider(attend)

    providers = {"fulmen auto": through_registry(call, {"attention": "auto"})}
    for name in BACK_ENDS:
        providers[f"fulmen {name}"] = through_registry(call, {"attention": name})
    if settings.rivals and len(documents) == 1:
        providers["torch sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        providers["torch sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    flops = 2.0 * heads * head_dim * sum(length**2 for length in documents)
    suffix = "" if len(documents) == 1 else f" in {len(documents)} documents"
    return Case(
        op="attention",
        label=f"{tokens}{suffix}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: truth(inputs, documents),
        forward=Cost(flops=flops),
        training=Cost(flops=3.5 * flops),
        providers=providers,
    )


def truth(inputs: Inputs, documents: tuple[int, ...]) -> list[Expected]:
    """Of the first and the last key and value head and their queries, some rows at a time."""
    q, k, v = (leaf.detach() for leaf in inputs.leaves)
    assert inputs.gradients[0] is not None
    group = q.shape[2] // k.shape[2]
    shown = sorted({0, k.shape[2] - 1})
    kv_heads = torch.tensor(shown, device=q.device)
    heads = (kv_heads[:, None] * group + torch.arange(group, device=q.device)).flatten()

    results: list[list[Tensor]] = [[], [], [], []]
    for kv_head in shown:
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        queries = q[0, :, of_group].double()
        given = inputs.gradients[0][0, :, of_group].double()
        parts: list[list[Tensor]] = [[], [], [], []]
        for start, end in itertools.pairwise([0, *itertools.accumulate(documents)]):
            keys, values = k[0, start:end, kv_head].double(), v[0, start:end, kv_head].double()
            found = document_truth(queries[start:end], keys, values, given[start:end])
            for kept, value in zip(parts, found, strict=True):
                kept.append(value)
        for kept, pieces in zip(results, parts, strict=True):
            kept.append(torch.cat(pieces))
    output, d_q = (torch.cat(x, 1)[None] for x in results[:2])
    d_k, d_v = (torch.stack(x, 1)[None] for x in results[2:])

    return [
        Expected("output", 0, False, lambda x: x[:, :, heads], output),
        Expected("gradient of q", 0, True, lambda x: x[:, :, heads], d_q),
        Expected("gradient of k", 1, True, lambda x: x[:, :, kv_heads], d_k),
        Expected("gradient of v", 2, True, lambda x: x[:, :, kv_heads], d_v),
    ]


def document_truth(
    queries: Tensor, keys: Tensor, values: Tensor, given: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, d_q `[tokens, group, head_dim]`, d_k and d_v `[tokens, head_dim]`."""
    tokens, group, head_dim = queries.shape
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    outputs, d_queries = [], []
    size = max(16, SCORES // (tokens * group))
    for start in range(0, tokens, size):
        end = min(tokens, start + size)
        leaves = [queries[start:end], keys[:end], values[:end]]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        part, seen, weighed = leaves
        scores = part.flatten(0, 1) @ seen.t() * head_dim**-0.5
        rows = torch.arange(start, end, device=part.device).repeat_interleave(group)
        future = torch.arange(end, device=part.device) > rows[:, None]
        output = scores.masked_fill(future, float("-inf")).softmax(-1) @ weighed
        output = output.unflatten(0, (end - start, group))
        d_part, d_seen, d_weighed = torch.autograd.grad(output, leaves, given[start:end])
        outputs.append(output.detach())
        d_queries.append(d_part)
        d_keys[:end] += d_seen
        d_values[:end] += d_weighed
    return torch.cat(outputs), torch.cat(d_queries), d_keys, d_values
