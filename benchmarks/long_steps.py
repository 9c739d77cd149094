"""Training steps from 8K to 1M tokens in one document: the hybrid beside softmax in every layer.

    python benchmarks/long_steps.py output=long [budget_s=540] [lengths=[8192,1048576]] \
        [kinds=[hybrid,control]] [ranks=2]
    python benchmarks/long_steps.py plan=true gpu=h200
    python benchmarks/long_steps.py every_way=true lengths=[32768] kinds=[hybrid]

Each case is a benchmarks/train_step.py in a process of its own, with the way to save memory that
the planner finds fastest of those that fit (`plan=true` says which, on any machine), and the next
leaner one should memory end all the same; with `every_way=true`, with each that fits. Should
anything else fail, it is tried once more without cuDNN. What would take longer than what is left of
`budget_s`, by the planner's estimate, is left out and said. `ranks` GPUs share a row (cp).

The steps of a case warm up at its own length where that is cheap, else at `warmup_tokens` a rank.
Writes FOLDER/steps.jsonl, a line a case as it is done, FOLDER/steps.md and, with matplotlib,
FOLDER/steps.png.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from children import end_at_sigterm, run_child
from omegaconf import OmegaConf
from train_step import DEFAULTS as STEP
from train_step import predict

from fulmen.models.config import ModelConfig
from fulmen.trainer.planner import GPUS, Gpu, find_gpu
from fulmen.trainer.planner_search import CHUNK_TOKENS

DEFAULTS = {
    "model": "text01_1b",
    "lengths": [8192, 131072, 524288, 1048576],
    "kinds": ["hybrid", "control"],
    "ranks": 1,
    "gpu": None,
    "plan": False,
    "every_way": False,
    "budget_s": 540,
    "warmup_tokens": 65536,
    "chunk_tokens": CHUNK_TOKENS,
    "step": {},  # keys of train_step.py for every case
    "output": "long_steps",
}
SHAPES: dict[str, dict[str, int]] = {"hybrid": {}, "control": {"softmax_every": 1}}
TOKENS_PER_STEP = 16384
"""Of a rank, at least: short rows are packed to as many."""
START_S = 45
"""A process' imports, first allocations and compilation, about; pinning 3 GiB takes a second."""


def ways(chunk_tokens: int) -> list[dict[str, Any]]:
    """All that is tried."""
    full = {"activation_checkpointing": "full"}
    chunks = {"chunk_tokens": chunk_tokens}
    host = {"offload_checkpoints": True}
    selective = {"activation_checkpointing": "selective"}
    return [{}, selective, full, chunks, full | chunks, full | host, full | chunks | host]


