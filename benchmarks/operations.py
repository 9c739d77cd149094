"""What operating a run costs on this machine: resuming, saving, looking at the nodes first.

    python benchmarks/operations.py [recipe=text01_tiny] [processes=2] [KEY=VALUE ...]

Trains 2 x save_every + 1 steps with a save each save_every steps, then resumes the run twice
(`resumes`) as a job does, by torchrun, for the last of these steps. Prints each part of a table as
soon as it is known, and one JSON line, which `output=FILE` writes after each part. Keys of a run
may follow. The checkpoint was just written, so it is read from the page cache; kernels that are
compiled are in their caches too. No save waits for the one before it, and none is made at a run's
end. With `write_first=false` the first one only copies to the host: one write less to wait for.

- `resume_s`: from the start of torchrun to the row of the first new step on rank 0, and its parts,
  which sum to it. Whatever runs inside a part and is a part itself counts there alone.
- `checkpoint_stall_s`: of each save, the first of which also allocates the host's buffers. Its
  share is of the time of `checkpoint.every_steps` steps of `batch_tokens`, those of this recipe
  unless `data.global_batch_tokens` is given, the buffers left out.
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

from children import SHOWN, end_at_sigterm, run_child

BEGAN = time.time()
ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    "recipe": "text01_tiny",
    "processes": 0,  # all GPUs, or two
    "save_every": 20,
    "write_first": True,
    "resumes": 2,
    "preflight": True,
    "folder": None,  # for the run; None = a temporary one
    "output": None,
}
MARKS = "FULMEN_OPERATIONS_MARKS"
"""In the environment of the processes of a run: the file that rank 0 writes its times to, when the
run began, the steps after which it saves, and those of them that are written."""
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
    marks = json.loads(os.environ[MARKS])
    file, clock = marks["file"], Clock(marks["began"])
    from fulmen.launch import pretrain
    from fulmen.parallel import rendezvous
    from fulmen.trainer import metrics
    from fulmen.trainer.checkpoint import Checkpointer
    from fulmen.trainer.loop import Trainer

    save, write = Trainer.save, Checkpointer._try_to_write

    def saved(trainer: Any, *arguments: Any) -> None:
        if trainer.step in marks["saves"]:
            trainer.checkpointer.settle()  # not a part of what this save costs
            save(trainer, *arguments)

    def written(checkpointer: Any, step: int, *arguments: Any) -> None:
        if step in marks["writes"]:
            write(checkpointer, step, *arguments)

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
    Trainer.save = saved  # type: ignore[method-assign]
    Checkpointer._try_to_write = written  # type: ignore[method-assign]
    for door, part in DOORS.items():
        *way, name = door.split(".")
        clock.time(find(".".join(way)), name, part)
    pretrain.main()


def start(options: dict[str, Any], number: int, words: list[str], folder: Path) -> dict[str, float]:
    """Train to the last step; the parts of the time to the first row."""
    every = options["save_every"]
    saves = [every, 2 * every]
    file = folder / f"marks_{number}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options['processes']}", str(Path(__file__).resolve()), "train"]
    command += [f"recipe={options['recipe']}", f"run_root={folder}", "run_id=run"]
    command += ["log.every_steps=1", f"checkpoint.every_steps={every}"]
    command += ["checkpoint.keep=1", "evaluation.every_steps=null", *words]
    command += [f"trainer.max_steps={2 * every + 1}"]
    marks = {"file": str(file), "began": time.time(), "saves": saves}
    marks["writes"] = saves if options["write_first"] else saves[1:]
    done = run_child(command, env=os.environ | {MARKS: json.dumps(marks)})
    if done.status:
        errors = [line for line in done.said.splitlines() if line.startswith("error: ")]
        sys.exit(errors[0] if errors else f"error: the run failed:\n{done.said[-SHOWN:]}")
    return json.loads(file.read_text())


def read_default(recipe: str, words: list[str]) -> dict[str, int]:
    """The interval between saves and the batch that the recipe has."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), f"recipe={recipe}", *words]
    done = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())

    def find_number(group: str, key: str) -> int:
        of_config = rf"^{group}:\n(?:  .*\n)*?  {key}: (\d+)"
        found = re.search(of_config, done.stdout, re.MULTILINE)
        if found is None:
            sys.exit(f"error: recipe={recipe} has no {group}.{key}")
        return int(found.group(1))

    return {
        "every_steps": find_number("checkpoint", "every_steps"),
        "batch_tokens": find_number("data", "global_batch_tokens"),
    }


