"""Rows to a folder: all as JSON, and a table for each op in Markdown."""

import json
from pathlib import Path
from typing import Any

from kernel_cases.goals import goals

COLUMNS = {
    "case": "case",
    "provider": "provider",
    "forward_ms": "forward ms",
    "forward_rate": "{unit}",
    "forward_percent": "% of {ceiling}",
    "training_ms": "forward + backward ms",
    "training_rate": "{unit}",
    "training_percent": "% of {ceiling}",
    "first_calls_s": "first calls s",
    "extra_gib": "extra GiB",
    "error": "error",
}
BASELINE_COLUMNS = {
    "forward_of_baseline": "forward % of {baseline}",
    "training_of_baseline": "forward + backward % of {baseline}",
}

LONGEST_CELL = 160


def with_baselines(rows: list[dict[str, Any]], baselines: dict[str, str]) -> list[dict[str, Any]]:
    """Adds each row's share of its baseline's speed; `baselines` is op -> provider."""
    found = {
        (row["op"], row["case"]): row for row in rows if row["provider"] == baselines.get(row["op"])
    }
    result = []
    for row in rows:
        row = dict(row)
        base = found.get((row["op"], row["case"]), {})
        for name in ("forward", "training"):
            if row.get(f"{name}_ms") and base.get(f"{name}_ms"):
                share = 100 * base[f"{name}_ms"] / row[f"{name}_ms"]
                row[f"{name}_of_baseline"] = round(share, 1)
        result.append(row)
    return result


def table(op: str, rows: list[dict[str, Any]], baseline: str = "") -> str:
    """One op's rows, those without figures with the reason."""
    unit = next((row["unit"] for row in rows if "unit" in row), "TB/s")
    names = {
        "unit": unit,
        "ceiling": "copy" if unit == "TB/s" else "matmul",
        "baseline": baseline,
    }
    columns = COLUMNS | (BASELINE_COLUMNS if baseline else {})
    lines = [
        f"## {op}",
        "",
        "| " + " | ".join(title.format(**names) for title in columns.values()) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        calls = [row.get(f"{name}_first_call_s") for name in ("forward", "training")]
        values = dict(row)
        values["first_calls_s"] = " + ".join(str(call) for call in calls if call is not None) or "-"
        values.setdefault("forward_ms", row.get("failed", row.get("forward_skipped", "-")))
        values.setdefault("training_ms", row.get("training_skipped", "-"))
        cells = [str(values.get(key, "-")).replace("|", "/")[:LONGEST_CELL] for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], baselines: dict[str, str]) -> str:
    """What it was measured on, then a table an op, in the order of the rows."""
    ceilings = facts.get("ceilings", {})
    head = (
        f"{facts.get('device')}, torch {facts.get('torch')}, triton {facts.get('triton', '-')}, "
        f"commit {facts.get('commit')}, {facts.get('date')}, {facts.get('dtype')}; copy "
        f"{ceilings.get('copy_tb_per_s', 0):.2f} TB/s, 8192^3 matmul "
        f"{ceilings.get('matmul_tflop_per_s', 0):.0f} TFLOP/s in the same run."
    )
    rows = with_baselines(rows, baselines)
    tables = [
        table(op, [row for row in rows if row["op"] == op], baselines.get(op, ""))
        for op in dict.fromkeys(row["op"] for row in rows)
    ]
    return "\n".join([head + "\n", *tables, goals_table(rows)])


def goals_table(rows: list[dict[str, Any]]) -> str:
    """Empty where no goal has figures; they hold for Text-01's sizes on an H200."""
    lines = ["| " + " | ".join(cells) + " |" for cells in goals(rows)]
    if not lines:
        return ""
    head = ["## Goals on an H200", "", "| what | goal | reached | met |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def write(
    folder: Path, facts: dict[str, Any], rows: list[dict[str, Any]], baselines: dict[str, str]
) -> None:
    """kernels.json and kernels.md, each whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "kernels.json": json.dumps({"facts": facts, "rows": rows}, indent=1),
        "kernels.md": markdown(facts, rows, baselines),
    }
    for name, text in content.items():
        part = folder / f"{name}.part"
        part.write_text(text)
        part.replace(folder / name)
