"""Losses and gradient norms of runs, step by step, against those of the first one.

    python benchmarks/compare_runs.py RUN_FOLDER OTHER_FOLDER [...] [tolerance=1e-5]

Prints the largest relative difference of each, and fails where one is above the tolerance or not a
number. By default that is what docs/parallelism.md promises of fp32 on any mesh.
"""

import json
import math
import sys
from pathlib import Path

KEYS = ("loss", "grad_norm", "aux_loss")
TOLERANCE = 1e-5
Rows = dict[int, dict[str, float | None]]


def read_rows(folder: str) -> Rows:
    """By step."""
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def apart(one: float | None, other: float | None) -> float:
    """Relative difference; NaN unless both are finite."""
    if one is None or other is None or not math.isfinite(one) or not math.isfinite(other):
        return math.nan
    return abs(one - other) / (max(abs(one), abs(other)) or 1.0)


def compare(wanted: Rows, got: Rows) -> dict[str, float]:
    """The largest difference of each key that the first run has; NaN if one of them is."""
    keys = [key for key in KEYS if any(key in row for row in wanted.values())]
    found = {
        key: [apart(got[n].get(key), row.get(key)) for n, row in wanted.items()] for key in keys
    }
    # Which of NaN and a number is larger would depend on their order.
    return {
        key: math.nan if any(map(math.isnan, all_)) else max(all_) for key, all_ in found.items()
    }


def main() -> None:
    """Entry point."""
    said = [word for word in sys.argv[1:] if word.startswith("tolerance=")]
    folders = [word for word in sys.argv[1:] if word not in said]
    tolerance = float(said[-1].removeprefix("tolerance=")) if said else TOLERANCE
    if len(folders) < 2:
        sys.exit("error: two run folders or more are compared")
    first, *others = folders
    wanted = read_rows(first)
    if not wanted:
        sys.exit(f"error: {first} has no steps")
    bad = []
    for folder in others:
        got = read_rows(folder)
        if got.keys() != wanted.keys():
            print(f"{folder} has other steps than {first}")
            bad.append(folder)
            continue
        found = compare(wanted, got)
        print(json.dumps({"run": folder, "steps": len(wanted), "apart": found}))
        if not all(value <= tolerance for value in found.values()):
            bad.append(folder)
    if bad:
        sys.exit(f"error: more than {tolerance:g} from {first}: {', '.join(bad)}")


if __name__ == "__main__":
    main()
