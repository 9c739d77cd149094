"""Fixtures: prepared folders made from token lists, and a small tokenizer."""

import tempfile
from pathlib import Path

import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from support.folders import MakeFolder, write_folder

from fulmen.data.tokenise import train_tokenizer

# Hypothesis would make a folder of its own in the current one.
set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """write_folder with a name below tmp_path for its path."""
    return lambda name, *args, **options: write_folder(tmp_path / name, *args, **options)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 entries."""
    texts = ["the quick brown fox jumps over the lazy dog"] * 10
    tokenizer = train_tokenizer(iter(texts), vocab_size=300, end_of_document="<end_of_document>")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
