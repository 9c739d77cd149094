"""The loader over a change of lengths and sources: shares, accounts, meshes and resuming."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from support.folders import MakeFolder

from fulmen.data.buckets import BUCKETS
from fulmen.data.config import SourceConfig
from fulmen.data.loader import PackedLoader, StepBatch
from fulmen.data.mixture import Shares

pytestmark = pytest.mark.fast
BOUNDS = (32, 128)
RANGES = {"short": (2, 32), "medium": (32, 128), "long": (128, 400)}
HELD = {"books": ("medium", "long"), "qa": ("short", "medium", "long"), "web": ("short", "medium")}
Sources = dict[str, SourceConfig]
Tokens = dict[tuple[str, str], int]
FIRST = Shares({"books": 1.0, "qa": 0.0, "web": 2.0}, {"short": 0.7, "medium": 0.3})
SECOND = Shares({"books": 1.0, "qa": 0.5, "web": 1.0}, {"short": 0.3, "medium": 0.3, "long": 0.4})
BEGIN, END = 3000, 6000
"""Tokens between which the shares go from FIRST to SECOND."""


def transition(tokens: int) -> Shares:
    part = min(1.0, max(0.0, (tokens - BEGIN) / (END - BEGIN)))

    def between(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
        a, b = sum(first.values()), sum(second.values())
        return {
            name: (1 - part) * first.get(name, 0.0) / a + part * second[name] / b for name in second
        }

    assert FIRST.lengths
    assert SECOND.lengths
    return Shares(between(FIRST.sources, SECOND.sources), between(FIRST.lengths, SECOND.lengths))


@pytest.fixture
def sources(make_folder: MakeFolder) -> Sources:
    """Each token tells its document's source and bucket: 1 + 3 * source + bucket."""
    rng = np.random.default_rng(0)
    found = {}
    for number, (name, buckets) in enumerate(HELD.items()):
        documents = [
            [1 + len(BUCKETS) * number + BUCKETS.index(bucket)] * length
            for bucket in buckets
            for length in rng.integers(*RANGES[bucket], 40).tolist()
        ]
        order = rng.permutation(len(documents))
        path = make_folder(name, [documents[place] for place in order], num_shards=2)
        found[name] = SourceConfig(str(path))
    return found


def open_loader(sources: Sources, **options: Any) -> PackedLoader:
    settings: dict[str, Any] = {
        "seq_len": 128,
        "micro_batch_tokens": 128,
        "batch_tokens": lambda tokens: 1024,
        "shares": transition,
        "length_bounds": BOUNDS,
        "seed": 7,
        "vocab_size": 100,
        "prefetch_steps": 0,
    }
    return PackedLoader(sources, **(settings | options))


def take(loader: PackedLoader, count: int) -> list[StepBatch]:
    steps = [next(loader) for _ in range(count)]
    loader.close()
    return steps


def count(steps: list[StepBatch]) -> Tokens:
    """Tokens by source and bucket as the tokens themselves tell, not the loader's accounts."""
    totals = np.zeros(1 + len(HELD) * len(BUCKETS), np.int64)
    for step in steps:
        for batch in step.micro_batches:
            ids = batch.input_ids[0, : batch.num_tokens].numpy()
            totals += np.bincount(ids, minlength=len(totals))
    names = [(name, bucket) for name in HELD for bucket in BUCKETS]
    return dict(zip(names, totals[1:].tolist(), strict=True))


def flat(account: dict[str, dict[str, int]]) -> Tokens:
    return {(name, bucket): row[bucket] for name, row in account.items() for bucket in row}


def by_bucket(tokens: Tokens) -> dict[str, float]:
    total = sum(tokens.values())
    return {
        bucket: sum(n for (_, one), n in tokens.items() if one == bucket) / total
        for bucket in BUCKETS
    }


def waiting(state: dict[str, Any]) -> Tokens:
    """Tokens that are drawn and wait for a row."""
    tokens: Counter[tuple[str, str]] = Counter()
    for name, bucket, _, _, length in state["pending"]:
        tokens[name, bucket] += length
    return {(name, bucket): tokens[name, bucket] for name in HELD for bucket in BUCKETS}


def test_the_mixture_is_the_table(sources: Sources) -> None:
    steps = take(open_loader(sources, shares=lambda tokens: SECOND), 60)
    trained = count(steps)
    drawn = {key: n + waiting(steps[-1].state)[key] for key, n in trained.items()}
    assert by_bucket(drawn) == pytest.approx({"short": 0.3, "medium": 0.3, "long": 0.4}, abs=0.01)
    total = sum(drawn.values())
    wanted = {
        ("books", "long"): 0.4 * 2 / 3, ("qa", "long"): 0.4 / 3,
        ("books", "medium"): 0.3 * 0.4, ("qa", "medium"): 0.3 * 0.2, ("web", "medium"): 0.3 * 0.4,
        ("qa", "short"): 0.3 / 3, ("web", "short"): 0.3 * 2 / 3,
    }  # fmt: skip
    for key, tokens in drawn.items():
        # Two of the longest documents, over all that was drawn.
        assert tokens / total == pytest.approx(wanted.get(key, 0.0), abs=800 / total)
    # What waits is bounded, so what is trained follows as well.
    assert by_bucket(trained) == pytest.approx(by_bucket(drawn), abs=0.06)


