"""launch/make_retrieval.py as a user runs it, to a folder that can be trained on."""

import os
import subprocess
from pathlib import Path

import pytest
from support import HANG_S, warm

from fulmen.data.shards import PreparedSplit

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm.shared_python(), str(ROOT / "launch" / script), *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.slow
def test_from_nothing_to_a_prepared_folder(tmp_path: Path) -> None:
    sizes = ["tokens=20000", "lengths=[[200,1000,1]]", "kinds=[needle,needle,tracking]"]
    done = run(tmp_path, "make_retrieval.py", "output=made", "haystack=words", *sizes)
    assert done.returncode == 0, done.stderr
    assert "200 to 1,000 tokens: 100.00% of the tokens" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("next: "))
    done = run(tmp_path, "prepare_data.py", *command.replace("FOLDER", "ready").split()[3:])
    assert done.returncode == 0, done.stderr
    assert "to        511 tokens:" in done.stdout
    split = PreparedSplit(tmp_path / "ready", "train", name="x", vocab_size=10**5)
    assert split.num_tokens == pytest.approx(20_000, rel=0.2)


@pytest.mark.slow
def test_text_of_ones_own(tmp_path: Path) -> None:
    done = run(
        tmp_path, "prepare_data.py", f"input={ROOT / 'docs'}", "output=text", "vocab_size=600",
        "num_workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        tmp_path, "make_retrieval.py", "output=made", "tokenizer=text", f"input={ROOT / 'docs'}",
        "tokens=9000", "lengths=[[2000,4000,1]]", "num_workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "output=FOLDER tokenizer=text\n" in done.stdout
    assert sorted(os.listdir(tmp_path / "made")) == ["documents.jsonl.zst"]


def test_messages(tmp_path: Path) -> None:
    done = run(tmp_path, "make_retrieval.py", "output=x", "hay=words")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown key hay")
    done = run(tmp_path, "make_retrieval.py", "output=x", "input=nowhere", "tokenizer=nowhere")
    assert done.returncode == 1
    assert done.stderr == "error: tokenizer=nowhere: nowhere does not exist\n"
    assert os.listdir(tmp_path) == []
