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
from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import CONTEXT_BYTES, FRAGMENTATION, GIB
from fulmen.trainer.planner import (
    GPUS,
    Assumptions,
    Gpu,
    StagePlan,
    describe,
    describe_stage,
    make_plan,
)
from fulmen.trainer.planner_search import Change, search, suggest
from fulmen.trainer.stages import check_run, list_stages


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
    check_run(config, config.gpus, all_here=True)
    gpu = GPUS[config.gpu]
    names = [field.name for field in dataclasses.fields(Assumptions)]
    assume = Assumptions(**{name: getattr(config, name) for name in names})
    for name, value in vars(assume).items():
        if value <= 0 and name != "host_ms_per_layer" and name != "hidden_share":
            raise ValueError(f"{name}={value}: must be above 0")
    made = make_plan(config, config.gpus, gpu, assume)
    facts = describe(made) | {"gpu": config.gpu}
    facts["assumptions"] = vars(assume) | dataclasses.asdict(gpu)
    facts["changes"] = []
    for stage, one, entry in zip(list_stages(config), made.stages, facts["stages"], strict=True):
        if not one.fits:
            entry["changes"] = suggest_for(one, gpu)
            facts["changes"] += entry["changes"]
        if config.search:
            entry["search"] = [_found(o) for o in search(stage, config.gpus, gpu, assume)]
    if config.format == "json":
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console())


def suggest_for(stage: StagePlan, gpu: Gpu) -> list[str]:
    """Overrides with which a stage fits; none if nothing that was tried helps."""
    changes = suggest(stage.config, stage.gpus, gpu.usable_gib) or []
    return [_override(stage.name, change) for change in changes]


def _override(stage: str, change: Change) -> str:
    key, value = change
    if not stage:
        return f"{key}={value}"
    # A stage has this one key beside its group.
    own = "micro_batch_tokens" if key == "trainer.micro_batch_tokens" else key
    return f"stages.{stage}.{own}={value}"


def _found(made: StagePlan) -> dict[str, Any]:
    facts = describe_stage(made)
    parallel = facts["parallel"]
    keys = ("cp", "ep", "etp", "zero_stage", "expert_zero_stage")
    shown = {f"parallel.{key}": parallel[key] for key in keys}
    shown["memory_gib"] = facts["memory_gib_per_rank"]["total"]
    return shown | {key: facts[key] for key in ("step_time_s", "mfu", "tokens_per_day", "days")}


def show(facts: dict[str, Any], console: Console) -> None:
    """The same as text."""
    rank, stages = facts["params_per_rank"], facts["stages"]
    console.print(f"{facts['gpus']} x {facts['gpu']}", highlight=False)
    for stage in stages:
        console.print(f"{stage['name']}: {_mesh(facts['gpus'], stage)}", highlight=False)
    console.print(
        f"parameters {facts['total_params']:,}, active {facts['active_params']:,}; on a rank "
        f"{rank['dense']:,} dense, {rank['experts']:,} of experts",
        highlight=False,
    )
    table = Table("GiB of a rank at its peak", *(stage["name"] for stage in stages))
    for name in [*list(stages[0]["memory_gib_per_rank"])[1:], "total"]:
        table.add_row(name, *(f"{stage['memory_gib_per_rank'][name]:.2f}" for stage in stages))
    if any(stage["host_gib_per_rank"] for stage in stages):
        table.add_section()
        table.add_row("in host memory", *(f"{one['host_gib_per_rank']:.2f}" for one in stages))
    console.print(table)
    _show_step(facts, console)
    for stage in stages:
        _show_schedule(stage, console)
    if len(stages) > 1:
        console.print(
            f"in all: {facts['tokens']:.4g} tokens, {facts['days']:.2f} days, "
            f"{facts['gpu_hours']:,.0f} GPU-hours",
            highlight=False,
        )
    _show_assumptions(facts["assumptions"], console)
    for stage in stages:
        _show_verdict(stage, facts["usable_gib"], console)


def _show_verdict(stage: dict[str, Any], usable_gib: float, console: Console) -> None:
    head = "" if stage["name"] == "schedule" else f"{stage['name']}: "
    total = stage["memory_gib_per_rank"]["total"]
    if stage["fits"]:
        verdict = f"it fits: {total:.1f} of {usable_gib} GiB"
    elif stage["changes"]:
        verdict = f"it does not fit; it would with {' '.join(stage['changes'])}"
    else:
        verdict = "it does not fit, nor with any change that was tried: take more GPUs"
    console.print(head + verdict, highlight=False, soft_wrap=True)


def _mesh(gpus: int, stage: dict[str, Any]) -> str:
    parallel = stage["parallel"]
    dense = parallel["zero_stage"]
    experts = parallel["expert_zero_stage"]
    dp = gpus // parallel["cp"]
    edp = gpus // parallel["ep"] // parallel["etp"]
    return (
        f"rows of {stage['seq_len']:,}, RoPE base {stage['rope_theta']:g}, dp {dp} x "
        f"cp {parallel['cp']} = edp {edp} x ep {parallel['ep']} x etp {parallel['etp']}, "
        f"ZeRO {dense}, experts {dense if experts is None else experts}, "
        f"objective {stage['objective']}"
    )


def _show_step(facts: dict[str, Any], console: Console) -> None:
    stages = facts["stages"]
    table = Table("a step of the first batch size", *(stage["name"] for stage in stages))
    tokens = [stage["global_batch_tokens"] / facts["gpus"] for stage in stages]
    for kind in stages[0]["flops_by_kind_per_token"]:
        flops = (stage["flops_by_kind_per_token"][kind] for stage in stages)
        pairs = zip(flops, tokens, strict=True)
        table.add_row(f"{kind}, TFLOP a GPU", *(f"{f * t / 1e12:.2f}" for f, t in pairs))
    table.add_section()
    for kind in stages[0]["step_work_s"]:
        table.add_row(f"work: {kind}, s", *(f"{one['step_work_s'][kind]:.4f}" for one in stages))
    table.add_section()
    for kind in dict.fromkeys(kind for stage in stages for kind in stage["step_exchange_s"]):
        table.add_row(f"sent: {kind}, GB and s", *(_sent(stage, kind) for stage in stages))
    table.add_section()
    table.add_row("host, at least, s", *(f"{stage['step_host_s']:.4f}" for stage in stages))
    table.add_row("step, s", *(f"{stage['step_time_s']:.4f}" for stage in stages))
    console.print(table)


def _sent(stage: dict[str, Any], kind: str) -> str:
    if kind not in stage["step_exchange_s"]:
        return "-"
    return f"{stage['step_exchange_gb_per_rank'][kind]:.2f}  {stage['step_exchange_s'][kind]:.4f}"


def _show_schedule(stage: dict[str, Any], console: Console) -> None:
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
    if "search" in stage:
        _show_search(stage["search"], console)


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
    run_hydra(plan, "plan", PlanConfig, not_needed=("data.sources.", "evaluation.zero_shot."))


if __name__ == "__main__":
    main()
