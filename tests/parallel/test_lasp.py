"""Lightning layers on parts of rows: outputs and every gradient equal one rank."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_config, tiny_model
from support.worlds import run_world
from test_sequence import DOCUMENTS
from torch import Tensor

from fulmen.kernels.lightning import lightning_attention
from fulmen.models.layers import Context
from fulmen.models.lightning import LightningAttention
from fulmen.parallel import lasp
from fulmen.parallel.config import LIGHTNING_ATTENTION, ParallelConfig, check_parallel
from fulmen.parallel.lasp import EXCHANGES, PartAttention, spread_lightning
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.sequence import RowPart
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics

TOKENS, HEADS, DIM = 48, 2, 16
SLOPES = [0.0, 0.4]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def random_lengths(seed: int) -> list[int]:
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(1, TOKENS), chance.randint(0, 6)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]


ROWS = [*DOCUMENTS, *map(random_lengths, range(10))]


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
        (variant, dtype): on_this_rank(ROWS, dtype, variant)
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
        errors = errors_of([rank[variant, dtype] for rank in ranks], ROWS)
        for lengths, found in zip(ROWS, errors, strict=True):
            assert max(found) <= tolerance, (variant, dtype, lengths, found)


CROSSING = [5, 41, 2]
"""A document over all cuts of four ranks."""


def with_each_exchange_broken(device: torch.device) -> list[tuple[str, list[list[Tensor]]]]:
    """Results without one message, which is replaced by zeros: (what is missing, results)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []

    def attempt(name: str, variant: str, lost: int) -> None:
        with losing(lost):
            results.append((name, on_this_rank([CROSSING], torch.float64, variant)))

    for variant in EXCHANGES:
        attempt("", variant, -1)
    for call, direction in enumerate(("forward", "backward")):
        attempt(f"gather {direction}", "lasp_plus", call)
        for sender in range(size):
            # A rank at the end sends in one direction only.
            calls = 2 if 0 < sender < size - 1 else 1
            if calls == 1 and (sender == 0) != (direction == "forward"):
                continue
            mine = min(call, calls - 1) if sender == rank else -1
            attempt(f"send of {sender} {direction}", "lasp", mine)
    return results


@contextmanager
def losing(lost: int) -> Iterator[None]:
    """The call number `lost` by which this rank sends carries zeros."""
    calls, kept = count(), []
    gather, transfer = lasp.all_gather, lasp._transfer

    def what_goes(own: Tensor) -> Tensor:
        if next(calls) != lost:
            return own
        kept.append(torch.zeros_like(own))
        return kept[0]

    def losing_gather(gathered: Tensor, own: Tensor, **options: Any) -> Any:
        return gather(gathered, what_goes(own), **options)

    def losing_transfer(operation: Any, state: Tensor, *others: Any) -> Any:
        return transfer(operation, what_goes(state) if operation is dist.isend else state, *others)

    with (
        mock.patch.object(lasp, "all_gather", losing_gather),
        mock.patch.object(lasp, "_transfer", losing_transfer),
    ):
        yield


@pytest.mark.slow
def test_every_message_matters() -> None:
    ranks = run_world(with_each_exchange_broken, 4)
    assert len(ranks[0]) == 2 + 2 + 6
    for attempts in zip(*ranks, strict=True):
        missing = attempts[0][0]
        error = max(errors_of([results for _, results in attempts], [CROSSING])[0])
        assert (error > 1e-3) == bool(missing), (missing, error)
        assert missing or error <= 1e-12


def bytes_received(device: torch.device, variant: str, tokens: int) -> int:
    """By this rank in a forward and backward pass."""
    received, gather, batch = 0, lasp.all_gather, dist.batch_isend_irecv

    def counted_gather(gathered: Tensor, own: Tensor, **options: Any) -> Any:
        nonlocal received
        received += gathered.nbytes
        return gather(gathered, own, **options)

    def counted_batch(operations: list[dist.P2POp]) -> Any:
        nonlocal received
        received += sum(each.tensor.nbytes for each in operations if each.op is dist.irecv)
        return batch(operations)

    rank, size = dist.get_rank(), dist.get_world_size()
    part = RowPart(rank, size, tokens, (0, size * tokens))
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, requires_grad=True) for _ in range(3))
    assert dist.group.WORLD is not None
    with (
        mock.patch.object(lasp, "all_gather", counted_gather),
        mock.patch.object(dist, "batch_isend_irecv", counted_batch),
    ):
        begun = PartAttention(k, v, torch.tensor(SLOPES), part, None, dist.group.WORLD, variant)
        begun.finish(q, k, v).sum().backward()
    return received


