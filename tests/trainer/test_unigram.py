"""The unigram loss against a count by hand."""

import math
from pathlib import Path

import pytest
from support.folders import write_folder
from support.seeing import write_conversations

from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import load_tokenizer
from fulmen.trainer.unigram import unigram_loss

pytestmark = pytest.mark.fast


def test_unigram_loss_by_hand(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[0, 0, 1], [2]])
    write_folder(tmp_path / "b", [[3, 3, 3, 3]])
    train = [PreparedSplit(tmp_path / n, "train", name=n, vocab_size=4) for n in "ab"]
    # The same tokens stand for held-out ones: what counts is which frequencies meet which.
    held_out = {split.name: split for split in train}
    # Of documents all but the first tokens are labels.
    model_a = [2 / 6, 2 / 6, 1 / 6, 1 / 6]
    model_b = [1 / 7, 1 / 7, 1 / 7, 4 / 7]
    mixed = [0.75 * a + 0.25 * b for a, b in zip(model_a, model_b, strict=True)]
    data = [0.75 / 2, 0.75 / 2, 0, 0.25]
    expected = -sum(d * math.log(m) for d, m in zip(data, mixed, strict=True))
    assert unigram_loss(train, held_out, {"a": 3.0, "b": 1.0}) == pytest.approx(expected)


def test_only_labels_count(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, answer="yes", count=20)
    train, held_out = (
        PreparedSplit(path, split, name="a", vocab_size=300) for split in ("train", "valid")
    )
    # Of every document these have labels, each once: the answer, and the end of its turn.
    tokenizer = load_tokenizer(str(path / "tokenizer.json"))
    labels = [*tokenizer.encode("yes", add_special_tokens=False).ids, "end of the turn"]
    assert len(set(labels)) == len(labels)
    share = (train.num_documents + 1) / (train.num_documents * len(labels) + 300)
    loss = unigram_loss([train], {"a": held_out}, {"a": 1.0})
    assert loss == pytest.approx(-math.log(share))
