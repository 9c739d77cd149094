"""Submit to SLURM: `submit.py recipe=text01 cluster=FILE slurm.nodes=256 slurm.time=48:00:00`.

Any key of a run may follow. What the job needs is written to `RUN/slurm/<number>/`: the script
(`job.sh`, from launch/job.sh), a copy of the code, the resolved configuration, the plan. With
dry_run=true that is all. docs/operations.md goes through it.
"""

import datetime
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fulmen.launch.cluster import ClusterConfig, read_cluster
from fulmen.launch.hydra_main import explain, run_hydra
from fulmen.launch.snapshot import snapshot
from fulmen.launch.sweep import Point, compose_point, list_points
from fulmen.trainer.config import RunConfig, check_run_folder, to_dataclass
from fulmen.trainer.preflight_config import PreflightConfig
from fulmen.trainer.stages import check_run, fault_of, list_stages

if TYPE_CHECKING:
    from fulmen.trainer.planner import StagePlan

ROOT = Path(__file__).resolve().parent.parent
_OWN_KEYS = r"[+~]*(slurm\.|cluster=|dry_run=|recipe=|run_root=|run_id=)"
_TIME = r"(\d+-)?\d+(:\d\d){0,2}"
_SAVE_S = 60
_LIMITS = ("meeting_s", "exchange_s")
_PREFLIGHT_SPARE_S = 120
"""For what a preflight does besides, and the nodes' starts."""
"""Taken for a save, when the notice before the time limit is checked."""


@dataclass
class SlurmConfig:
    """The `slurm` group: the job."""

    nodes: int = MISSING
    time: str = MISSING
    """Time limit of a job, as SLURM writes it: 48:00:00 or 2-00:00:00."""
    notice_s: int = 300
    """The run is asked to stop so many seconds before it; two steps, an evaluation and a save have
    to fit in."""
    requeues: int = 20
    """Times that the job is requeued, or replaced by one without bad nodes."""
    retries: int = 3
    """Starts after failures in one job, if nothing is saved between them."""
    chain: int = 1
    """Jobs of the run, one after the other; above 1 they are not requeued at the time limit."""
    dependency: str | None = None
    """A further one, such as afterok:1234; jobs of the same run never run side by side anyway."""
    exclude: str | None = None
    """Nodes to leave out from the start."""
    preflight: bool = True
    """Look at all nodes before each start."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Lists of values by key: a run for each combination, all of them one array of jobs."""
    sweep_at_once: int | None = None
    """Runs of a sweep at the same time, at most; null = as many as find nodes."""
    leave_out_bad: bool = True
    """Go on without nodes that the preflight calls bad; else the job ends."""


