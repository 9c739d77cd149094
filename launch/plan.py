"""What a run needs and how long it takes: `plan.py recipe=text01 gpus=2048 gpu=h800 [KEY=VALUE]`.

Nothing runs and nothing is written; a GPU is not needed. trainer/planner.py does the counting.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from fulmen.launch.hydra_main import run_hydra
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.memory import CONTEXT_BYTES, FRAGMENTATION, GIB
from fulmen.trainer.planner import (
    GPUS,
    Assumptions,
    Plan,
    describe,
    make_plan,
    search,
    suggest,
)


@dataclass
class PlanConfig(RunConfig, Assumptions):
    """A run's keys, the assumed rates, and those of the planner itself."""

    gpus: int = 1
    """Processes, one a GPU."""
    gpu: str = "h100"
    """h100, h200, h800, h20 or a100 (80 GB)."""
    format: str = "text"
    """text or json."""
    search: bool = False
    """Also look for the fastest meshes that fit."""


def plan(config: PlanConfig) -> None:
    """Print the plan of a configuration."""
    if config.gpus < 1:
        raise ValueError(f"gpus={config.gpus}: must be at least 1")
    if config.gpu not in GPUS:
        raise ValueError(f"gpu={config.gpu}: must be one of {', '.join(GPUS)}")
    if config.format not in ("text", "json"):
        raise ValueError(f"format={config.format}: must be text or json")
    check_config(config, config.gpus)
    gpu = GPUS[config.gpu]
    names = [field.name for field in dataclasses.fields(Assumptions)]
    assume = Assumptions(**{name: getattr(config, name) for name in names})
    for name, value in vars(assume).items():
        if value <= 0 and name != "host_ms_per_layer" and name != "hidden_share":
            raise ValueError(f"{name}={value}: must be above 0")
    made = make_plan(config, config.gpus, gpu, assume)
    facts = describe(made) | {"gpu": config.gpu}
    facts["assumptions"] = vars(assume) | dataclasses.asdict(gpu)
    changes = None if made.fits else suggest(config, config.gpus, gpu.usable_gib)
    facts["changes"] = [f"{key}={value}" for key, value in changes or []]
    if config.search:
        facts["search"] = [_found(one) for one in search(config, config.gpus, gpu, assume)]
    if config.format == "json":
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console(), changes is None and not made.fits)


def _found(made: Plan) -> dict[str, Any]:
    facts = describe(made)
    parallel = facts["parallel"]
    keys = ("cp", "ep", "etp", "zero_stage", "expert_zero_stage")
    shown = {f"parallel.{key}": parallel[key] for key in keys}
    shown["memory_gib"] = facts["memory_gib_per_rank"]["total"]
    return shown | {key: facts[key] for key in ("step_time_s", "mfu", "tokens_per_day", "days")}


def show(facts: dict[str, Any], console: Console, hopeless: bool) -> None:
    """The same as text."""
    rank = facts["params_per_rank"]
    console.print(f"{facts['gpus']} x {facts['gpu']}: {_mesh(facts)}", highlight=False)
    console.print(
        f"parameters {facts['total_params']:,}, active {facts['active_params']:,}; on a rank "
        f"{rank['dense']:,} dense, {rank['experts']:,} of experts",
        highlight=False,
    )
    memory = dict(facts["memory_gib_per_rank"])
    total = memory.pop("total")
    table = Table("GiB of a rank at its peak", "", title=None)
    for name, size in memory.items():
        table.add_row(name, f"{size:.2f}")
    table.add_row("total", f"{total:.2f} of {facts['usable_gib']}")
    console.print(table)
    _show_step(facts, console)
    _show_schedule(facts, console)
    if "search" in facts:
        _show_search(facts["search"], console)
    _show_assumptions(facts["assumptions"], console)
    if facts["fits"]:
        console.print(f"it fits: {total:.1f} of {facts['usable_gib']} GiB", highlight=False)
    elif hopeless:
        console.print("it does not fit, nor with any change that was tried: take more GPUs")
    else:
        console.print(f"it does not fit; it would with {' '.join(facts['changes'])}")


