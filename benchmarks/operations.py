"""What operating a run costs on this machine: resuming, saving, looking at the nodes first.

    python benchmarks/operations.py [recipe=text01_tiny] [processes=2] [KEY=VALUE ...]

Trains 2 x save_every + 2 steps with a save each save_every steps, then resumes the run twice
(`resumes`) as a job does, by torchrun, and prints a table and one JSON line; `output=FILE` writes
that line too. Keys of a run may follow. The checkpoint was just written, so it is read from the
page cache; kernels that are compiled are in their caches too.

- `resume_s`: from the start of torchrun to the row of the first new step on rank 0, and its parts,
  which sum to it. Whatever runs inside a part and is a part itself counts there alone.
- `checkpoint_stall_s`: of each save, the first of which also allocates the host's buffers. Its
  share is of the time of `checkpoint.every_steps` steps of this recipe, the buffers left out.
- `write_s`: of a save, in the background. `step_while_writing_s`: of the step that it began in.
- `preflight_s`: launch/preflight.py as a whole, and by itself from the meeting to the verdict.
"""

import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

BEGAN = time.time()
ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    "recipe": "text01_tiny",
    "processes": 0,  # all GPUs, or two
    "save_every": 20,
    "resumes": 2,
    "preflight": True,
    "folder": None,  # for the run; None = a temporary one
    "output": None,
}
MARKS = "FULMEN_OPERATIONS_MARKS"
"""The file that rank 0 writes its times to, in the environment of its processes."""
PARTS = (
    "torchrun",
    "imports and configuration",
    "rendezvous",
    "choice and verification of the checkpoint",
    "model, sharded",
    "load of the checkpoint",
    "loader",
    "first step",
    "rest",
)


DOORS = {
    "run.find_start": "choice and verification of the checkpoint",
    "run.Trainer": "model, sharded",
    "loop.Trainer._resume": "load of the checkpoint",
    "loop.open_loader": "loader",
    "loop.Trainer.fit": "first step",
}
"""What counts as which part, by where it is called from below fulmen.trainer."""


def find(name: str) -> Any:
    """A module below fulmen.trainer, or a class in it."""
    module, _, inside = name.partition(".")
    found = importlib.import_module(f"fulmen.trainer.{module}")
    return getattr(found, inside) if inside else found