@dataclass
class SubmitConfig(RunConfig):
    """A run's keys, and those of the job."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    cluster: str = MISSING
    """YAML file with the facts of the cluster; recipes/clusters/ has examples."""
    dry_run: bool = False
    """Write everything, submit nothing."""


@dataclass(frozen=True)
class Run:
    """One run of a submission, checked."""

    run_id: str
    folder: Path
    config: SubmitConfig
    point: Point | None
    """Of a sweep."""
    planned: str
    facts: dict[str, Any] | None
    """The plan."""


def submit(config: SubmitConfig) -> None:
    """Check, write, and submit."""
    cluster = read_cluster(config.cluster)
    check_slurm(config.slurm)
    choices = HydraConfig.get()
    recipe = choices.runtime.choices["recipe"]
    run_id = config.run_id or f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.run_root).absolute() / recipe / run_id
    runs = check_runs(config, cluster, folder)
    if any(run.config.checkpoint.resume == "never" for run in runs):
        raise ValueError(
            "checkpoint.resume=never: a job that is begun again repeats its command line, and "
            "would refuse what it has saved itself: leave it out; a new run_id has no "
            "checkpoints to begin from"
        )
    for run in runs:
        check_run_folder(run.folder)
    here = _next_folder(folder / "slurm")
    searched = [entry for entry in choices.overrides.hydra if entry.startswith("hydra.searchpath=")]
    copied = snapshot(ROOT, here / "code", _own_recipes(searched))
    arguments = [
        f"recipe={recipe}",
        *([] if config.slurm.sweep else [f"run_id={run_id}"]),
        f"run_root={Path(config.run_root).absolute()}",
    ]
    arguments += [word for word in choices.overrides.task if not re.match(_OWN_KEYS, word)]
    for run in runs:
        seen = _seen(here, run)
        seen.mkdir(exist_ok=True)
        if run.facts is not None:
            (seen / "plan.json").write_text(json.dumps(run.facts, indent=1))
        (seen / "config.yaml").write_text(_resolved(run.config, run.run_id))
    (here / "environment.sh").write_text(render_environment(cluster, here))
    (here / "job.sh").write_text(render_job(config.slurm, cluster, runs, here, arguments))
    print(f"{recipe}/{run_id}: {config.slurm.nodes} node(s) x {cluster.processes} process(es)")
    print(f"code: {copied}")
    for number, run in enumerate(runs):
        name = f" of task {number}, {run.run_id}" if run.point else ""
        print(f"plan{name}: {run.planned}")
    print(f"script: {here / 'job.sh'}")
    if config.dry_run:
        print("dry_run=true: nothing is submitted")
        return
    for line in send(config.slurm, runs, here):
        print(line)


def check_runs(config: SubmitConfig, cluster: ClusterConfig, folder: Path) -> list[Run]:
    """The submission's run, or those of its sweep, each checked; `ValueError` if one cannot be.

    `folder` is the run's; a point's has the point's name behind it.
    """
    world_size = config.slurm.nodes * cluster.processes
    if not config.slurm.sweep:
        check_run(config, world_size)
        return [Run(folder.name, folder, config, None, *plan(config, cluster, world_size))]
    chosen = HydraConfig.get().overrides
    runs = []
    for point in list_points(config.slurm.sweep, chosen.task, _OWN_KEYS):
        searched = [entry for entry in chosen.hydra if entry.startswith("hydra.searchpath=")]
        own = f"{folder.name}-{point.name}"
        try:
            one = to_dataclass(compose_point(point, [*searched, *chosen.task]), SubmitConfig)
            check_run(one, world_size)
            planned = plan(one, cluster, world_size)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"slurm.sweep: {explain(error, SubmitConfig)}") from None
        except ValueError as error:
            raise ValueError(f"{' '.join(point.words)}: {error}") from None
        runs.append(Run(own, folder.with_name(own), one, point, *planned))
    return runs


def check_slurm(slurm: SlurmConfig) -> None:
    """Raise `ValueError`, naming the key."""
    if not re.fullmatch(_TIME, slurm.time):
        raise ValueError(f"slurm.time={slurm.time}: must look like 48:00:00 or 2-00:00:00")
    least_of = {"nodes": 1, "notice_s": 1, "requeues": 0, "retries": 0, "chain": 1}
    for name, least in (least_of | {"sweep_at_once": 1}).items():
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise ValueError(f"slurm.{name}={value}: must be at least {least}")
    if slurm.sweep_at_once is not None and not slurm.sweep:
        raise ValueError(f"slurm.sweep_at_once={slurm.sweep_at_once}: there is no slurm.sweep")
    # SLURM may signal up to a minute early, and what has begun must be worth it.
    if seconds_of(slurm.time) < slurm.notice_s + 60:
        raise ValueError(
            f"slurm.time={slurm.time} leaves no time before slurm.notice_s={slurm.notice_s}: "
            "raise the one or lower the other"
        )


def seconds_of(time: str) -> int:
    """Of a time limit as SLURM reads it: minutes, minutes:seconds, or hours:minutes:seconds;
    days-hours, and so on."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = [3600, 60, 1] if days or len(parts) == 3 else [60, 1]
    return int(days or 0) * 86_400 + sum(p * u for p, u in zip(parts, units, strict=False))


def plan(
    config: SubmitConfig, cluster: ClusterConfig, world_size: int
) -> tuple[str, dict[str, Any] | None]:
    """What the planner says, as a line and whole; `ValueError` if the run cannot fit."""
    if cluster.gpu is None or not cluster.gpus_per_node:
        return "left out: the cluster's file names no kind of gpu", None
    from fulmen.trainer.planner import GPUS, Assumptions, describe, make_plan

    if cluster.gpu not in GPUS:
        raise ValueError(f"{config.cluster}: gpu={cluster.gpu}: must be one of {', '.join(GPUS)}")
    made = make_plan(config, world_size, GPUS[cluster.gpu], Assumptions())
    facts = describe(made)
    misfits = [] if config.trainer.allow_misfit else [s for s in made.stages if not s.fits]
    if misfits and misfits[0] is made.stages[0]:
        raise ValueError(
            f"{_misfit(misfits[0], cluster.gpu)}: launch/plan.py with the same keys, "
            f"gpus={world_size} and gpu={cluster.gpu} says what to change, or set "
            "trainer.allow_misfit=true"
        )
    slowest = max(part.step.seconds for stage in made.stages for part in stage.intervals)
    if config.slurm.notice_s < 2 * slowest + _SAVE_S:
        raise ValueError(
            f"slurm.notice_s={config.slurm.notice_s}: a step takes {slowest:.0f} s, and two of "
            f"them and a save have to fit in: at least {2 * slowest + _SAVE_S:.0f}"
        )
    peak = max(stage.memory_gib for stage in made.stages)
    line = (
        f"{peak:.1f} of {facts['usable_gib']} GiB, {facts['step_time_s']:.2f} s a step, "
        f"{facts['tokens']:.4g} tokens in {facts['days']:.2f} days"
    )
    ends = [_misfit(stage, cluster.gpu) for stage in misfits]
    ends += [fault for stage in list_stages(config) if (fault := fault_of(stage, world_size))]
    if ends:
        line += f"; the job will end before it comes to any of these: {'; '.join(ends)}"
    return line, facts


