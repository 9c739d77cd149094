"""The benchmarks of long texts run from end to end, at sizes that say nothing."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support import HANG_S, warm
from support.tiny import ROOT

pytestmark = pytest.mark.slow


def run_script(name: str, *arguments: str) -> list[dict]:
    """The JSON lines that a benchmark prints."""
    done = subprocess.run(
        [*warm.shared_python(), str(ROOT / "benchmarks" / name), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_prefill(tmp_path: Path) -> None:
    lines = run_script(
        "prefill.py",
        "model=text01_tiny",
        "lengths=[512,1024,1000000000]",
        "chunk_tokens=256",
        "check_tokens=600",
        "dtype=float32",
        "shape.softmax_every=2",
        f"output={tmp_path}",
    )
    assert lines[0]["largest_error"] < 1e-4
    rows = [line for line in lines if "tokens_per_s" in line]
    assert [row["length"] for row in rows] == [512, 1024]
    assert "left_out" in lines[-1]
    first, second = rows
    assert second["state_mib"] == first["state_mib"] == 4 * 4 * 32 * 32 * 4 / 2**20
    assert second["keys_values_gib"] * 2**30 == 4 * 1024 * 2 * 2 * 32 * 4
    for row in rows:
        parts = [row[f"{name}_seconds"] for name in ("lightning", "softmax", "other")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(row["seconds"])
    table = (tmp_path / "prefill.md").read_text()
    assert "| 512 |" in table
    assert "| 1K |" in table
    assert (tmp_path / "prefill.png").stat().st_size > 5000
    kept = (tmp_path / "prefill.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines


def test_niah_training(tmp_path: Path) -> None:
    lines = run_script(
        "niah_training.py",
        "model=hybrid",
        "seconds=4",
        "lengths=[64,128]",
        "shares=[0.5,0.5]",
        "step_tokens=256",
        "num_keys=16",
        "dtype=float32",
        "workers=1",
        "depths=2",
        "samples=1",
        "shape.num_layers=2",
        "shape.hidden_size=32",
        "shape.num_attention_heads=2",
        "shape.num_key_value_heads=1",
        "shape.head_dim=16",
        "shape.expert_hidden_size=32",
        f"output={tmp_path}",
    )
    assert {line["length"] for line in lines if "answer_loss" in line} == {64, 128}
    ladder = [(line["task"], line["length"]) for line in lines if "accuracy" in line]
    assert ladder == [("niah", 64), ("niah", 128), ("niah", 256), ("niah", 512)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"]["niah"].keys() == {"64", "128", "256", "512"}
    assert results["cells"]["niah/512/1.00"]["answers"] == 1
    assert (tmp_path / "niah.png").exists()
