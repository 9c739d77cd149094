"""Lightning layers on parts of rows: outputs and every gradient equal one rank."""

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.worlds import run_world
from torch import Tensor

from fulmen.kernels.lightning import lightning_attention
from fulmen.parallel import lasp
from fulmen.parallel.lasp import EXCHANGES, PartAttention
from fulmen.parallel.sequence import RowPart

TOKENS, HEADS, DIM = 48, 2, 16
SLOPES = [0.0, 0.4]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def random_lengths(seed: int) -> list[int]:
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(1, TOKENS), chance.randint(0, 6)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]


DOCUMENTS = [
    [48],
    [1, 46, 1],  # one longer than all ranks but one
    [12, 12, 12, 12],  # boundaries on the cut points of four ranks
    [5, 19, 1, 23],
    [30, 0, 18],
    [1] * 48,
    *map(random_lengths, range(10)),
]


def inputs_of(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = (
        torch.randn(1, TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)
        for _ in range(4)
    )
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], weight


def on_one_rank(lengths: list[int], seed: int) -> list[Tensor]:
    """Output and gradients in fp64."""
    (q, k, v), weight = inputs_of(seed, torch.float64)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    out, _ = lightning_attention(
        q, k, v, torch.tensor(SLOPES, dtype=torch.float64), cu_seqlens=bounds
    )
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def on_this_rank(cases: list[list[int]], dtype: torch.dtype, variant: str) -> list[list[Tensor]]:
    """This rank's parts of the same, by case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    results = []
    for seed, lengths in enumerate(cases):
        assert sum(lengths) == TOKENS
        leaves, weight = inputs_of(seed, dtype)
        part = RowPart(rank, size, TOKENS // size, (0, *accumulate(lengths)))
        here = slice(part.first, part.first + part.tokens)
        q, k, v = (x[:, here] for x in leaves)
        bounds = torch.tensor([0, *accumulate(part.lengths)], dtype=torch.int32)
        slopes = torch.tensor(SLOPES, dtype=torch.promote_types(dtype, torch.float32))
        begun = PartAttention(k, v, slopes, part, bounds, dist.group.WORLD, variant)
        out = begun.finish(q, k, v)
        gradients = torch.autograd.grad((out * weight[:, here]).sum(), leaves)
        results.append([out.detach(), *[gradient[:, here] for gradient in gradients]])
    return results


def errors_of(parts: list[list[list[Tensor]]], cases: list[list[int]]) -> list[list[float]]:
    """Largest error over largest value, of output and gradients, by case; `parts` by rank."""
    errors = []
    for case, lengths in enumerate(cases):
        wanted = on_one_rank(lengths, case)
        pieces = zip(*[part[case] for part in parts], strict=True)
        got = [torch.cat(results, dim=1).double() for results in pieces]
        scales = [want.abs().max().clamp(min=0.1) for want in wanted]
        errors.append(
            [
                float((a - b).abs().max() / scale)
                for a, b, scale in zip(got, wanted, scales, strict=True)
            ]
        )
    return errors


def with_both_variants(device: torch.device) -> dict[Any, list[list[Tensor]]]:
    return {
        (variant, dtype): on_this_rank(DOCUMENTS, dtype, variant)
        for variant in EXCHANGES
        for dtype in TOLERANCES
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_part_equals_one_rank(size: int) -> None:
    ranks = run_world(with_both_variants, size)
    for (variant, dtype), tolerance in [
        ((variant, dtype), TOLERANCES[dtype]) for variant, dtype in ranks[0]
    ]:
        errors = errors_of([rank[variant, dtype] for rank in ranks], DOCUMENTS)
        for lengths, found in zip(DOCUMENTS, errors, strict=True):
            assert max(found) <= tolerance, (variant, dtype, lengths, found)


CROSSING = [5, 41, 2]
"""A document over all cuts of four ranks."""


def with_each_exchange_broken(device: torch.device) -> list[tuple[str, list[list[Tensor]]]]:
    """Results without one message, which is replaced by zeros: (what is missing, results)."""
    real, rank, size = lasp.dist, dist.get_rank(), dist.get_world_size()
    results = []

    def attempt(name: str, variant: str, function: str, call: int) -> None:
        lasp.dist = _Losing(real, function, call)  # type: ignore[assignment]
        results.append((name, on_this_rank([CROSSING], torch.float64, variant)))
        lasp.dist = real

    for variant in EXCHANGES:
        attempt("", variant, "all_gather", -1)
    for call, direction in enumerate(("forward", "backward")):
        attempt(f"gather {direction}", "lasp_plus", "all_gather", call)
        for sender in range(size):
            # A rank at the end sends in one direction only.
            calls = 2 if 0 < sender < size - 1 else 1
            if calls == 1 and (sender == 0) != (direction == "forward"):
                continue
            mine = min(call, calls - 1) if sender == rank else -1
            attempt(f"send of {sender} {direction}", "lasp", "isend", mine)
    return results


class _Losing:
    """torch.distributed, of which one call of a function carries zeros."""

    def __init__(self, module: Any, function: str, lost: int) -> None:
        self._module, self._function, self._lost, self._calls = module, function, lost, 0

    def __getattr__(self, name: str) -> Any:
        return self._call if name == self._function else getattr(self._module, name)

    def _call(self, *tensors: Tensor, **options: Any) -> Any:
        if self._calls == self._lost:
            tensors = (*tensors[:-1], torch.zeros_like(tensors[-1]))
            self.kept = tensors
        self._calls += 1
        return getattr(self._module, self._function)(*tensors, **options)


@pytest.mark.slow
def test_every_message_matters() -> None:
    ranks = run_world(with_each_exchange_broken, 4)
    assert len(ranks[0]) == 2 + 2 + 6
    for attempts in zip(*ranks, strict=True):
        missing = attempts[0][0]
        error = max(errors_of([results for _, results in attempts], [CROSSING])[0])
        assert (error > 1e-3) == bool(missing), (missing, error)
        assert missing or error <= 1e-12
