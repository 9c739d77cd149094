"""launch/make_images.py and launch/prepare_images.py as a user runs them."""

import json
import subprocess
from pathlib import Path

import pytest
from support import HANG_S, warm

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm.shared_python(), str(ROOT / "launch" / f"{name}.py"), *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.slow
def test_made_and_prepared(tmp_path: Path) -> None:
    done = run("make_images", tmp_path, "output=made", "captions=12", "conversations=12",
               "pairs=12", "held_out=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "captions/train-00000.tar: 12 records" in done.stdout
    # A second folder by the same tokenizer, several processes, and something broken among it.
    (tmp_path / "made" / "pairs" / "bad.tar").write_bytes(b"no tar")
    options = ["tile_size=56", "validation_fraction=0", "num_workers=2"]
    for part, tokenizer in (("captions", "train"), ("pairs", "captions")):
        done = run(
            "prepare_images", tmp_path, f"input=made/{part}", f"output={part}", "vocab_size=300",
            f"tokenizer={tokenizer}", f"held_out=made/{part}/held_out*.tar", *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "12 documents" in done.stdout
    assert "damaged_file" in done.stdout
    (line,) = (tmp_path / "pairs" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("bad.tar")
    manifests = [
        json.loads((tmp_path / one / "manifest.json").read_text()) for one in ("captions", "pairs")
    ]
    assert manifests[0]["tokenizer"]["sha256"] == manifests[1]["tokenizer"]["sha256"]


@pytest.mark.slow
def test_mistakes_get_one_line(tmp_path: Path) -> None:
    for name, override, message in (
        ("prepare_images", "tile_sise=3", "did you mean tile_size"),
        ("prepare_images", "resolution=x", "error: resolution=x must be dynamic or fixed"),
        ("prepare_images", "fields.picture=x", "error: fields.picture: the fields are text"),
        ("make_images", "kinds=[x]", "error: kinds=['x']: give some of"),
    ):
        (tmp_path / "in.jsonl").write_text("{}\n")
        needed = ["input=in.jsonl"] if name == "prepare_images" else []
        done = run(name, tmp_path, *needed, "output=out", override)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