def _mesh(facts: dict[str, Any]) -> str:
    parallel = facts["parallel"]
    stage = parallel["zero_stage"]
    experts = parallel["expert_zero_stage"]
    dp = facts["gpus"] // parallel["cp"]
    edp = facts["gpus"] // parallel["ep"] // parallel["etp"]
    return (
        f"dp {dp} x cp {parallel['cp']} = edp {edp} x ep {parallel['ep']} x etp {parallel['etp']}, "
        f"ZeRO {stage}, experts {stage if experts is None else experts}"
    )


def _show_step(facts: dict[str, Any], console: Console) -> None:
    table = Table("a step", "TFLOP a GPU", "GB to a rank", "s", title=None)
    tokens = facts["stages"][0]["batches"][0]["global_batch_tokens"] / facts["gpus"]
    for kind, flops in facts["flops_by_kind_per_token"].items():
        table.add_row(kind, f"{flops * tokens / 1e12:.2f}", "", "")
    table.add_section()
    for kind, seconds in facts["step_work_s"].items():
        table.add_row(f"work: {kind}", "", "", f"{seconds:.4f}")
    table.add_section()
    for kind, size in facts["step_exchange_gb_per_rank"].items():
        table.add_row(f"sent: {kind}", "", f"{size:.2f}", f"{facts['step_exchange_s'][kind]:.4f}")
    table.add_section()
    table.add_row("host, at least", "", "", f"{facts['step_host_s']:.4f}")
    table.add_row("step", "", "", f"{facts['step_time_s']:.4f}")
    console.print(table)


def _show_schedule(facts: dict[str, Any], console: Console) -> None:
    for stage in facts["stages"]:
        table = Table("from tokens", "batch", "steps", "s a step", "MFU", "tokens a day", "days")
        for row in stage["batches"]:
            table.add_row(
                f"{row['from_tokens']:.3g}",
                f"{row['global_batch_tokens']:,}",
                f"{row['steps']:,}",
                f"{row['step_time_s']:.3f}",
                _share(row["mfu"]),
                f"{row['tokens_per_day']:.3g}",
                f"{row['days']:.2f}",
            )
        console.print(table)
        console.print(
            f"{stage['name']}: {stage['tokens']:.4g} tokens in rows of {stage['seq_len']}, "
            f"{stage['days']:.2f} days, {stage['gpu_hours']:,.0f} GPU-hours",
            highlight=False,
        )


def _share(mfu: float | None) -> str:
    return "-" if mfu is None else f"{mfu:.1%}"


def _show_search(found: list[dict[str, Any]], console: Console) -> None:
    if not found:
        console.print("search: no mesh fits")
        return
    table = Table("cp", "ep", "etp", "ZeRO", "experts", "GiB", "s a step", "MFU", "days")
    for row in found:
        mesh = [str(value) for key, value in row.items() if key.startswith("parallel.")]
        times = [f"{row['memory_gib']:.1f}", f"{row['step_time_s']:.3f}", _share(row["mfu"])]
        table.add_row(*mesh, *times, f"{row['days']:.2f}")
    console.print(table)


def _show_assumptions(assumptions: dict[str, float], console: Console) -> None:
    text = ", ".join(f"{name}={value:g}" for name, value in assumptions.items())
    console.print(f"assumed: {text}", highlight=False)
    console.print(
        "assumed besides: one document fills each row; experts get equal shares and drop nothing; "
        "ZeRO's exchanges run beside work up to hidden_share of it, all others beside none; of "
        f"memory a margin of {CONTEXT_BYTES / GIB:g} GiB for CUDA and NCCL and {FRAGMENTATION:.0%} "
        "for fragmentation. docs/planner.md says more.",
        highlight=False,
    )


def main() -> None:
    """Entry point."""
    run_hydra(plan, "plan", PlanConfig, not_needed=("data.sources.",))


if __name__ == "__main__":
    main()