def plan_case(kind: str, length: int, options: Any, gpu: Gpu) -> list[dict[str, Any]]:
    """Keys of train_step.py with what the planner says of them: those that fit, fastest first."""
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    values = OmegaConf.to_container(OmegaConf.load(recipes / "model" / f"{options.model}.yaml"))
    config = ModelConfig(**(values | SHAPES[kind]))
    found = []
    for number, way in enumerate(ways(options.chunk_tokens)):
        keys = way | {
            "shape": SHAPES[kind],
            "parallel": {"cp": options.ranks},
            "document_tokens": length,
            "micro_batch_tokens": max(length // options.ranks, TOKENS_PER_STEP),
        }
        case = OmegaConf.merge(STEP, keys, options.step)
        said = predict(config, case, options.ranks, gpu)
        if said["predicted_with_margin_gib"] <= gpu.usable_gib:
            found.append({"keys": keys, "number": number, **said})
    found.sort(key=lambda one: (one["predicted_step_time_s"], one["number"]))
    return found


def run_case(case: dict[str, Any], options: Any, limit_s: float) -> dict[str, Any]:
    """The row that train_step.py prints, or why there is none."""
    seconds, host = case["predicted_step_time_s"], case["predicted_host_gib"]
    steps = max(1, min(20, int(15 / seconds)))
    keys = case["keys"] | {"model": options.model, "rival": False, "steps": steps}
    # What is pinned is allocated by the first step of that length.
    if seconds > 60 or (seconds > 20 and not host):
        keys |= {"warmup_steps": 1, "warmup_tokens": options.warmup_tokens // options.ranks}
    else:
        keys["warmup_steps"] = 1 if seconds > 2 else 4
    file = Path(options.output) / "case.jsonl"
    file.unlink(missing_ok=True)
    launch = [sys.executable]
    if options.ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={options.ranks}"]
    settings = OmegaConf.merge(keys, options.step, {"output": str(file)})
    command = [*launch, str(Path(__file__).with_name("train_step.py")), *_as_arguments(settings)]
    # Tensors of some gigabytes come and go: their memory must be found again in other sizes.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    status, said = run_child(command, limit_s=limit_s, env=environment)
    row = {"error": f"longer than {limit_s:.0f} s" if status is None else said[-1500:]}
    # The first line is there before the steps begin.
    about, *measured = map(json.loads, file.read_text().splitlines() if file.exists() else ["{}"])
    if measured:
        row = measured[0]
    return row | {key: about[key] for key in ("model", "device", "torch", "commit") if about}


def _as_arguments(settings: Any) -> list[str]:
    values: dict[str, Any] = {}

    def flatten(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{key}.", value)
            else:
                values[prefix + key] = "null" if value is None else value

    flatten("", OmegaConf.to_container(settings))
    return [f"{key}={value}" for key, value in values.items()]


def name_of(keys: dict[str, Any]) -> str:
    """A way in a few words."""
    words = [keys.get("activation_checkpointing") or "none"]
    words += ["chunks"] if keys.get("chunk_tokens") else []
    words += ["host"] if keys.get("offload_checkpoints") else []
    words += [keys["attention"]] if keys.get("attention") else []
    return " + ".join(words)


def attempts(case: dict[str, Any], options: Any, deadline: float) -> dict[str, Any]:
    """A case's row; where another thing than memory or time fails, once more without cuDNN."""
    left = deadline - time.monotonic()
    estimate = START_S + case["predicted_host_gib"] + 1.3 * case["predicted_step_time_s"]
    print(
        f"{name_of(case['keys'])}: {case['predicted_step_time_s']:.2f} s a step, "
        f"{case['predicted_memory_gib']:.1f} GiB predicted, {left:.0f} s left",
        flush=True,
    )
    if options.plan:
        return case | case["keys"]
    if estimate > left:
        return case["keys"] | {"error": f"about {estimate:.0f} s, but {left:.0f} are left"}
    row = case["keys"] | run_case(case, options, left)
    left = deadline - time.monotonic()
    if "failed_in" in row and not ran_out(row) and "attention" not in options.step:
        print(json.dumps(row), flush=True)
        keys = case["keys"] | {"attention": "sdpa"}
        row = keys | run_case(case | {"keys": keys}, options, left)
    return row


def ran_out(row: dict[str, Any]) -> bool:
    """Whether memory was not enough."""
    return "out of memory" in str(row.get("error"))


def run_all(options: Any, gpu: Gpu) -> list[dict[str, Any]]:
    """All cases, a length after the other."""
    deadline = time.monotonic() + options.budget_s
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        with (folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (folder / "steps.md").write_text(table(rows))

    for length, kind in itertools.product(options.lengths, options.kinds):
        about = {"kind": kind, "length": length}
        plan = plan_case(kind, length, options, gpu)
        if not plan:
            add(about | {"error": "the planner finds no way that fits"})
        too_much = float("inf")
        for case in plan:
            if case["predicted_memory_gib"] >= too_much:
                continue
            print(f"{kind}, {length} tokens, ", end="")
            add(about | attempts(case, options, deadline))
            if options.every_way:
                continue
            if not ran_out(rows[-1]):
                break
            too_much = case["predicted_memory_gib"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| tokens | model | memory | step s | predicted | tokens/s | MFU | peak GiB | predicted |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [f"{row['length']:,}", row["kind"], name_of(row)]
        if "step_time_s" in row:
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            cells += [f"{row['step_time_s']:.3f}", str(row.get("predicted_step_time_s", ""))]
            cells += [f"{row['tokens_per_s_per_rank']:,}", mfu]
            cells += [str(row.get(k, "")) for k in ("peak_memory_gib", "predicted_memory_gib")]
        else:
            cells[2:] = [str(row.get("failed_in") or row.get("error", "")), *[""] * 6]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second and peak memory against length."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    values = [("tokens_per_s_per_rank", "tokens/s a GPU"), ("peak_memory_gib", "peak GiB")]
    for axis, (key, title) in zip(axes, values, strict=True):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            points = [(r["length"], r[key]) for r in rows if r["kind"] == kind and r.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the row", title=title)
        axis.grid(True, which="both", alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def find_this_gpu() -> Gpu:
    """The chip of this machine, without a context on it."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    gpu = find_gpu(name)
    if gpu is None:
        raise ValueError(f"{name} is not in the planner's table: give gpu={'|'.join(GPUS)}")
    return gpu


def main() -> None:
    """Entry point."""
    end_at_sigterm()
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    gpu = GPUS[options.gpu] if options.gpu else find_this_gpu()
    rows = run_all(options, gpu)
    folder = Path(options.output)
    if not options.plan:
        plot(rows, folder / "steps.png")
        print((folder / "steps.md").read_text())
        done = {(row["kind"], row["length"]) for row in rows if "step_time_s" in row}
        sys.exit(len(done) < len(options.kinds) * len(options.lengths))


if __name__ == "__main__":
    main()
