"""The loader: one order for every mesh, exact resume, shares that follow the weights."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support import HANG_S
from support.folders import MakeFolder
from support.loaders import open_loader as open_small_loader
from support.loaders import take

from fulmen.data.config import DataConfig, SourceConfig
from fulmen.data.loader import PackedLoader, StepBatch, evaluation_batches
from fulmen.data.packing import PackedBatch
from fulmen.data.permutation import RandomOrder
from fulmen.data.shards import PreparedSplit

pytestmark = pytest.mark.fast
SEQ_LEN, MICRO, BATCH = 32, 64, 512

Sources = dict[str, SourceConfig]


def documents(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Documents no two of which are equal: each starts with its own number."""
    generator = np.random.default_rng(seed)
    return [
        [number + 1, *generator.integers(1, 1000, generator.integers(1, longest)).tolist()]
        for number in range(count)
    ]


@pytest.fixture
def sources(make_folder: MakeFolder) -> Sources:
    a = make_folder("a", documents(60, 1), documents(13, 2), num_shards=2)
    b = make_folder("b", documents(90, 3, longest=100), documents(5, 4))
    return {"a": SourceConfig(str(a), 1.0), "b": SourceConfig(str(b), 3.0)}


def open_loader(sources: Sources, **options: Any) -> PackedLoader:
    sizes: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "micro_batch_tokens": MICRO,
        "batch_tokens": lambda tokens: BATCH,
        "vocab_size": 1000,
    }
    return open_small_loader(sources, **(sizes | options))


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return left.num_tokens == right.num_tokens and all(
        torch.equal(getattr(left, field), getattr(right, field))
        for field in ("input_ids", "labels", "cu_seqlens", "sources")
    )


def check_sources(step: StepBatch) -> None:
    """Tokens and labels by source, against the account and the labels of the batches."""
    for number, name in enumerate(step.account):
        tokens = labels = 0
        for batch in step.micro_batches:
            assert batch.sources is not None
            mine = batch.sources == number
            tokens += int(mine[:, : batch.num_tokens].sum())
            labels += int((batch.labels[mine] != -100).sum())
        assert tokens == sum(step.account[name].values())
        assert labels == step.labels[name]


def facts(step: StepBatch) -> tuple[Any, ...]:
    """All that must be equal on every rank."""
    return (
        step.num_tokens,
        step.labels,
        step.sum_squared_lengths,
        step.account,
        step.digest,
        step.state,
    )


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_same_on_every_mesh(sources: Sources, dp_size: int, prefetch_steps: int) -> None:
    wanted = take(open_loader(sources), 6)
    for rank in range(dp_size):
        got = take(
            open_loader(sources, dp_rank=rank, dp_size=dp_size, prefetch_steps=prefetch_steps), 6
        )
        for step, whole in zip(got, wanted, strict=True):
            assert facts(step) == facts(whole)
            mine = whole.micro_batches[rank::dp_size]
            assert all(same(*pair) for pair in zip(step.micro_batches, mine, strict=True))


def test_the_seed_and_nothing_else_decides(sources: Sources) -> None:
    digests = [step.digest for step in take(open_loader(sources), 4)]
    turned = dict(reversed(sources.items()))
    assert [step.digest for step in take(open_loader(turned), 4)] == digests
    assert len(set(digests)) == 4
    assert take(open_loader(sources, seed=8), 1)[0].digest != digests[0]


def test_totals(sources: Sources) -> None:
    for step in take(open_loader(sources), 5):
        assert len(step.micro_batches) == BATCH // MICRO
        assert step.num_tokens == sum(batch.num_tokens for batch in step.micro_batches)
        assert step.num_tokens == sum(sum(row.values()) for row in step.account.values())
        labels = sum(int((batch.labels != -100).sum()) for batch in step.micro_batches)
        assert step.num_labels == labels
        check_sources(step)
        squares = 0
        for batch in step.micro_batches:
            lengths = batch.cu_seqlens.diff().tolist()
            assert batch.input_ids.shape == batch.labels.shape == (1, MICRO)
            padding = MICRO - batch.num_tokens
            real = lengths[: len(lengths) - (padding > 0)]
            assert max(real) <= SEQ_LEN
            squares += sum(length**2 for length in real)
        assert step.sum_squared_lengths == squares


@pytest.mark.parametrize("stop", range(6))
def test_resume_at_every_step_and_on_another_mesh(sources: Sources, stop: int) -> None:
    wanted = take(open_loader(sources), 7)
    state = json.loads(json.dumps(wanted[stop].state))
    for dp_size in (1, 2):
        loader = open_loader(sources, dp_rank=dp_size - 1, dp_size=dp_size, state=state)
        for step, whole in zip(take(loader, 6 - stop), wanted[stop + 1 :], strict=True):
            assert facts(step) == facts(whole)
            mine = whole.micro_batches[dp_size - 1 :: dp_size]
            assert all(same(*pair) for pair in zip(step.micro_batches, mine, strict=True))


