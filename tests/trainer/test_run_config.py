"""A run's config.yaml that is none: one error that names it, whoever reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulmen.launch.checkpoints import find_sources
from fulmen.trainer.compare import _read_config
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.run_folder import DONE
from fulmen.trainer.scaling import read_run
from fulmen.trainer.weights import load_model_config

pytestmark = pytest.mark.fast

BROKEN = {
    "torn": b"model: [1, 2",
    "no text": b"\xff\xfe\x00\x01",
    "zeros": bytes(100),
    "a number": b"3",
    "a list": b"- 1\n- 2",
    "a key twice": b"model: 1\nmodel: 2",
    "an open interpolation": b"model: ${data",
}
READERS: dict[str, Callable[[Path], Any]] = {
    "any": load_run_config,
    "model": load_model_config,
    "sources": find_sources,
    "scaling": lambda run: read_run(run, "loss"),
    "comparison": _read_config,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_broken_one_is_named(read: Callable[[Path], Any], content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / DONE).touch()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config.yaml cannot be read: \S"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "has no group `model`"),
        ("model: {num_layers: many}", "model: .*num_layers|model: .*many"),
        ("model: {depth: 3}", "model: .*depth"),
        ("model: 3", "model: "),
        ("model: {num_layers: 3}", "model: .*[Mm]issing"),
    ],
)
def test_what_is_no_model_is_named(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config.yaml:? .*({error})"):
        load_model_config(tmp_path)
