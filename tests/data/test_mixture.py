"""What is drawn follows the shares, by length bucket and source, in tokens and whatever changes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import write_folder

from fulmen.data.buckets import BUCKETS
from fulmen.data.mixture import Mixture, Shares
from fulmen.data.shards import PreparedSplit

pytestmark = pytest.mark.fast
BOUNDS = (16, 64)
LONGEST = 200
RANGES = {"short": (1, 16), "medium": (16, 64), "long": (64, LONGEST)}
HELD = {"a": {"short": 40, "medium": 9, "long": 5}, "b": {"short": 30, "long": 2}, "c": {"long": 8}}
"""Documents of each source by bucket."""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedSplit]:
    folder, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0)
    opened = []
    for name, counts in HELD.items():
        lengths = [
            n for bucket, count in counts.items() for n in rng.integers(*RANGES[bucket], count)
        ]
        rng.shuffle(lengths)
        path: Path = write_folder(folder / name, [[1] * n for n in lengths], num_shards=2)
        opened.append(PreparedSplit(path, "train", name=name, vocab_size=9))
    return opened


def draw_tokens(mixture: Mixture, splits: list[PreparedSplit], least: int) -> Counter:
    """Tokens by (source, bucket) of draws until there are `least`, checked one by one."""
    drawn: Counter = Counter()
    while drawn.total() < least:
        stream, document, length = mixture.draw()
        source, bucket = divmod(stream, len(BUCKETS))
        assert splits[source].lengths(np.array([document])) == [length]
        below, above = RANGES[BUCKETS[bucket]]
        assert below <= length < above
        drawn[splits[source].name, BUCKETS[bucket]] += length
    return drawn


weights = st.fixed_dictionaries({name: st.sampled_from([0.0, 0.3, 1.0, 5.0]) for name in HELD})
lengths = st.fixed_dictionaries({name: st.sampled_from([0.0, 0.1, 1.0, 2.0]) for name in BUCKETS})


def able(sources: dict[str, float], bucket: str) -> dict[str, float]:
    """Weights of the sources that hold documents of a bucket, as shares of 1."""
    held = {name: weight for name, weight in sources.items() if weight and bucket in HELD[name]}
    return {name: weight / sum(held.values()) for name, weight in held.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(weights, lengths, st.integers(0, 3000)), min_size=1, max_size=5))
def test_draws_follow_the_integral_of_the_shares(
    splits: list[PreparedSplit], plan: list[tuple[dict[str, float], dict[str, float], int]]
) -> None:
    mixture = Mixture(splits, BOUNDS, seed=3)
    drawn: Counter = Counter()
    target: Counter = Counter()
    for sources, by_length, tokens in plan:
        shares = Shares(sources, by_length)
        if any(share and not able(sources, name) for name, share in by_length.items()) or not any(
            by_length.values()
        ):
            with pytest.raises(ValueError, match=r"lengths.*|weight above 0"):
                mixture.check_shares(shares)
            continue
        mixture.set_shares(shares)
        now = draw_tokens(mixture, splits, tokens)
        drawn.update(now)
        for name, share in by_length.items():
            target[name] += now.total() * share / sum(by_length.values())
            in_bucket = sum(count for (_, bucket), count in now.items() if bucket == name)
            for source, part in able(sources, name).items():
                target[source, name] += in_bucket * part
    for name in BUCKETS:
        of_bucket = {key: count for key, count in drawn.items() if key[1] == name}
        # The fullest credit is drawn first, so no stream is ahead by more than a document.
        assert -2 * LONGEST < sum(of_bucket.values()) - target[name] < 2 * LONGEST
        for source in HELD:
            assert abs(drawn[source, name] - target[source, name]) < 2 * LONGEST


def test_without_lengths_a_source_gives_what_it_has(splits: list[PreparedSplit]) -> None:
    mixture = Mixture(splits, BOUNDS, seed=3)
    mixture.set_shares(Shares({"a": 3.0, "b": 1.0, "c": 0.0}, None))
    drawn = draw_tokens(mixture, splits, 60_000)
    for name, weight in (("a", 0.75), ("b", 0.25)):
        mine = sum(tokens for (source, _), tokens in drawn.items() if source == name)
        assert mine / drawn.total() == pytest.approx(weight, abs=0.01)
        number = list(HELD).index(name)
        for bucket, (below, above) in RANGES.items():
            all_lengths = splits[number].lengths(np.arange(splits[number].num_documents))
            natural = sum(n for n in all_lengths if below <= n < above) / sum(all_lengths)
            assert drawn[name, bucket] / mine == pytest.approx(natural, abs=0.02)
    assert not any(source == "c" for source, _ in drawn)


def test_each_document_once_an_epoch_of_its_stream(splits: list[PreparedSplit]) -> None:
    mixture = Mixture(splits, BOUNDS, seed=3)
    shares = [
        Shares({"a": 1.0, "b": 1.0, "c": 1.0}, {"short": 1.0, "medium": 1.0, "long": 1.0}),
        Shares({"a": 1.0, "b": 2.0, "c": 0.0}, None),
    ]
    seen: dict[int, list[int]] = {}
    for number in range(1200):
        mixture.set_shares(shares[number // 50 % 2])
        stream, document, _ = mixture.draw()
        seen.setdefault(stream, []).append(document)
    assert len(seen) == sum(map(len, HELD.values()))
    for stream, documents in seen.items():
        source, bucket = divmod(stream, len(BUCKETS))
        size = list(HELD.values())[source][BUCKETS[bucket]]
        epochs = [documents[begin : begin + size] for begin in range(0, len(documents), size)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(set(epoch) == set(epochs[0]) for epoch in epochs[:-1])
        if size > 5:
            assert epochs[0] != epochs[1]


def test_resume_at_every_draw(splits: list[PreparedSplit]) -> None:
    def shares(number: int) -> Shares:
        part = min(1.0, number / 30)
        return Shares(
            {"a": 1.0, "b": 1.0 - part, "c": part},
            {"short": 1.0 - 0.7 * part, "medium": 0.3 * part, "long": 0.4 * part},
        )

    mixture, drawn, states = Mixture(splits, BOUNDS, seed=3), [], []
    for number in range(60):
        states.append(json.dumps(mixture.state()))
        mixture.set_shares(shares(number))
        drawn.append(mixture.draw())
    for begin in range(0, 60, 3):
        resumed = Mixture(splits, BOUNDS, seed=3, state=json.loads(states[begin]))
        assert json.dumps(resumed.state()) == states[begin]
        for number in range(begin, 60):
            resumed.set_shares(shares(number))
            assert resumed.draw() == drawn[number]


@pytest.mark.parametrize(
    ("sources", "by_length", "message"),
    [
        ({"b": 1}, {"medium": 1}, r"lengths.medium=1.0: no source .* 16 to 63 tokens"),
        (
            {"b": 0, "c": 1},
            {"short": 0.5, "long": 1},
            r"lengths.short=0.5: .* of fewer than 16 tokens",
        ),
        ({}, {"long": 1}, "at least one source needs a weight above 0"),
        ({"a": 1}, {}, "lengths: at least one bucket"),
        ({"a": 1}, {"long": 0}, "lengths: at least one bucket"),
        ({"a": 1}, {"tall": 1}, "lengths.tall: the buckets are short, medium, long"),
        ({"a": 1}, {"long": -1}, "lengths.long=-1 must be"),
        ({"a": float("nan")}, None, "data.sources.a.weight=nan must be"),
        ({"d": 1}, None, "data.sources.d has a weight but is no source"),
    ],
)
def test_wrong_shares(
    splits: list[PreparedSplit],
    sources: dict[str, float],
    by_length: dict[str, float] | None,
    message: str,
) -> None:
    mixture = Mixture(splits, BOUNDS, seed=3)
    every = dict.fromkeys(HELD, 0.0) | sources
    with pytest.raises(ValueError, match=message):
        mixture.set_shares(Shares(every, by_length))


def test_a_source_without_a_weight(splits: list[PreparedSplit]) -> None:
    with pytest.raises(ValueError, match=r"data.sources.b has no weight"):
        Mixture(splits, BOUNDS, seed=3).set_shares(Shares({"a": 1.0, "c": 1.0}, None))


def test_resume_with_other_bounds(splits: list[PreparedSplit]) -> None:
    state = Mixture(splits, BOUNDS, seed=3).state()
    with pytest.raises(ValueError, match=r"data.length_bounds=\[16, 65\], but .*\[16, 64\]"):
        Mixture(splits, (16, 65), seed=3, state=json.loads(json.dumps(state)))