@pytest.mark.slow
def test_only_states_are_sent() -> None:
    state = HEADS * DIM * DIM * 4
    for tokens in (8, 64):
        assert run_world(bytes_received, 2, "lasp_plus", tokens) == [2 * 2 * state] * 2
        assert run_world(bytes_received, 2, "lasp", tokens) == [state] * 2


@pytest.mark.fast
@pytest.mark.parametrize("variant", EXCHANGES)
def test_states_travel_beside_other_work(
    variant: str, one_rank: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_model()
    layer = LightningAttention(config, 0)
    mesh = build_mesh(ParallelConfig(), one_rank)
    spread_lightning(layer, mesh.cp_group, variant)
    events: list[str] = []

    def note(owner: Any, name: str, event: str) -> None:
        function = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            events.append(event)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    note(EXCHANGES[variant], "__init__", "send")
    note(EXCHANGES[variant], "receive", "receive")
    note(layer.output_gate, "forward", "gate")
    for name in ("part_forward", "part_backward_q", "part_backward_kv"):
        note(lasp, name, name)
    x = torch.randn(1, 6, config.hidden_size, requires_grad=True)
    part = RowPart(0, 1, 6, (0, 6))
    layer(x, Context(x, x, None, None, None, None, part)).sum().backward()
    assert events == [
        *("send", "gate", "receive", "part_forward"),
        *("send", "part_backward_q", "receive", "part_backward_kv"),
    ]


@pytest.mark.fast
def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"parallel\.lightning_attention=ring: must be one of lasp_"
    ):
        check_parallel(ParallelConfig(lightning_attention="ring"), 1)
    assert tuple(EXCHANGES) == LIGHTNING_ATTENTION


def run_of(data: Path, cp: int, variant: str, checkpointing: str) -> RunConfig:
    config = tiny_config(data, max_steps=3)
    config.data.seq_len = 64  # a row of one or two documents crosses every cut
    config.parallel = ParallelConfig(cp=cp, lightning_attention=variant)
    config.trainer.activation_checkpointing = checkpointing
    config.log.every_steps = 1
    return config


def losses_of(
    device: torch.device, configs: list[RunConfig], folder: Path
) -> list[tuple[list[tuple[float, float]], int]]:
    """Losses and gradient norms of runs, and the number of their exchanges of states."""
    results, exchanges = [], 0
    for variant in EXCHANGES.values():
        initialise = variant.__init__

        def counted(*args: Any, initialise: Any = initialise, **options: Any) -> None:
            nonlocal exchanges
            exchanges += 1
            initialise(*args, **options)

        variant.__init__ = counted  # type: ignore[method-assign]
    for number, config in enumerate(configs):
        exchanges, run_dir = 0, folder / f"{config.parallel.cp}-{number}"
        run_dir.mkdir(exist_ok=True)
        trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
        try:
            trainer.fit()
        finally:
            trainer.close()
        rows = read_metrics(run_dir / "metrics.jsonl")
        losses = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
        results.append((losses, exchanges))
    return results


@pytest.mark.slow
def test_runs_equal_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    """With activation checkpointing, each forward exchange is made once more."""
    kinds = [(variant, choice) for variant in EXCHANGES for choice in ("none", "full")]
    (wanted, _), *_ = run_world(losses_of, 1, [run_of(tiny_data, 1, *kinds[0])], tmp_path)[0]
    assert len(wanted) == 3
    configs = [run_of(tiny_data, 2, *kind) for kind in kinds]
    ranks = run_world(losses_of, 2, configs, tmp_path)
    assert [made for _, made in ranks[0]] == [made for _, made in ranks[1]]
    results = dict(zip(kinds, ranks[0], strict=True))
    for kind, (got, _) in results.items():
        for mine, one in zip(got, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-5), kind
    for variant in EXCHANGES:
        again = results[variant, "full"][1] - results[variant, "none"][1]
        # 3 steps x 4 micro-batches x 2 lightning layers
        assert again == 3 * 4 * 2
