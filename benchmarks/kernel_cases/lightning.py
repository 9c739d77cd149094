"""Lightning attention: one row, or documents packed in one."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.lightning.reference import chunked_lightning_attention
from fulmen.models.layers import decay_slopes
from kernel_cases.case import (
    COMPILED,
    OURS,
    REFERENCE,
    Case,
    Cost,
    Expected,
    Inputs,
    Provider,
    Settings,
    random,
    rivals,
)

COMPILED_TOKENS = 8192
"""The compiler unrolls the reference's loop over chunks: beyond this it takes many minutes."""
REFERENCE_TOKENS = 131_072
SHOWN_TOKENS = 131_072
"""Beyond this, every 17th token is compared: the results of all would leave too little memory."""


def cases(settings: Settings) -> list[Case]:
    lengths = settings.lengths_or(2048, 8192, 32768, 131_072, 1_048_576)
    rows = [(tokens,) for tokens in lengths]
    return [case(documents, settings) for documents in rows + documents_of(settings)]


def documents_of(settings: Settings) -> list[tuple[int, ...]]:
    """The packed row's document lengths, uneven, none 0; no row below two documents."""
    count, tokens = settings.documents, settings.packed_length
    if count < 2:
        return []
    generator = torch.Generator().manual_seed(0)
    cuts = (torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1).sort().values
    bounds = [0, *cuts.tolist(), tokens]
    return [tuple(end - start for start, end in itertools.pairwise(bounds))]


def bounds_of(documents: tuple[int, ...], device: torch.device | str) -> Tensor | None:
    """cu_seqlens, None for a single document."""
    if len(documents) == 1:
        return None
    bounds = [0, *itertools.accumulate(documents)]
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def case(documents: tuple[int, ...], settings: Settings) -> Case:
    """Forward reads q, k, v and writes the output; backward reads four and writes three."""
    tokens, heads, head_dim = sum(documents), settings.heads, settings.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        *leaves, gradient = (random((1, tokens, heads, head_dim), device, dtype) for _ in range(4))
        slopes = decay_slopes(heads, settings.layers // 2, settings.layers, device)
        return Inputs(leaves, (slopes, bounds_of(documents, device)), (gradient,))

    def fla() -> Callable[..., Any]:
        from fla.ops.simple_gla import chunk_simple_gla

        def attend(
            q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None
        ) -> Tensor:
            bounds = None if bounds is None else bounds.long()
            return chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0, cu_seqlens=bounds)[0]

        return attend

    providers: dict[str, Callable[[], Provider]] = {OURS: lambda: ours(settings)}
    if settings.rivals and tokens <= REFERENCE_TOKENS:
        providers[REFERENCE] = lambda: Provider(reference)
    if settings.rivals and tokens <= COMPILED_TOKENS:
        providers[COMPILED] = lambda: Provider(torch.compile(reference, dynamic=False))
    tensor = tokens * heads * head_dim * 2
    suffix = "" if len(documents) == 1 else f" in {len(documents)} documents"
    return Case(
        op="lightning",
        label=f"{tokens}{suffix}",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(4 * tensor),
        training=Cost(11 * tensor),
        providers=providers | rivals(settings, fla=fla),
    )


def reference(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None) -> Tensor:
    return chunked_lightning_attention(q, k, v, slopes, bounds, None, False)[0]


def ours(settings: Settings) -> Provider:
    """The Triton kernels, or a clear failure where they cannot run."""
    from fulmen.kernels.lightning import launch

    if settings.tile:
        tile = launch.Tile(*settings.tile)
        launch.choose_tile = lambda *_: tile

    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None) -> Tensor:
        return launch.triton_lightning_attention(
            q, k, v, slopes, bounds, None, False, piece_tokens=settings.piece_tokens
        )[0]

    return Provider(attend)


def truth(inputs: Inputs) -> list[Expected]:
    """Of the first and the last head, by the reference in fp64, one after the other."""
    slopes, bounds = inputs.constants
    assert inputs.gradients[0] is not None
    shown = sorted({0, slopes.numel() - 1})
    stride = 1 if inputs.leaves[0].shape[1] <= SHOWN_TOKENS else 17
    parts: list[list[Tensor]] = [[], [], [], []]
    for head in shown:
        heads = slice(head, head + 1)
        leaves = [x.detach()[:, :, heads].double().requires_grad_() for x in inputs.leaves]
        output = reference(*leaves, slopes[heads].double(), bounds)
        weight = inputs.gradients[0][:, :, heads].double()
        for kept, value in zip(
            parts, (output.detach(), *torch.autograd.grad(output, leaves, weight)), strict=True
        ):
            kept.append(value[:, ::stride].clone())
        del leaves, output, weight

    def part(x: Tensor) -> Tensor:
        return x[:, ::stride, shown]

    output, *gradients = (torch.cat(kept, 2) for kept in parts)
    expected = [Expected("output", 0, False, part, output)]
    for i, (name, value) in enumerate(zip("qkv", gradients, strict=True)):
        expected.append(Expected(f"gradient of {name}", i, True, part, value))
    return expected
