"""What the kernels are to reach on an H200 in bf16, beside what a run has reached."""

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]

MEMORY_BOUND = ("silu_qkv", "norm", "gated_norm", "rope", "swiglu", "permute")
LEAST_PERCENT = 85
LONG, ROW = 1_048_576, 32_768


def _value(rows: Rows, op: str, case: str, key: str) -> float | None:
    """Of the best implementation of ours."""
    found = [
        row[key]
        for row in rows
        if row["op"] == op
        and row["case"] == case
        and row["provider"].startswith("fulmen ")
        and row["provider"] != "fulmen torch"
        and key in row
    ]
    if not found:
        return None
    return max(found) if key.endswith(("rate", "percent", "of_baseline")) else min(found)


def _ratio(rows: Rows, case: str, key: str) -> float | None:
    mine, other = (_value(rows, "lightning", name, key) for name in (case, str(ROW)))
    return mine / other if mine and other else None


def goals(rows: Rows) -> list[tuple[str, str, str, str]]:
    """(what, goal, reached, yes or no) of each goal for which there are figures.

    `rows` have their share of the baseline.
    """
    result: list[tuple[str, str, str, str]] = []

    def add(what: str, value: float | None, limit: float, unit: str, *, at_most: bool) -> None:
        if value is None:
            return
        met = value <= limit if at_most else value >= limit
        sign = "<=" if at_most else ">="
        result.append((what, f"{sign} {limit:g} {unit}", f"{value:.4g}", "yes" if met else "no"))

    def at_most(what: str, value: float | None, limit: float, unit: str) -> None:
        add(what, value, limit, unit, at_most=True)

    def at_least(what: str, value: float | None, limit: float, unit: str) -> None:
        add(what, value, limit, unit, at_most=False)

    row = str(ROW)
    at_most("lightning forward, 32K", _value(rows, "lightning", row, "forward_ms"), 0.75, "ms")
    key = "training_ms"
    at_most("lightning forward + backward, 32K", _value(rows, "lightning", row, key), 3.0, "ms")
    packed = next(
        (x["case"] for x in rows if x["op"] == "lightning" and x["case"].startswith(f"{row} in")),
        "",
    )
    for name, title in (("forward", "forward"), ("training", "forward + backward")):
        of_row = "of unpacked"
        at_most(f"lightning packed, {title}", _ratio(rows, packed, f"{name}_ms"), 1.1, of_row)
        per_token = _ratio(rows, str(LONG), f"{name}_ns_per_token")
        at_most(f"lightning per token at 1M, {title}", per_token, 1.05, "of 32K")
    _add_memory_bound(rows, at_least)
    _add_products(rows, at_least, at_most)
    return result


def _add_memory_bound(rows: Rows, at_least: Callable[..., None]) -> None:
    for op in MEMORY_BOUND:
        for case in dict.fromkeys(row["case"] for row in rows if row["op"] == op):
            if case.startswith("sort"):
                continue
            for name, title in (("forward", "forward"), ("training", "forward + backward")):
                percent = _value(rows, op, case, f"{name}_percent")
                at_least(f"{op} {case}, {title}", percent, LEAST_PERCENT, "% of copy")


def _add_products(rows: Rows, at_least: Callable[..., None], at_most: Callable[..., None]) -> None:
    for op, key, limit, unit in (
        ("experts", "training_of_baseline", LEAST_PERCENT, "% of bare grouped_mm"),
        ("cross_entropy", "training_rate", 550, "TFLOP/s"),
    ):
        for case in dict.fromkeys(row["case"] for row in rows if row["op"] == op):
            at_least(f"{op} {case}, forward + backward", _value(rows, op, case, key), limit, unit)
            if op == "cross_entropy":
                extra = _value(rows, op, case, "extra_gib")
                at_most(f"{op} {case}, extra memory", extra, 3, "GiB")
