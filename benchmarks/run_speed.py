"""Speed of a run by its metrics: medians of the rows behind the first few steps, one JSON line.

python benchmarks/run_speed.py runs/vl01_1b/RUN [skip=5]
"""

import json
import statistics
import sys
from pathlib import Path

KEYS = ("step_time_s", "data_wait_s", "tokens_per_s", "mfu", "mfu_palm", "memory_gib")


def main() -> None:
    """Entry point."""
    skip = next((int(word[5:]) for word in sys.argv[2:] if word.startswith("skip=")), 5)
    lines = (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "step_time_s" in row][skip:]
    if not rows:
        sys.exit(f"error: {sys.argv[1]} has no more than {skip} steps: give fewer to skip")
    found = {}
    for key in KEYS:
        values = [row[key] for row in rows if row.get(key) is not None]
        found[key] = statistics.median(values) if values else None
    waits = sum(row["data_wait_s"] for row in rows) / sum(row["step_time_s"] for row in rows)
    print(json.dumps({"steps": len(rows), **found, "waits_for_data": round(waits, 4)}))


if __name__ == "__main__":
    main()