def test_state_counts_steps_and_real_tokens(sources: Sources) -> None:
    tokens = 0
    for number, step in enumerate(take(open_loader(sources), 4), start=1):
        tokens += step.num_tokens
        assert step.state["step"] == number
        assert step.state["tokens"] == tokens


def test_batch_ramp_by_real_tokens(sources: Sources) -> None:
    def batch_tokens(tokens: int) -> int:
        return 128 if tokens < 500 else 512

    steps = take(open_loader(sources, batch_tokens=batch_tokens), 8)
    sizes = [len(step.micro_batches) * MICRO for step in steps]
    before = [0, *(step.state["tokens"] for step in steps[:-1])]
    assert sizes == [batch_tokens(tokens) for tokens in before]
    assert set(sizes) == {128, 512}
    state = steps[2].state
    resumed = take(open_loader(sources, batch_tokens=batch_tokens, state=state), 5)
    assert [step.digest for step in resumed] == [step.digest for step in steps[3:]]


def test_each_token_once_an_epoch(make_folder: MakeFolder) -> None:
    """What was packed and what waits is, at each step, every document once an epoch so far."""
    train = documents(40, 5)
    loader = open_loader({"one": SourceConfig(str(make_folder("one", train)))})
    packed: Counter[tuple[int, int]] = Counter()
    for _ in range(12):
        plan = loader._planner.next_step()
        for _, document, start, length, _ in np.concatenate(plan.pieces).tolist():
            packed.update((document, token) for token in range(start, start + length))
        place = plan.state["mixture"]["sources"]["one"]["buckets"]["short"]
        order = RandomOrder(40, f"7/one/train/short/{place['epoch']}")
        begun = set(order.at(0, place["position"]).tolist())
        drawn = packed.copy()
        for _, _, document, start, length in plan.state["pending"]:
            drawn.update((document, token) for token in range(start, start + length))
        assert drawn == {
            (number, token): place["epoch"] + (number in begun)
            for number, document in enumerate(train)
            for token in range(len(document))
            if place["epoch"] or number in begun
        }
    assert place["epoch"] >= 4


