"""The unigram loss against a count by hand."""

import math
from pathlib import Path

import pytest
from support.folders import write_folder

from fulmen.data.shards import PreparedSplit
from fulmen.trainer.unigram import unigram_loss

pytestmark = pytest.mark.fast


def test_unigram_loss_by_hand(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[0, 0, 1], [2]])
    write_folder(tmp_path / "b", [[3, 3, 3, 3]])
    train = [PreparedSplit(tmp_path / n, "train", name=n, vocab_size=4) for n in "ab"]
    # The same tokens stand for held-out ones: what counts is which frequencies meet which.
    held_out = {split.name: split for split in train}
    model_a = [3 / 8, 2 / 8, 2 / 8, 1 / 8]
    model_b = [1 / 8, 1 / 8, 1 / 8, 5 / 8]
    mixed = [0.75 * a + 0.25 * b for a, b in zip(model_a, model_b, strict=True)]
    data = [0.75 * 2 / 4, 0.75 * 1 / 4, 0.75 * 1 / 4, 0.25]
    expected = -sum(d * math.log(m) for d, m in zip(data, mixed, strict=True))
    assert unigram_loss(train, held_out, {"a": 3.0, "b": 1.0}) == pytest.approx(expected)
