"""Speed of fulmen's kernels beside torch, torch.compile, fla, Liger and quack, and the chip's own.

    python benchmarks/kernels.py [ops=[norm,rope]] [lengths=[32768]] [rivals=false] output=DIR
    python benchmarks/kernels.py ops=[lightning] rivals=false tile=[64,64,4,3] piece_tokens=0

The second form tries another cut of lightning attention's work. A provider's output and gradients
are checked first, in the same run, against fp64 on a part of the rows or heads; one that fails gets
no figures, but a row that says why, and so does one that raises, crashes or hangs. TB/s counts each
input read once and each output written once; TFLOP/s counts attention's causal half, 2.5 times
forward for its backward pass. Per cent is of the device copy, or of an 8192^3 product in bf16,
measured in the run. Times are medians by CUDA events, the host ahead of the device, over inputs too
many for the L2 cache; `steady_s=1` puts a second of load before each, as training does, under which
an H200 lowers its clock. `output=DIR` receives kernels.json and kernels.md, from the first row on.
Without a GPU there is nothing to measure and it says so; `device=cpu dtype=float32` with small
sizes tries the code.
"""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases import OPS, cases_of
from kernel_cases.case import Settings
from kernel_cases.report import markdown, write
from kernel_cases.runner import Plan, print_row, run_jobs
from omegaconf import OmegaConf

RUN = {
    "ops": list(OPS),
    "providers": [],
    "device": "cuda",
    "dtype": "bfloat16",
    "seconds": 0.3,
    "steady_s": 0.0,
    "budget_s": None,
    "stall_s": 400.0,
    "output": None,
}


def read_options(arguments: list[str]) -> tuple[Plan, str | None]:
    """The plan, and the folder for the results."""
    defaults = RUN | asdict(Settings())
    given = OmegaConf.to_container(OmegaConf.from_cli(arguments))
    assert isinstance(given, dict)
    unknown = sorted(set(map(str, given)) - set(defaults))
    if unknown:
        sys.exit(
            f"benchmarks/kernels.py: unknown option {unknown[0]}; known: {', '.join(defaults)}"
        )
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in (defaults | given).items()
    }
    settings = Settings(**{key: values[key] for key in asdict(Settings())})
    run = {key: values[key] for key in RUN if key != "output"}
    unknown = sorted(set(run["ops"]) - set(OPS))
    if unknown:
        sys.exit(f"benchmarks/kernels.py: no op {unknown[0]}; there are {', '.join(OPS)}")
    return Plan(settings, **run), values["output"]


def main(arguments: list[str]) -> None:
    """Entry point."""
    plan, output = read_options(arguments)
    if plan.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device here, nothing to measure")
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    facts: dict[str, Any] = {
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "dtype": plan.dtype,
        "settings": asdict(plan.settings),
    }
    rows: list[dict[str, Any]] = []
    baselines = {op: case.baseline for op in plan.ops for case in cases_of(op, plan.settings)}

    def on_facts(found: dict[str, Any]) -> None:
        facts.update(found)
        print_row(facts)

    def on_row(row: dict[str, Any]) -> None:
        rows.append(row)
        print_row(row)
        if output:
            write(Path(output), facts, rows, baselines)

    run_jobs(plan, on_facts, on_row)
    print(markdown(facts, rows, baselines))


if __name__ == "__main__":
    main(sys.argv[1:])
