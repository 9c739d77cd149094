"""Every command that the documentation shows is run, in order, on a tiny configuration."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import HANG_S, warm

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "docs/training.md",
    "docs/evaluation.md",
    "docs/planner.md",
    "docs/scaling.md",
    "docs/memory.md",
    "docs/kernels.md",
    "docs/data.md",
    "docs/images.md",
    "docs/huggingface.md",
    "docs/vision.md",
    "docs/parallelism.md",
    "docs/metrics.md",
    "docs/operations.md",
]
# `make test` is what runs this.
LEFT_OUT = ["make test"]
# What makes any recipe small enough for two busy cores.
TINY = [
    "model.num_layers=8",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=16",
    "model.rotary_dim=16",
    "model.num_experts=4",
    "model.expert_hidden_size=32",
    "model.vocab_size=4096",
    "data.seq_len=64",
    "data.global_batch_tokens=1024",
    "trainer.micro_batch_tokens=256",
    "trainer.max_steps=2",
    "trainer.dtype=float32",
    "evaluation.max_tokens=512",
]

# The same for recipes of pictures, whose own sizes are small enough.
TINY_SEEING = ["trainer.max_steps=2", "evaluation.max_tokens=512"]

# Stand for python and torchrun, also for make: processes forked from one that has imported torch,
# two at most, and every training run becomes tiny.
PYTHON = """#!/bin/sh
exec {warm} "$@"
"""
TORCHRUN = """#!/bin/sh
export PYTHON_EXEC={folder}/bin/python
exec {real} -I -S {folder}/shrink.py $PYTHON_EXEC -m torch.distributed.run "$@"
"""
SHRINK = """
import os, sys
words = sys.argv[1:]
if "--nproc-per-node" in words:
    at = words.index("--nproc-per-node") + 1
    words[at] = str(min(2, int(words[at])))
if "launch/pretrain.py" in words:
    words += {seeing} if any("vl01" in word for word in words) else {tiny}
os.execv(words[0], words)
"""


def commands(document: str) -> list[str]:
    """The lines of a document's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, whose runs and data are its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ["launch", "recipes", "docs", "benchmarks"]:
        (folder / name).symlink_to(ROOT / name)
    for name in ["Makefile", "setup.py", "constraints.txt"]:
        shutil.copy2(ROOT / name, folder)
    # The environment that runs the tests, with a stamp that keeps make from setting it up anew.
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / ".fulmen-setup").touch()
    (folder / "bin").symlink_to(folder / ".venv" / "bin")
    (folder / "shrink.py").write_text(SHRINK.format(tiny=TINY, seeing=TINY_SEEING))
    for name, text in (("python", PYTHON), ("torchrun", TORCHRUN)):
        program = folder / "bin" / name
        command = " ".join(warm.shared_python())
        program.write_text(text.format(real=sys.executable, warm=command, folder=folder))
        program.chmod(0o755)
    return folder


@pytest.mark.slow
def test_a_command_that_fails_is_seen(checkout: Path) -> None:
    python = str(checkout / "bin" / "python")
    ends = {"import sys; sys.exit(3)": 3, "raise KeyError": 1, "import os; os.abort()": -6}
    for code, end in ends.items():
        done = subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL)
        assert done.returncode == end, code


@pytest.mark.slow
def test_every_command_runs(checkout: Path) -> None:
    path = f"{checkout / 'bin'}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "ARGS": " ".join(TINY),
        "RUN_ID": "made",
        "VL_RECORDS": "80",
    }
    todo = [line for document in DOCUMENTS for line in commands(document)]
    assert len(todo) > 10
    for command in todo:
        if command in LEFT_OUT:
            continue
        done = subprocess.run(
            command,
            shell=True,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    runs = checkout / "runs" / "text01_tiny"
    assert "<svg" in (runs / "made" / "report.html").read_text()
    assert (runs / "docs" / "DONE").exists()
    log = (runs / "again" / "train.log").read_text()
    assert "from the weights of" in log


@pytest.mark.fast
def test_links_lead_somewhere() -> None:
    others = [str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*/README.md")]
    for document in [*DOCUMENTS, *others, "docs/performance.md"]:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
