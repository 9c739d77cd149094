"""Softmax attention over several ranks, ring and gather, balanced or not, equal one rank."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model
from support.worlds import run_world
from test_sequence import DOCUMENTS, config_of, losses_of
from torch import Tensor

from fulmen.kernels.attention.reference import reference_attention
from fulmen.models.config import MoEConfig
from fulmen.models.layers import Context
from fulmen.models.text import TextModel
from fulmen.parallel import balance, gather, ring, softmax
from fulmen.parallel.balance import (
    EVEN_ENOUGH,
    Layout,
    attention_work,
    imbalance,
    plan_layout,
)
from fulmen.parallel.config import ParallelConfig, check_parallel
from fulmen.parallel.gather import plan_gather
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import spread_rows
from fulmen.parallel.ring import plan_ring
from fulmen.parallel.sequence import RowPart
from fulmen.parallel.softmax import spread_attention
from fulmen.trainer.config import RunConfig

HEADS = 4
WAYS = [(ring, balanced) for ring in (True, False) for balanced in (True, False)]
"""Arguments of `spread_attention`."""


@pytest.fixture(autouse=True)
def even_short_rows_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "WORTH_MOVING", 0)


def moving(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """`function` in another process, where even short rows move too."""
    balance.WORTH_MOVING = 0
    return function(device, *args)


# The bookkeeping alone.


@st.composite
def rows(draw: st.DrawFn) -> Layout:
    size, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    cuts = draw(st.lists(st.integers(0, size * tokens), max_size=6))
    return plan_layout(size, tokens, (0, *sorted(cuts), size * tokens), draw(st.booleans()))


def one_document(size: int, balanced: bool, tokens: int = 64) -> Layout:
    return plan_layout(size, tokens, (0, size * tokens), balanced)


def row_of(layout: Layout, rank: int) -> list[int]:
    """Where in the row the tokens lie that a rank attends for."""
    return [token for part in layout.ranges[rank] for token in range(part.start, part.end)]


@pytest.mark.fast
@given(rows())
@settings(deadline=None, max_examples=300)
def test_every_pair_is_computed_once(layout: Layout) -> None:
    """By the ring and with gathered keys, and each rank counts its pairs right."""
    end = layout.bounds[-1]
    document_of = [sum(bound <= token for bound in layout.bounds) for token in range(end)]
    wanted = Counter(
        (query, key)
        for query in range(end)
        for key in range(query + 1)
        if document_of[query] == document_of[key]
    )
    in_ring: Counter[tuple[int, int]] = Counter()
    gathered: Counter[tuple[int, int]] = Counter()
    tails = [
        [row_of(layout, rank)[token] for part in plan_ring(layout, rank).tails for token in
         range(part.start, part.stop)]
        for rank in range(layout.size)
    ]  # fmt: skip
    for rank in range(layout.size):
        own = row_of(layout, rank)
        bounds = [0, *accumulate(layout.lengths(rank))]
        assert bounds[-1] == len(own)
        diagonal = [
            (own[query], own[key])
            for start, stop in pairwise(bounds)
            for query in range(start, stop)
            for key in range(start, query + 1)
        ]
        far = [
            (own[query], tails[(rank - step) % layout.size][key])
            for step, tiles in enumerate(plan_ring(layout, rank).tiles)
            for queries, keys in tiles
            for query in range(queries.start, queries.stop)
            for key in range(keys.start, keys.stop)
        ]
        in_ring.update(diagonal + far)
        gathered.update(diagonal)
        for queries, keys in plan_gather(layout, rank):
            assert queries.stop > queries.start
            gathered.update(
                (own[query], key)
                for query in range(queries.start, queries.stop)
                for key in range(keys.start, keys.stop)
            )
        assert layout.work()[rank] == len(diagonal + far)
    assert in_ring == gathered == wanted


@pytest.mark.fast
@given(rows())
@settings(deadline=None, max_examples=300)
def test_sends_and_receives_match(layout: Layout) -> None:
    """Each message has one receiver, which expects its size; nobody sends what he does not have."""
    messages: Counter[tuple[str, int, int, int, int]] = Counter()

    def record(rank: int) -> Callable[..., None]:
        def op(what: Any, tensor: Tensor, peer: int, group: Any, tag: int) -> None:
            ends = (rank, peer) if what is dist.isend else (peer, rank)
            assert rank != peer
            assert tensor.shape[0]
            messages[(what.__name__, *ends, tag, tensor.shape[0])] += 1

        return op

    kv = torch.zeros(0, 2, 1)
    group: Any = None
    for rank in range(layout.size):
        plan = plan_ring(layout, rank)
        with (
            mock.patch.object(ring, "_op", record(rank)),
            mock.patch.object(ring, "_transfer", lambda _, arriving, sent: arriving),
        ):
            tails: Any = kv.new_zeros(plan.tokens[rank], 2, 1)
            for step in range(layout.size):
                holds = plan.reach[(rank - step) % layout.size] >= step
                assert holds == (tails is not None)
                if not holds:
                    assert not plan.tiles[step]
                    tails = kv
                else:
                    assert tails.shape[0] == plan.tokens[(rank - step) % layout.size]
                ring._pass_back(plan, group, step, tails, kv.new_zeros(plan.tokens[rank], 2, 1))
                tails = ring._pass_on(plan, group, step, kv, tails)
    sent = Counter({key[1:]: n for key, n in messages.items() if key[0] == "isend"})
    received = Counter({key[1:]: n for key, n in messages.items() if key[0] == "irecv"})
    assert sent == received
    assert all(n == 1 for n in sent.values())


@pytest.mark.fast
@given(rows())
@settings(deadline=None)
def test_a_layout_gives_out_every_chunk(layout: Layout) -> None:
    number = len(layout.chunks)
    assert sorted(chunk for mine in layout.owned for chunk in mine) == list(range(number))
    assert {len(mine) for mine in layout.owned} == {number // layout.size}
    tokens = layout.bounds[-1] // layout.size
    ends = [0, *accumulate(layout.tokens_of(chunk) for chunk in range(number))]
    assert list(layout.chunks) == list(pairwise(ends))
    assert all(end // tokens == layout.home(chunk) for chunk, end in enumerate(ends[:-1]))
    contiguous = plan_layout(layout.size, tokens, layout.bounds, False)
    assert contiguous.stays
    assert imbalance(layout.work()) <= imbalance(contiguous.work())
    balanced = plan_layout(layout.size, tokens, layout.bounds, True)
    assert balanced.stays or imbalance(contiguous.work()) > EVEN_ENOUGH


@pytest.mark.fast
def test_work_counts_positions() -> None:
    bounds = (0, 3, 3, 10)
    assert attention_work(bounds, 0, 10) == 6 + 28
    assert attention_work(bounds, 1, 3) == 2 + 3
    assert attention_work(bounds, 2, 5) == 3 + 1 + 2
    assert attention_work(bounds, 5, 6) == 3


@pytest.mark.fast
@pytest.mark.parametrize("size", [2, 4, 8])
def test_one_document_is_balanced(size: int) -> None:
    before, after = (imbalance(one_document(size, how, 4096).work()) for how in (False, True))
    assert before == pytest.approx((2 * size - 1) / size, rel=1e-3)
    assert after <= 1.01
    # The first chunk with the last one, and so on.
    expected = tuple((rank, 2 * size - 1 - rank) for rank in range(size))
    assert one_document(size, True, 4096).owned == expected


@pytest.mark.fast
def test_many_documents_are_balanced() -> None:
    chance = random.Random(0)
    for size, mean in [(2, 1024), (4, 4096), (8, 4096), (8, 32768)]:
        lengths = [1 + int(chance.expovariate(1 / mean)) for _ in range(size * 32768 // 512)]
        bounds = [bound for bound in accumulate(lengths) if bound < size * 32768]
        layout = plan_layout(size, 32768, (0, *bounds, size * 32768), True)
        assert imbalance(layout.work()) <= EVEN_ENOUGH


@pytest.mark.fast
def test_what_is_not_worth_moving_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    even = tuple(range(0, 4 * 1024 + 1, 128))
    assert plan_layout(4, 1024, even, True).stays
    assert not one_document(4, True).stays
    assert one_document(4, False).stays
    monkeypatch.setattr(balance, "WORTH_MOVING", 1024)
    # The last rank has 7 / 4 of the mean: 3 / 4 of half the row a token more.
    for tokens, stays in ((682, True), (684, False)):
        assert one_document(4, True, tokens).stays == stays


@pytest.mark.fast
def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.softmax_attention=rings: must be ring or gat"):
        check_parallel(ParallelConfig(softmax_attention="rings"), 1)


# Layers alone.


def random_rows(size: int, count: int) -> list[list[int]]:
    """Lengths of documents, of few and of many, also empty ones; of few tokens a rank at times."""
    chance = random.Random(size)
    cases = []
    for number in range(count):
        tokens = size * chance.choice([1, 3, 9])
        cuts = [chance.randint(0, tokens) for _ in range([0, 1, 2, 4, 12][number % 5])]
        cases.append([b - a for a, b in pairwise([0, *sorted(cuts), tokens])])
    return cases


def inputs_of(
    tokens: int, seed: int, kv_heads: int, dtype: torch.dtype, dim: int
) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, and the weights of the output in a loss."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = (
        torch.randn(1, tokens, heads, dim, generator=generator, dtype=torch.float64)
        for heads in (HEADS, kv_heads, kv_heads, HEADS)
    )
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], weight


def on_one_rank(lengths: list[int], seed: int, kv_heads: int, dim: int = 8) -> list[Tensor]:
    """Output and gradients in fp64."""
    leaves, weight = inputs_of(sum(lengths), seed, kv_heads, torch.float64, dim)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    out = reference_attention(*leaves, bounds)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def my_part(
    lengths: list[int],
    seed: int,
    kv_heads: int,
    *,
    dtype: torch.dtype = torch.float64,
    dim: int = 8,
    device: str = "cpu",
    may_wait: bool = True,
    ring: bool,
    balanced: bool,
) -> list[Tensor]:
    """This rank's part of the same, on many ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    leaves, weight = inputs_of(sum(lengths), seed, kv_heads, dtype, dim)
    leaves = [x.detach().to(device).requires_grad_() for x in leaves]
    part = RowPart(rank, size, sum(lengths) // size, (0, *accumulate(lengths)))
    here = slice(part.first, part.first + part.tokens)
    weight = weight[:, here].to(device)
    q, k, v = (x[:, here] for x in leaves)
    if not may_wait:
        torch.cuda.set_sync_debug_mode("error")
    out = spread_attention(q, k, v, part, dist.group.WORLD, ring=ring, balanced=balanced)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    if not may_wait:
        torch.cuda.set_sync_debug_mode("default")
    return [out.detach(), *(gradient[:, here] for gradient in gradients)]


Case = tuple[list[int], int, int, torch.dtype, bool, bool]


def run_cases(device: torch.device, cases: list[Case]) -> list[list[Tensor]]:
    return [
        my_part(lengths, seed, kv_heads, dtype=dtype, ring=ring, balanced=balanced)
        for lengths, seed, kv_heads, dtype, ring, balanced in cases
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_layers_equal_one_rank(size: int) -> None:
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
    documents = [*DOCUMENTS, *random_rows(size, 6)]
    cases: list[Case] = []
    for dtype in tolerances:
        for seed, lengths in enumerate(documents):
            if dtype != torch.float64 and seed % 3:
                continue
            cases += [(lengths, seed, 1 + seed % 2, dtype, *way) for way in WAYS]
    parts = run_world(moving, size, run_cases, cases)
    wanted = {
        seed: on_one_rank(lengths, seed, 1 + seed % 2) for seed, lengths in enumerate(documents)
    }
    for number, case in enumerate(cases):
        for index, want in enumerate(wanted[case[1]]):
            pieces = [part[number][index] for part in parts]
            assert {piece.dtype for piece in pieces} == {case[3]}
            got = torch.cat(pieces, dim=1).double()
            error = (got - want).abs().max() / want.abs().max().clamp(min=0.1)
            assert error <= tolerances[case[3]], (case, index, error)


def errors_on_gpus(device: torch.device, documents: list[list[int]]) -> list[float]:
    """Largest error over largest value of this rank's parts; the host waits for nothing."""
    rank, size = dist.get_rank(), dist.get_world_size()
    errors = []
    for lengths in documents:
        wanted = on_one_rank(lengths, 0, 2, 64)
        here = slice(rank * sum(lengths) // size, (rank + 1) * sum(lengths) // size)
        for on_ring, balanced in WAYS:
            call = partial(my_part, lengths, 0, 2, dtype=torch.bfloat16, dim=64, device="cuda")
            for may_wait in (True, False):  # at first ranks are connected, and cuDNN plans
                mine = call(may_wait=may_wait, ring=on_ring, balanced=balanced)
            for got, want in zip(mine, wanted, strict=True):
                error = (got.cpu().double() - want[:, here]).abs().max()
                errors.append(float(error / want.abs().max()))
    return errors


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_equal_one_rank_on_gpus() -> None:
    documents = [[1024], [700, 1, 323], [1] * 8 + [504, 256, 256]]
    for errors in run_world(moving, 2, errors_on_gpus, documents):
        assert len(errors) == len(documents) * len(WAYS) * 4
        assert max(errors) <= 4e-2


# What is sent.


def tokens_received(device: torch.device, cases: list[list[int]]) -> list[list[int]]:
    """Of keys and of gradients that the ring brings to this rank, for each list of documents."""
    counts: list[list[int]] = []
    exchange = dist.batch_isend_irecv

    def counted(ops: list[dist.P2POp]) -> list[dist.Work]:
        for op in ops:
            if op.op is dist.irecv:
                counts[-1][op.tag >= dist.get_world_size()] += op.tensor.shape[0]
        return exchange(ops)

    with mock.patch.object(dist, "batch_isend_irecv", counted):
        for lengths in cases:
            for balanced in (False, True):
                counts.append([0, 0])
                my_part(lengths, 0, 2, ring=True, balanced=balanced)
    return counts


@pytest.mark.slow
def test_the_ring_sends_what_is_needed() -> None:
    inside, whole, one_crossing = [12, 12, 11, 1, 12], [48], [9, 6, 9, 24]
    counts = run_world(moving, 4, tokens_received, [inside, whole, one_crossing])
    by_case = [[rank[case] for rank in counts] for case in range(6)]
    # Keys come forward and backward; gradients once for each rank that a tail was on, and home.
    assert by_case[0] == by_case[1] == [[0, 0]] * 4
    # One document: rank r gets the tails of all before it; the last rank has none.
    assert [keys for keys, _ in by_case[2]] == [0, 2 * 12, 4 * 12, 6 * 12]
    assert [back for _, back in by_case[2]] == [12, 12, 12 + 12 + 0, 12 * 2]
    # Balanced: every rank's tokens but the last chunk of the row go to all others.
    assert sum(keys for keys, _ in by_case[3]) == 2 * 3 * (48 - 6)
    # Of the document of 6 tokens 3 are needed next door, of that of 24 all but the last 12.
    assert [keys for keys, _ in by_case[4]] == [0, 2 * 3, 0, 2 * 12]
    assert [back for _, back in by_case[4]] == [3, 0, 12, 0]


# Mutations.


def zeros_behind(function: Callable[..., Any], calls: slice, which: str = "") -> Callable[..., Any]:
    """`function`, the tensors that those of its calls receive wiped out."""
    number = -1

    def call(*args: Any) -> Any:
        nonlocal number
        number += 1
        result = function(*args)
        if number not in range(*calls.indices(1000)):
            return result
        if isinstance(result, Tensor):
            return torch.zeros_like(result)
        result.wait()
        plan, step = args[0], args[2]
        if which == "home" and step == plan.reach[plan.rank]:
            args[4].zero_()
        elif which != "home" and result.arriving is not None:
            result.arriving.zero_()
        return ring._Transfer((), result.arriving)  # gloo hangs where one waits twice

    return call


def broken_errors(device: torch.device) -> dict[str, list[float]]:
    """By what is broken: largest error of this rank's output and gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    here = slice(rank * 48 // size, (rank + 1) * 48 // size)
    wanted = [x[:, here] for x in on_one_rank([1, 46, 1], 0, 2)]

    def only_mine(row: Tensor, kv: Tensor, **_: Any) -> Any:
        row.zero_().view(size, *kv.shape)[rank] = kv
        return mock.Mock()

    def keep_mine(mine: Tensor, row: Tensor, **_: Any) -> None:
        mine.copy_(row.view(size, *mine.shape)[rank])

    on, back, move = ring._pass_on, ring._pass_back, balance._move
    forward, backward = slice(0, size), slice(size, None)
    breaks: dict[str, tuple[bool, bool, Any, str, Any]] = {
        "keys forward": (True, False, ring, "_pass_on", zeros_behind(on, forward)),
        "keys backward": (True, False, ring, "_pass_on", zeros_behind(on, backward)),
        "gradients behind": (True, False, ring, "_pass_back", zeros_behind(back, slice(None))),
        "gradients home": (
            True,
            False,
            ring,
            "_pass_back",
            zeros_behind(back, slice(None), "home"),
        ),
        "gather": (False, False, gather, "all_gather", only_mine),
        "reduce-scatter": (False, False, gather, "reduce_scatter", keep_mine),
    }
    for call, name in enumerate(["queries", "keys", "output"]):
        one = slice(call, call + 1)
        breaks[f"move of {name}"] = (True, True, balance, "_move", zeros_behind(move, one))
        one = slice(call + 3, call + 4)
        breaks[f"move of gradient {call}"] = (True, True, balance, "_move", zeros_behind(move, one))
    errors = {}
    for on_ring, balanced in WAYS:
        mine = my_part([1, 46, 1], 0, 2, ring=on_ring, balanced=balanced)
        errors[f"nothing {on_ring} {balanced}"] = differences(mine, wanted)
    for name, (on_ring, balanced, module, function, broken) in breaks.items():
        with mock.patch.object(module, function, broken):
            mine = my_part([1, 46, 1], 0, 2, ring=on_ring, balanced=balanced)
        errors[name] = differences(mine, wanted)
    return errors


def differences(mine: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(mine, wanted, strict=True)]


@pytest.mark.slow
def test_every_exchange_matters() -> None:
    errors = run_world(moving, 4, broken_errors)
    assert len(errors[0]) == 4 + 6 + 6
    for name in errors[0]:
        output, *gradients = (max(parts) for parts in zip(*(e[name] for e in errors), strict=True))
        if name.startswith("nothing"):
            assert max(output, *gradients) <= 1e-12, name
        elif "backward" in name or "gradient" in name or name == "reduce-scatter":
            assert output <= 1e-12, name
            assert max(gradients) > 1e-2, name
        else:
            assert output > 1e-2, name


# Whole runs.


def config_with(data: Path, cp: int, way: str, balanced: bool) -> RunConfig:
    config = config_of(data, cp, 1)
    config.parallel.softmax_attention, config.parallel.balance_attention = way, balanced
    return config


@pytest.mark.slow
def test_runs_equal_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    wanted = run_world(losses_of, 1, config_of(tiny_data, 1, 1), tmp_path / "one")[0]
    assert len(wanted) == 4
    for cp in (2, 4):  # test_sequence.py and test_runs.py gather
        config = config_with(tiny_data, cp, "ring", balanced=True)
        got = run_world(moving, cp, losses_of, config, tmp_path / f"{cp}")[0]
        for mine, one in zip(got, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-5), cp


@pytest.mark.fast
@pytest.mark.parametrize("on_ring", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_the_plan_takes_what_is_configured(
    on_ring: bool, balanced: bool, one_rank: torch.device
) -> None:
    way = "ring" if on_ring else "gather"
    config = ParallelConfig(softmax_attention=way, balance_attention=balanced)
    with torch.device("meta"):
        model = TextModel(tiny_model(), MoEConfig())
    spread_rows(model, build_mesh(config, one_rank), config)
    x = torch.randn(1, 6, 2, 16)
    context = Context(x, x, None, None, None, None, RowPart(0, 1, 6, (0, 6)))
    with mock.patch.object(softmax, "spread_attention") as attend:
        model.layers[1].self_attn.attend(x, x, x, context)
    assert attend.call_args.kwargs == {"ring": on_ring, "balanced": balanced}
