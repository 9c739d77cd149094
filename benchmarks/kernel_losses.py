"""Losses of the tiny recipe with our kernels and with their references, on a GPU.

    python benchmarks/kernel_losses.py [data=data_cache/stdlib] [steps=200] [output=FILE]

Trains text01_tiny three times from the same weights on the same batches: in bf16 with the kernels,
in bf16 with `kernels=torch`, in fp32 with `kernels=torch`. What bf16 does to the reference's losses
(second against third) is the noise; the kernels' losses may differ from the reference's by no more
than twice that, on average over steps and at most. Exits with 1 otherwise.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

DEFAULTS = {"data": "data_cache/stdlib", "steps": 200, "output": None}
ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "kernels": ("auto", "bfloat16"),
    "reference": ("torch", "bfloat16"),
    "reference_fp32": ("torch", "float32"),
}


def start(options: Any, name: str, run_root: str) -> subprocess.Popen[str]:
    """One of the runs."""
    kernels, dtype = RUNS[name]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "recipe=text01_tiny"]
    command += [f"kernels={kernels}", f"trainer.dtype={dtype}", f"run_id={name}"]
    command += [f"run_root={run_root}", f"data.sources.stdlib.path={options.data}"]
    command += [f"trainer.max_steps={options.steps}", "log.every_steps=1"]
    command += ["evaluation.every_steps=null", "checkpoint.every_steps=null"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses_of(run: subprocess.Popen[str], options: Any, name: str, run_root: str) -> list[float]:
    """Loss of each step, once the run has ended."""
    output, _ = run.communicate()
    if run.returncode:
        sys.exit(f"the run {name} failed:\n{output[-3000:]}")
    lines = Path(run_root, "text01_tiny", name, "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == options.steps, f"{name}: {len(losses)} losses"
    return losses


def differences(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean and largest relative difference."""
    relative = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return {"mean": sum(relative) / len(relative), "max": max(relative)}


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    if not torch.cuda.is_available():
        print("benchmarks/kernel_losses.py: no CUDA device here, nothing to compare")
        return
    with tempfile.TemporaryDirectory() as run_root:
        runs = {name: start(options, name, run_root) for name in RUNS}  # side by side
        losses = {name: losses_of(run, options, name, run_root) for name, run in runs.items()}
    apart = differences(losses["kernels"], losses["reference"])
    noise = differences(losses["reference"], losses["reference_fp32"])
    agree = all(apart[key] <= 2 * noise[key] for key in apart)
    result = {
        "device": torch.cuda.get_device_name(),
        "steps": options.steps,
        "first_loss": losses["kernels"][0],
        "last_losses": {name: values[-1] for name, values in losses.items()},
        "kernels_against_reference": apart,
        "bf16_against_fp32": noise,
        "agree": agree,
    }
    print(json.dumps(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result | {"losses": losses}) + "\n")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
