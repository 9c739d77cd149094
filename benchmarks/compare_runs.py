"""Losses and gradient norms of runs, step by step, against those of the first one.

    python benchmarks/compare_runs.py RUN_FOLDER OTHER_FOLDER [...]

Prints the largest relative difference of each.
"""

import json
import sys
from pathlib import Path

KEYS = ("loss", "grad_norm", "aux_loss")


def rows(folder: str) -> dict[int, dict[str, float]]:
    """By step."""
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def main() -> None:
    """Entry point."""
    first, *others = sys.argv[1:]
    wanted = rows(first)
    for folder in others:
        got = rows(folder)
        if got.keys() != wanted.keys():
            sys.exit(f"{folder} has other steps than {first}")
        apart = {
            key: max(abs(got[step][key] - row[key]) / abs(row[key]) for step, row in wanted.items())
            for key in KEYS
        }
        print(json.dumps({"run": folder, "steps": len(wanted), "apart": apart}))


if __name__ == "__main__":
    main()