def test_epochs_have_orders_of_their_own(make_folder: MakeFolder) -> None:
    path = make_folder("one", [[number + 1] * 32 for number in range(16)])
    steps = take(open_loader({"one": SourceConfig(str(path))}), 3)
    orders = [
        [int(token) for batch in step.micro_batches for token in batch.input_ids[0, ::32]]
        for step in steps
    ]
    assert all(sorted(order) == list(range(1, 17)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def shares(steps: list[StepBatch]) -> float:
    a = sum(sum(step.account["a"].values()) for step in steps)
    return a / sum(step.num_tokens for step in steps)


def test_mixture_follows_the_weights(sources: Sources) -> None:
    steps = take(open_loader(sources), 80)
    assert shares(steps) == pytest.approx(0.25, abs=0.01)
    assert shares(steps[:10]) == pytest.approx(0.25, abs=0.06)
    sources["a"].weight = 0.0
    assert shares(take(open_loader(sources), 5)) == 0.0


def test_changed_weights_count_from_the_resume(sources: Sources) -> None:
    state = take(open_loader(sources), 80)[-1].state
    sources["a"].weight, sources["b"].weight = 1.0, 1.0
    steps = take(open_loader(sources, state=state), 80)
    # What waited was drawn with the old weights; making up for 80 steps would take 40 more.
    assert shares(steps[5:20]) == pytest.approx(0.5, abs=0.05)
    assert shares(steps[5:]) == pytest.approx(0.5, abs=0.03)


def test_a_source_that_is_new_at_a_resume(sources: Sources) -> None:
    state = take(open_loader(sources), 20)[-1].state
    sources["new"] = SourceConfig(sources["a"].path, 4.0)
    steps = take(open_loader(sources, state=state), 40)
    first, last = state["mixture"]["sources"], steps[-1].state["mixture"]["sources"]
    # The others go on from where they were, and it begins: neither owes the other anything.
    assert list(last) == ["a", "b", "new"]
    assert first["b"]["buckets"]["short"] != last["b"]["buckets"]["short"]
    drawn = {name: sum(row.values()) for name, row in steps[-1].state["account"].items()}
    before = {name: sum(row.values()) for name, row in state["account"].items()}
    assert drawn["new"] / (sum(drawn.values()) - sum(before.values())) == pytest.approx(
        0.5, abs=0.04
    )
    assert drawn["a"] > before["a"]


def test_longer_rows_after_a_resume(sources: Sources) -> None:
    state = take(open_loader(sources), 3)[-1].state
    steps = take(open_loader(sources, state=state, seq_len=64), 3)
    assert steps[0].state["step"] == 4
    longest = max(int(b.cu_seqlens.diff().max()) for step in steps for b in step.micro_batches)
    assert 32 < longest <= 64


def test_sizes_that_do_not_divide(sources: Sources) -> None:
    with pytest.raises(
        ValueError, match=r"trainer.micro_batch_tokens=65 .* multiple of data.seq_len=32"
    ):
        open_loader(sources, micro_batch_tokens=65)
    message = (
        r"data.global_batch_tokens: .* 500 tokens .* trainer.micro_batch_tokens=64 x 2 "
        r".*= 128 .*data.seq_len=32"
    )
    with pytest.raises(ValueError, match=message):
        open_loader(sources, batch_tokens=lambda tokens: 500, dp_size=2)


def test_an_error_in_the_thread_is_raised_in_next(sources: Sources) -> None:
    loader = open_loader(
        sources, batch_tokens=lambda tokens: BATCH if tokens < 900 else 500, prefetch_steps=2
    )
    assert [next(loader).state["step"] for _ in range(2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"global_batch_tokens"):
            next(loader)
    loader.close()


def test_close_ends_the_thread_and_the_steps(sources: Sources) -> None:
    loader = open_loader(sources, prefetch_steps=2)
    next(loader)
    loader.close()
    assert list(loader) == []
    dropped = open_loader(sources, prefetch_steps=1)
    thread = dropped._thread
    assert isinstance(thread, threading.Thread)
    del dropped
    thread.join(HANG_S)
    assert not thread.is_alive(), "a dropped loader must not leave its thread behind"


def test_resume_with_another_seed_or_other_data(sources: Sources, make_folder: MakeFolder) -> None:
    state = take(open_loader(sources), 2)[-1].state
    with pytest.raises(ValueError, match=r"seed=8, but .* seed=7"):
        open_loader(sources, seed=8, state=state)
    with pytest.raises(ValueError, match=r"data.sources.b is gone"):
        open_loader({"a": sources["a"]}, state=state)
    other = make_folder("other", documents(60, 99))
    with pytest.raises(ValueError, match=r"data.sources.a: .*other holds other data"):
        open_loader(sources | {"a": SourceConfig(str(other))}, state=state)


def no_sources(sources: Sources) -> Sources:
    return {}


def negative_weight(sources: Sources) -> Sources:
    return sources | {"a": SourceConfig(sources["a"].path, -1.0)}


def no_weight(sources: Sources) -> Sources:
    return {name: SourceConfig(one.path, 0.0) for name, one in sources.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_sources, "data.sources is empty"),
        (negative_weight, r"data.sources.a.weight=-1.0 must be"),
        (no_weight, "at least one source needs a weight above 0"),
    ],
)
def test_wrong_sources(
    sources: Sources, change: Callable[[Sources], Sources], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_loader(change(sources))


def test_sources_of_two_tokenizers(sources: Sources, make_folder: MakeFolder) -> None:
    path = make_folder("other", documents(9, 9), tokenizer_sha256="1")
    with pytest.raises(ValueError, match=r"sources.a and data.sources.z .* different tokenizers"):
        open_loader(sources | {"z": SourceConfig(str(path))})


def test_damage_done_after_the_start_is_named(make_folder: MakeFolder) -> None:
    path = make_folder("one", documents(40, 5))
    loader = open_loader({"one": SourceConfig(str(path))})
    with open(path / "train-00000.bin", "r+b") as file:
        file.write(b"\xff" * 2000)
    with pytest.raises(ValueError, match=r"token id 65535 .* model.vocab_size=1000: .*one"):
        take(loader, 5)


@pytest.mark.parametrize("max_tokens", [1, 100, 10**9])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_evaluation(sources: Sources, max_tokens: int, dp_size: int) -> None:
    options: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "micro_batch_tokens": MICRO,
        "max_tokens": max_tokens,
    }
    valid = documents(13, 2)
    split = PreparedSplit(sources["a"].path, "valid", name="a", vocab_size=1000)
    ranks = [
        list(evaluation_batches(split, **options, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for group in zip(*ranks, strict=True) for batch in group]
    real = [batch for batch in in_order if batch.num_tokens]
    single = list(evaluation_batches(split, **options))
    assert all(same(*pair) for pair in zip(real, single, strict=True))
    for batch in in_order[len(real) :]:
        assert (batch.labels == -100).all()
        assert batch.cu_seqlens.tolist() == [0, MICRO]
    total = sum(map(len, valid))
    assert sum(batch.num_tokens for batch in real) == min(max_tokens, total)
    if max_tokens >= total:
        tokens = Counter(
            token for batch in real for token in batch.input_ids[0, : batch.num_tokens].tolist()
        )
        assert tokens == Counter(token for one in valid for token in one)
        labels = sum(int((batch.labels != -100).sum()) for batch in real)
        assert labels == total - len(valid)


def test_evaluation_needs_a_held_out_split(make_folder: MakeFolder) -> None:
    path = make_folder("one", documents(4, 1))
    with pytest.raises(ValueError, match=r"sources.web: split 'valid'.*validation_fraction"):
        PreparedSplit(str(path), "valid", name="web", vocab_size=1000)


def test_config_is_a_schema() -> None:
    schema = OmegaConf.structured(DataConfig)
    given = {"seq_len": 8, "global_batch_tokens": 16, "sources": {"a": {"path": "x"}}}
    config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert isinstance(config, DataConfig)
    assert config.sources == {"a": SourceConfig("x", 1.0)}