class Clock:
    """Time by part; a part inside of another one is taken out of it."""

    def __init__(self, began: float) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.parts["torchrun"] = BEGAN - began
        self._open, self._since = ["imports and configuration"], BEGAN

    def _switch(self) -> None:
        now = time.time()
        self.parts[self._open[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        self._switch()
        self._open.append(part)

    def leave(self) -> None:
        self._switch()
        self._open.pop()

    def go_on(self, part: str) -> None:
        """What is outside of all others is this from now on."""
        self._switch()
        self._open[0] = part

    def time(self, owner: Any, name: str, part: str) -> None:
        """Let a function count as a part."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                return inner(*arguments, **named)
            finally:
                self.leave()

        setattr(owner, name, timed)


def train() -> None:
    """One process of torchrun's: launch/pretrain.py, with a clock at its doors."""
    file, began = os.environ[MARKS].split("@")
    clock = Clock(float(began))
    from fulmen.launch import pretrain
    from fulmen.parallel import rendezvous
    from fulmen.trainer import metrics

    join_world, log_step = rendezvous.join_world, metrics.MetricsLogger.log_step

    def joined(*arguments: Any, **named: Any) -> Any:
        clock.go_on("rest")
        clock.enter("rendezvous")
        device = join_world(*arguments, **named)
        clock.leave()
        return device

    def logged(logger: Any, row: Any) -> None:
        log_step(logger, row)
        if not Path(file).exists():
            clock.leave()
            Path(file).write_text(json.dumps(clock.parts))

    rendezvous.join_world = joined
    metrics.MetricsLogger.log_step = logged  # type: ignore[method-assign]
    for door, part in DOORS.items():
        *way, name = door.split(".")
        clock.time(find(".".join(way)), name, part)
    pretrain.main()


def start(options: dict[str, Any], steps: int, words: list[str], folder: Path) -> dict[str, float]:
    """Train up to `steps`; the parts of the time to the first row."""
    marks = folder / f"marks_{steps}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options['processes']}", str(Path(__file__).resolve()), "train"]
    command += [f"recipe={options['recipe']}", f"run_root={folder}", "run_id=run"]
    command += ["log.every_steps=1", f"checkpoint.every_steps={options['save_every']}"]
    command += ["checkpoint.keep=1", "evaluation.every_steps=null", *words]
    command += [f"trainer.max_steps={steps}"]
    environment = os.environ | {MARKS: f"{marks}@{time.time()}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        sys.exit(said[0] if said else f"error: the run failed:\n{done.stderr[-6000:]}")
    return json.loads(marks.read_text())


def read_default(recipe: str, words: list[str]) -> dict[str, int]:
    """The interval between saves and the batch that the recipe has."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), f"recipe={recipe}", *words]
    done = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    of_config = r"^checkpoint:\n(?:  .*\n)*?  every_steps: (\d+)"
    every = re.search(of_config, done.stdout, re.MULTILINE)
    if every is None:
        sys.exit(f"error: recipe={recipe} has no checkpoint.every_steps")
    return {"every_steps": int(every.group(1))}


def measure_preflight(folder: Path, processes: int) -> dict[str, float]:
    """Seconds of launch/preflight.py, and its own count."""
    began = time.time()
    command = [sys.executable, str(ROOT / "launch" / "preflight.py"), f"folder={folder}"]
    command += [f"processes={processes}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"preflight: .*, ([\d.]+) s", done.stdout)
    if done.returncode or found is None:
        sys.exit(f"error: the preflight failed:\n{done.stdout}{done.stderr[-3000:]}")
    print(done.stdout.strip(), file=sys.stderr)
    return {"command": time.time() - began, "to the verdict": float(found.group(1))}


def describe_saves(folder: Path, save_every: int, default: dict[str, int]) -> dict[str, Any]:
    """From the rows, and from when the newest checkpoint's first and last file were written."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = [row for row in rows if row["step"] > 1 and row["step"] % save_every == 1]
    stalls = [row["checkpoint_stall_s"] for row in after]
    quiet = [row["step_time_s"] for row in rows[2:] if row["step"] % save_every > save_every / 2]
    step_s = statistics.median(quiet)
    newest = (folder / "checkpoints" / "latest").resolve()
    times = [(newest / name).stat().st_mtime for name in ("trainer_state.json", "manifest.json")]
    every = default["every_steps"]
    return {
        "checkpoint_gib": sum(file.stat().st_size for file in newest.iterdir()) / 2**30,
        "step_s": step_s,
        "step_while_writing_s": statistics.median(row["step_time_s"] for row in after),
        "checkpoint_stall_s": stalls,
        "every_steps": every,
        "stall_share": stalls[-1] / (every * step_s),
        "write_s": times[1] - times[0],
    }


def versions() -> dict[str, Any]:
    """Of the machine and what runs on it."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": version("torch"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "gpus": gpus,
    }


def show(found: dict[str, Any]) -> str:
    """The table."""
    lines = ["seconds of each resume, from torchrun to the first new row"]
    for part in (*PARTS, "in all"):
        lines.append(f"  {part:46} " + " ".join(f"{one[part]:8.2f}" for one in found["resume_s"]))
    saves = found["saves"]
    stalls = ", ".join(f"{stall:.3f}" for stall in saves["checkpoint_stall_s"])
    lines += [
        f"checkpoint of {saves['checkpoint_gib']:.3f} GiB: held up {stalls} s, "
        f"written in {saves['write_s']:.2f} s",
        f"step {saves['step_s']:.3f} s, while writing {saves['step_while_writing_s']:.3f} s",
        f"stall at checkpoint.every_steps={saves['every_steps']}: {saves['stall_share']:.3%}",
    ]
    for name, seconds in found.get("preflight_s", {}).items():
        lines.append(f"preflight, {name}: {seconds:.1f} s")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        train()
        return
    import yaml

    options: dict[str, Any] = dict(DEFAULTS)
    words = []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key in DEFAULTS:
            options[key] = yaml.safe_load(value)
        else:
            words.append(word)
    machine = versions()
    options["processes"] = options["processes"] or len(machine["gpus"]) or 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    default = read_default(options["recipe"], words)
    folder = Path(options["folder"] or tempfile.mkdtemp(prefix="operations_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        steps = 2 * options["save_every"] + 2
        start(options, steps, words, folder)
        run = folder / options["recipe"] / "run"
        found = {"recipe": options["recipe"], "processes": options["processes"], **machine}
        found["saves"] = describe_saves(run, options["save_every"], default)
        found["resume_s"] = []
        for more in range(1, options["resumes"] + 1):
            parts = start(options, steps + more, words, folder)
            found["resume_s"].append({**parts, "in all": sum(parts.values())})
        if options["preflight"]:
            found["preflight_s"] = measure_preflight(folder, options["processes"])
    finally:
        if options["folder"] is None:
            shutil.rmtree(folder)
    print(show(found))
    print(json.dumps(found))
    if options["output"]:
        Path(options["output"]).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
