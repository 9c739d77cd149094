"""launch/prepare_data.py as a user runs it: a kill at any moment, and its messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import HANG_S

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "launch" / "prepare_data.py")]


def prepare(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *overrides], cwd=folder, capture_output=True, text=True, timeout=HANG_S
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    with open(path, "w") as file:
        for number in range(2400):
            text = " ".join(f"word{number * position % 977}" for position in range(150))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            if number % 200 == 0:
                file.write("{broken\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path, corpus: Path) -> None:
    settings = [f"input={corpus}", "vocab_size=300", "shard_tokens=60000", "num_workers=2"]
    done = prepare(tmp_path, *settings, "output=whole", "num_workers=1")
    assert done.returncode == 0, done.stderr
    assert "rejected as malformed: 12" in done.stdout
    whole = contents(tmp_path / "whole")

    kept_by_kills = []
    for wanted in (1, 3):
        running = subprocess.Popen(
            [*COMMAND, *settings, "output=cut"], cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        record = tmp_path / "cut" / ".progress" / f"shard-{wanted:05d}.json"
        while not record.exists() and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        kept_by_kills.append(len(list(record.parent.glob("shard-*.json"))))
        assert not (tmp_path / "cut" / "manifest.json").exists()
    done = prepare(tmp_path, *settings, "output=cut")
    assert done.returncode == 0, done.stderr
    assert f"going on after {kept_by_kills[-1]} finished shard(s)" in done.stdout
    assert contents(tmp_path / "cut") == whole
    # Neither hydra nor a tokenising process left anything behind.
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "cut", "whole"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input=x", "output=y", "vocabsize=9"], "unknown key vocabsize; did you mean vocab_size?"),
        (["output=y"], "no value for input"),
        (["input=x"], "no value for output"),
        (["input=nowhere", "output=y"], "input=nowhere: no file found there"),
    ],
)
def test_messages(tmp_path: Path, overrides: list[str], message: str) -> None:
    done = prepare(tmp_path, *overrides)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
