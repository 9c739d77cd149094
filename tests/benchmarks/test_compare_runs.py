"""The verdict on runs that should be equal."""

import json
import math
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

# Only while it is imported, as in test_kernel_cases.py.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare_runs  # noqa: E402

sys.path.remove(str(BENCHMARKS))

STEPS = [
    {"loss": 2.0, "grad_norm": 0.5, "aux_loss": 0.1},
    {"loss": 1.0, "grad_norm": 0.25, "aux_loss": 0.0},
]


def write(folder: Path, changes: dict[str, float | None], steps: int = 2) -> str:
    """A run whose last row has other values."""
    rows = [{"step": number + 1, **row} for number, row in enumerate(STEPS[:steps])]
    if rows:
        rows[-1] |= changes
    rows.append({"step": 2, "valid_loss/corpus": 3.0})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def fails(monkeypatch: pytest.MonkeyPatch, *words: str) -> bool:
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *words])
    try:
        compare_runs.main()
    except SystemExit as end:
        return bool(end.code)
    return False


@pytest.mark.parametrize(
    ("changes", "bad"),
    [
        ({}, False),
        ({"loss": 1.0 + 5e-6}, False),
        ({"loss": 1.0 + 5e-5}, True),
        ({"grad_norm": 0.2501}, True),
        ({"loss": math.nan}, True),
        ({"loss": math.inf}, True),
        ({"grad_norm": None}, True),
        ({"aux_loss": 1e-9}, True),
    ],
)
def test_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float | None], bad: bool
) -> None:
    first, other = write(tmp_path / "one", {}), write(tmp_path / "two", changes)
    assert fails(monkeypatch, first, other) is bad
    assert fails(monkeypatch, first, first, other, "tolerance=1e-5") is bad
    assert fails(monkeypatch, other, first) is bad


def test_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = write(tmp_path / "one", {}), write(tmp_path / "two", {"loss": 1.001})
    assert fails(monkeypatch, first, other, "tolerance=1e-4")
    assert not fails(monkeypatch, first, other, "tolerance=1e-2")


def test_two_broken_runs_are_not_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [write(tmp_path / name, {"loss": math.nan}) for name in ("one", "two")]
    assert fails(monkeypatch, *broken)
    empty = [write(tmp_path / name, {}, steps=0) for name in ("three", "four")]
    assert fails(monkeypatch, *empty)
    assert fails(monkeypatch, write(tmp_path / "five", {}), write(tmp_path / "six", {}, steps=1))
    assert fails(monkeypatch, broken[0])


def test_nan_before_the_largest_is_seen() -> None:
    rows: compare_runs.Rows = {1: {"loss": math.nan}, 2: {"loss": 1.0}}
    assert math.isnan(compare_runs.compare(rows, rows)["loss"])