def test_a_transition_is_linear_in_tokens(sources: Sources) -> None:
    steps = take(open_loader(sources), 30)
    before = [0, *(step.state["tokens"] for step in steps[:-1])]
    share, drawn_before, longest = 0.0, 0, 400
    for tokens, step in zip(before, steps, strict=True):
        trained = flat(step.state["account"])
        drawn = {key: n + waiting(step.state)[key] for key, n in trained.items()}
        total = sum(drawn.values())
        lengths = transition(tokens).lengths
        assert lengths
        share += lengths["long"] * (total - drawn_before)
        drawn_before = total
        long = sum(n for (_, bucket), n in drawn.items() if bucket == "long")
        assert abs(long - share) < 2 * longest
        assert drawn["qa", "short"] == 0 or tokens > BEGIN
    assert share > 4 * longest


def test_accounts_are_exact_and_add_up_over_changes_of_everything(sources: Sources) -> None:
    stages: list[dict[str, Any]] = [
        {"shares": lambda tokens: FIRST, "seq_len": 64},
        {"seq_len": 128, "batch_tokens": lambda tokens: 512},
        {"seq_len": 256, "micro_batch_tokens": 512, "shares": lambda tokens: SECOND},
        {"seq_len": 256, "micro_batch_tokens": 256, "shares": lambda tokens: Shares(
            {"books": 0.0, "qa": 0.1, "web": 0.9}, None)},
    ]  # fmt: skip
    state, every = None, []
    for options in stages:
        steps = take(open_loader(sources, state=state, **options), 7)
        for step in steps:
            assert flat(step.account) == count([step])
            every.append(step)
            assert flat(step.state["account"]) == count(every)
            assert sum(flat(step.account).values()) == step.num_tokens
        state = json.loads(json.dumps(steps[-1].state))
    assert state["tokens"] == sum(count(every).values())


@pytest.mark.parametrize("dp_size", [2, 4])
def test_any_mesh_and_any_resume(sources: Sources, dp_size: int) -> None:
    """Taken up after each step, before, in and after the transition, on another mesh."""
    wanted = take(open_loader(sources), 12)
    assert wanted[1].state["tokens"] < BEGIN < wanted[4].state["tokens"] < END
    assert wanted[8].state["tokens"] > END
    for stop in range(-1, 11):
        state = None if stop < 0 else json.loads(json.dumps(wanted[stop].state))
        rank = (stop + 1) % dp_size
        loader = open_loader(sources, dp_rank=rank, dp_size=dp_size, state=state)
        for step, whole in zip(take(loader, 11 - stop), wanted[stop + 1 :], strict=True):
            for name in ("digest", "account", "state", "num_tokens", "num_labels"):
                assert getattr(step, name) == getattr(whole, name)
            for got, other in zip(
                step.micro_batches, whole.micro_batches[rank::dp_size], strict=True
            ):
                assert torch.equal(got.input_ids, other.input_ids)


def test_a_document_cut_by_a_row_keeps_its_bucket(make_folder: MakeFolder) -> None:
    source = {"one": SourceConfig(str(make_folder("one", [[1] * 300, [1] * 20])))}
    loader = open_loader(
        source, seq_len=16, micro_batch_tokens=16, batch_tokens=lambda tokens: 64,
        shares=lambda tokens: Shares({"one": 1.0}, {"long": 1.0}),
    )  # fmt: skip
    assert [step.account["one"] for step in take(loader, 3)] == [
        {"short": 0, "medium": 0, "long": 64}
    ] * 3


def test_shares_that_cannot_be_served(sources: Sources) -> None:
    wrong = Shares({"books": 0.0, "qa": 0.0, "web": 1.0}, {"long": 0.4, "short": 0.6})
    message = r"lengths.long=0.4: no source .* 128 or more tokens: .*data.length_bounds=\[32, 128\]"
    with pytest.raises(ValueError, match=message):
        open_loader(sources, shares=lambda tokens: wrong)
    loader = open_loader(sources)
    with pytest.raises(ValueError, match=message):
        loader.check_shares(wrong)
    loader.check_shares(SECOND)
    with pytest.raises(ValueError, match=r"data.length_bounds=\[9, 3\]"):
        open_loader(sources, length_bounds=(9, 3))
    later = open_loader(sources, shares=lambda tokens: wrong if tokens else FIRST, prefetch_steps=1)
    next(later)
    with pytest.raises(ValueError, match=message):
        next(later)
    later.close()


def test_a_state_of_an_earlier_version(sources: Sources) -> None:
    state = take(open_loader(sources), 1)[0].state
    with pytest.raises(ValueError, match="data state has version 1, this code reads 2"):
        open_loader(sources, state=state | {"version": 1})