def _misfit(stage: "StagePlan", gpu: str) -> str:
    name = f"stage {stage.name}" if stage.name else "the run"
    return f"{name} needs {stage.memory_gib:.1f} GiB on a rank, a {gpu} has {stage.usable_gib}"


def render_job(
    slurm: SlurmConfig,
    cluster: ClusterConfig,
    runs: Sequence[Run],
    here: Path,
    arguments: list[str],
) -> str:
    """The batch script: options, the runs' values, and launch/job.sh."""
    is_sweep = runs[0].point is not None
    # Two jobs of one run would write to one folder. Tasks of an array have one name, and would wait
    # for each other.
    dependencies = [*filter(None, ["" if is_sweep else "singleton", slurm.dependency])]
    cpus = cluster.cpus_per_node
    gpus = cluster.gpu_request or f"gpus-per-node={cluster.gpus_per_node}"
    options: dict[str, Any] = {
        "job-name": _job_name(here),
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cpus,
        "time": slurm.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": cluster.memory,
        "exclude": slurm.exclude,
        "signal": f"B:USR1@{slurm.notice_s}",
        "array": _indices(slurm, runs) if is_sweep else None,
        "dependency": ",".join(dependencies) or None,
        "output": here / ("job-%A_%a.out" if is_sweep else "job-%j.out"),
        "open-mode": "append",
    }
    flags = ["requeue", *(["exclusive"] if cluster.exclusive else [])]
    flags += [gpus] if cluster.gpus_per_node else []
    flags += cluster.sbatch
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += [f"#SBATCH --{flag}" for flag in flags]
    values: dict[str, Any] = {
        "HERE": here,
        "CODE": here / "code",
        "PYTHON": cluster.python or sys.executable,
        "NODES": slurm.nodes,
        "PROCESSES": cluster.processes,
        "REQUEUES": slurm.requeues,
        "RETRIES": slurm.retries,
        "CHAIN": slurm.chain,
        "EXCLUDE": slurm.exclude or "",
        "PREFLIGHT": int(slurm.preflight),
        "PREFLIGHT_WAIT": _preflight_limit(cluster),
        "LEAVE_OUT": int(slurm.leave_out_bad),
        "INTERFACE": cluster.interface or "",
    }
    lines += ["", f"# Written by launch/submit.py at {datetime.datetime.now():%Y-%m-%d %H:%M:%S}."]
    lines += [f"{key}={shlex.quote(str(value))}" for key, value in values.items()]
    if cpus is not None:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over")
    checks = {"gpus": cluster.gpus_per_node, "cache_folder": cluster.cache_folder}
    checks |= cluster.preflight
    given = [f"{key}={value}" for key, value in checks.items() if value is not None]
    lines.append(_array("PREFLIGHT_ARGUMENTS", given))
    lines.append(_array("ARGUMENTS", arguments))
    lines += _of_runs(runs, here)
    return "\n".join(lines) + "\n" + (ROOT / "launch" / "job.sh").read_text()


def _preflight_limit(cluster: ClusterConfig) -> int:
    """Seconds after which every node has ended its preflight that can."""
    limits = (cluster.preflight.get(key, getattr(PreflightConfig, key)) for key in _LIMITS)
    meeting_s, exchange_s = map(float, limits)
    return math.ceil(meeting_s + 2 * exchange_s) + _PREFLIGHT_SPARE_S


def _of_runs(runs: Sequence[Run], here: Path) -> list[str]:
    """The script's lines about its run, or about that of each task."""
    lines = []
    for number, run in enumerate(runs):
        given = {"RUN": run.folder, "SEEN": _seen(here, run)}
        line = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in given.items())
        if run.point is None:
            return [line]
        words = [f"run_id={run.run_id}", *run.point.words]
        added = " ".join(shlex.quote(word) for word in words)
        lines.append(f"  {number}) {line} ARGUMENTS+=({added}) ;;")
    return ["case $SLURM_ARRAY_TASK_ID in", *lines, "esac"]