def measure_preflight(folder: Path, processes: int) -> dict[str, float]:
    """Seconds of launch/preflight.py, and its own count."""
    began = time.time()
    command = [sys.executable, str(ROOT / "launch" / "preflight.py"), f"folder={folder}"]
    command += [f"processes={processes}"]
    done = run_child(command)
    found = re.search(r"preflight: .*, ([\d.]+) s", done.said)
    if done.status or found is None:
        sys.exit(f"error: the preflight failed:\n{done.said[-SHOWN:]}")
    print(done.said.strip(), file=sys.stderr)
    return {"command": time.time() - began, "to the verdict": float(found.group(1))}


def describe_saves(
    folder: Path, options: dict[str, Any], default: dict[str, int]
) -> dict[str, Any]:
    """From the rows, and from when the newest checkpoint's first and last file were written."""
    save_every = options["save_every"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = [row for row in rows if row["step"] > 1 and row["step"] % save_every == 1]
    stalls = [row["checkpoint_stall_s"] for row in after]
    # Before the first save: a large checkpoint may be written during all the steps behind it.
    quiet = [row["step_time_s"] for row in rows[2:] if save_every / 2 < row["step"] <= save_every]
    step_s = statistics.median(quiet)
    writing = after if options["write_first"] else after[1:]
    newest = (folder / "checkpoints" / "latest").resolve()
    times = [(newest / name).stat().st_mtime for name in ("trainer_state.json", "manifest.json")]
    return {
        "checkpoint_gib": sum(file.stat().st_size for file in newest.iterdir()) / 2**30,
        "step_s": step_s,
        "step_while_writing_s": statistics.median(row["step_time_s"] for row in writing),
        "checkpoint_stall_s": stalls,
        **default,
        "stall_share": stalls[-1] / (default["every_steps"] * step_s),
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


def show_saves(saves: dict[str, Any]) -> str:
    """Some lines of the table."""
    stalls = ", ".join(f"{stall:.3f}" for stall in saves["checkpoint_stall_s"])
    return (
        f"checkpoint of {saves['checkpoint_gib']:.3f} GiB: held up {stalls} s, "
        f"written in {saves['write_s']:.2f} s\n"
        f"step of {saves['batch_tokens']:,} tokens {saves['step_s']:.3f} s, "
        f"while writing {saves['step_while_writing_s']:.3f} s\n"
        f"stall at checkpoint.every_steps={saves['every_steps']}: {saves['stall_share']:.3%}"
    )


def show_resume(parts: dict[str, float]) -> str:
    """Likewise."""
    lines = ["seconds of a resume, from torchrun to the first new row"]
    return "\n".join([*lines, *(f"  {part:46} {parts[part]:8.2f}" for part in (*PARTS, "in all"))])


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
    end_at_sigterm()
    machine = versions()
    options["processes"] = options["processes"] or len(machine["gpus"]) or 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(options["folder"] or tempfile.mkdtemp(prefix="operations_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = {"recipe": options["recipe"], "processes": options["processes"], **machine}
        measure(options, words, folder, found)
    finally:
        if options["folder"] is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))


def measure(options: dict[str, Any], words: list[str], folder: Path, found: dict[str, Any]) -> None:
    """Put all into `found`; each part is shown and written at once, for the next may not end."""

    def tell(text: str) -> None:
        print(text, flush=True)
        if options["output"]:
            Path(options["output"]).write_text(json.dumps(found) + "\n")

    default = read_default(options["recipe"], words)
    start(options, 0, words, folder)
    run = folder / options["recipe"] / "run"
    found["saves"] = describe_saves(run, options, default)
    tell(show_saves(found["saves"]))
    found["resume_s"] = []
    for number in range(1, options["resumes"] + 1):
        parts = start(options, number, words, folder)
        found["resume_s"].append({**parts, "in all": sum(parts.values())})
        tell(show_resume(found["resume_s"][-1]))
    if options["preflight"]:
        found["preflight_s"] = measure_preflight(folder, options["processes"])
        tell(
            "\n".join(
                f"preflight, {name}: {seconds:.1f} s"
                for name, seconds in found["preflight_s"].items()
            )
        )


if __name__ == "__main__":
    main()