def _indices(slurm: SlurmConfig, runs: Sequence[Run]) -> str:
    most = f"%{slurm.sweep_at_once}" if slurm.sweep_at_once is not None else ""
    return f"0-{len(runs) - 1}{most}"


def _job_name(here: Path) -> str:
    """By RUN/slurm/NUMBER."""
    folder = here.parent.parent
    return f"{folder.parent.name}-{folder.name}"


def _seen(here: Path, run: Run) -> Path:
    """What is known of a run before it begins."""
    return here / run.point.name if run.point else here


def render_environment(cluster: ClusterConfig, here: Path) -> str:
    """What the job and each node source first."""
    variables = {"PYTHONPATH": str(here / "code" / ".rooms"), "PYTHONUNBUFFERED": "1"}
    if cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface}
        variables |= {"GLOO_SOCKET_IFNAME": cluster.interface}
    if not cluster.gpus_per_node:
        variables["OMP_NUM_THREADS"] = "1"
    variables |= cluster.environment
    exports = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    if cluster.cache_folder:
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            exports.append(f'export {name}="{cluster.cache_folder}/{name.split("_")[0].lower()}"')
    return "\n".join(["# Sourced by the job and on every node.", *exports, *cluster.setup]) + "\n"


def send(slurm: SlurmConfig, runs: Sequence[Run], here: Path) -> list[str]:
    """Let SLURM look at the script, submit it, and say where to look."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not here: submit where SLURM is, or set dry_run=true")
    script = str(here / "job.sh")
    said = _call("sbatch", "--test-only", script)
    for run in runs:
        for name in ("STOP", "DONE"):  # a submission is the wish to go on
            (run.folder / name).unlink(missing_ok=True)
    is_sweep, jobs = runs[0].point is not None, list[str]()
    # Instead of singleton: those of this sweep that are there, then each after the one before it.
    before = _queued(_job_name(here)) if is_sweep else []
    for _ in range(slurm.chain):
        after = [f"afterany:{job}" for job in before]
        words = [f"--dependency={','.join([*after, *filter(None, [slurm.dependency])])}"]
        jobs.append(
            _call("sbatch", "--parsable", *(words if after else []), script).partition(";")[0]
        )
        before = jobs[-1:] if is_sweep else []
    (here / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    output = f"job-{jobs[0]}_0.out" if is_sweep else f"job-{jobs[0]}.out"
    folder = f"{here.parent.parent}-*" if is_sweep else runs[0].folder
    return [
        f"SLURM: {said.removeprefix('sbatch: ')}",
        f"job {' then '.join(jobs)}" + (f", {len(runs)} tasks" if is_sweep else ""),
        f"look:   squeue -j {','.join(jobs)}; tail -F {here}/{output}",
        f"        {folder}/train.log, metrics.jsonl, report.html",
        f"stop:   touch {folder}/STOP (saves first), or scancel {' '.join(jobs)}",
    ]


def _queued(name: str) -> list[str]:
    """Ids of the user's jobs of a name that wait or run; an array has one."""
    words = ("-h", f"--user={os.geteuid()}", "-n", name, "-o", "%F")
    return list(dict.fromkeys(_call("squeue", *words).split()))


def _call(*command: str) -> str:
    """What a command of SLURM's says; `ValueError` if it refuses."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise ValueError(f"{command[0]} refuses {command[-1]}: {said}")
    return said if "--test-only" in command else done.stdout.strip()


def _array(name: str, words: list[str]) -> str:
    inside = "".join(f"\n  {shlex.quote(word)}" for word in words)
    return f"{name}=({inside}\n)"


def _resolved(config: SubmitConfig, run_id: str) -> str:
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    values["run_id"] = run_id
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _next_folder(parent: Path) -> Path:
    """`parent/1`, or the number after the highest one."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
    folder = parent / f"{max(taken, default=0) + 1}"
    folder.mkdir(parents=True)
    return folder


def _own_recipes(overrides: list[str]) -> list[Path]:
    """The folders of `hydra.searchpath=[file://...]`."""
    found = []
    for entry in overrides:
        for folder in re.findall(r"file://([^,\]]+)", entry):
            found.append(Path(folder.strip("'\" ")))
    return found


def main() -> None:
    """Entry point."""
    run_hydra(submit, "submit", SubmitConfig)


if __name__ == "__main__":
    main()
