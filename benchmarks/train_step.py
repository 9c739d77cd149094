"""Speed and memory of whole training steps, beside transformers' model of the same shape.

    python benchmarks/train_step.py model=text01_1b steps=50 micro_batch_tokens=16384 [rival=false]
    torchrun --nproc-per-node 2 benchmarks/train_step.py rival=false parallel.cp=2 profile=true

Random tokens in packed documents of `document_tokens`, the row's first one half as long, so that
others cross the cuts between ranks; with at least a row's tokens, one document. Tokens of a rank
are `micro_batch_tokens`, in the warm-up `warmup_tokens` (null: the same). Keys of `parallel` are
those of the configuration, and so are `activation_checkpointing`, `chunk_tokens` and
`offload_checkpoints`; `shape.KEY=VALUE` changes the model (`shape.softmax_every=1`: the control),
`attention=NAME` asks for a back end. That both models compute the same is shown by
tests/models/test_transformers.py.

Prints one JSON line per model as soon as it is measured and, with `output=FILE`, writes it there:
also when memory ends, then with the place that was reached, and when transformers' model cannot be
built. `predicted_*` are the planner's, memory without its margin as torch counts it. `profile=true`
adds what a step exchanges, and how much of it is not hidden. On a lent machine hydra-core,
omegaconf, antlr4 and zstandard travel as wheels (`pip download --no-deps`); nothing else is needed.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from overlap import communication, profile_steps
from torch import Tensor, nn

from fulmen.data.config import DataConfig
from fulmen.data.packing import PackedBatch
from fulmen.kernels import registry
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.rendezvous import join_world
from fulmen.trainer.config import OptimConfig, RunConfig, TrainerConfig
from fulmen.trainer.flops import device_peak, palm_training_flops, training_flops
from fulmen.trainer.inputs import model_inputs
from fulmen.trainer.memory import GIB, add_margin, find_peak, host_bytes
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.planner import Assumptions, Gpu, find_gpu, predict_step

DEFAULTS = {
    "model": "text01_1b",
    "steps": 50,
    "warmup_steps": 5,
    "micro_batch_tokens": 16384,
    "warmup_tokens": None,
    "document_tokens": 8192,
    "activation_checkpointing": "none",
    "chunk_tokens": None,
    "offload_checkpoints": False,
    "dtype": "bfloat16",
    "compile": False,
    "rival": True,
    "kernels": "auto",  # or torch, a file of recipes/kernels
    "attention": None,
    "parallel": {},
    "shape": {},
    "moe": {},
    "profile": False,
    "output": None,
}


def make_batch(vocab_size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids `[1, tokens]` and the labels that follow from them."""
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, ids.roll(-1, 1)


def row_bounds(tokens: int, document: int) -> list[int]:
    """Documents of a row; the first is half as long, if there are several."""
    return sorted(
        {0, *range(document // 2 if document < tokens else tokens, tokens, document), tokens}
    )


class Ours:
    """The trainer's own path: mixed precision with fp32 master weights, fused AdamW."""

    def __init__(self, config: ModelConfig, options: Any, device: torch.device) -> None:
        self.config, self.device = config, device
        parallel = ParallelConfig(**options.parallel)
        moe = MoEConfig(**options.moe)
        with torch.device("meta"):
            self.model = TextModel(config, moe)
        self.mesh = build_mesh(parallel, device)
        self.engine = parallelize(
            self.model,
            self.mesh,
            parallel,
            dtype=getattr(torch, options.dtype),
            activation_checkpointing=options.activation_checkpointing,
            compile_blocks=options.compile,
            seed=0,
            chunk_tokens=options.chunk_tokens,
            offload_checkpoints=options.offload_checkpoints,
        )
        self.optimizer = Optimizer(self.engine, OptimConfig(lr=1e-4))
        self.row, self.document = options.micro_batch_tokens * self.mesh.cp, options.document_tokens
        self.reached, self.losses = "", []
        for number, block in enumerate(self.model.layers):
            block.register_forward_hook(partial(self._passed, number))

    def _passed(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self.reached = f"forward pass behind layer {number}"

        def backward(gradient: Tensor) -> None:
            self.reached = f"backward pass before layer {number}"

        if output[0].requires_grad:
            output[0].register_hook(backward)

    def batch(self, seed: int, tokens: int) -> dict[str, Any]:
        """`tokens` of each rank."""
        row = tokens * self.mesh.cp
        ids, labels = make_batch(self.config.vocab_size, row, 1000 * seed + self.mesh.dp_rank)
        bounds = torch.tensor(row_bounds(row, self.document), dtype=torch.int32)
        return model_inputs(PackedBatch(ids, labels, bounds, row), self.mesh)

    def step(self, batch: dict[str, Any]) -> None:
        self.reached = "start"
        self.engine.begin_micro_batch(is_last=True)
        output = self.model(**batch)
        self.reached = "head"
        count = batch["input_ids"].numel() * self.mesh.world_size  # a mean over the world's tokens
        loss = output.loss_sum / count + 0.01 * output.aux_loss / self.mesh.dp
        loss.backward()
        self.reached = "optimiser"
        self.engine.clip_grad_norm(1.0)
        self.optimizer.step(1e-4)
        self.losses.append(output.loss_sum.detach() / batch["input_ids"].numel())


class Transformers:
    """`MiniMaxForCausalLM`: documents as rows of a batch, weights in the compute type."""

    def __init__(self, config: ModelConfig, options: Any, device: torch.device) -> None:
        from transformers import MiniMaxForCausalLM

        from fulmen.models.hf import to_hf_config

        values = to_hf_config(
            config,
            "transformers",
            max_position_embeddings=options.document_tokens,
            dtype=options.dtype,
        )
        hf_config = MiniMaxForCausalLM.config_class(**values)
        hf_config.output_router_logits = True
        with torch.device(device):
            self.model: nn.Module = MiniMaxForCausalLM(hf_config).to(getattr(torch, options.dtype))
        if options.activation_checkpointing == "full":
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if options.micro_batch_tokens % options.document_tokens:
            raise ValueError("micro_batch_tokens must be a multiple of document_tokens")
        self.shape = (-1, options.document_tokens)
        self.config, self.device = config, device
        self.reached, self.losses = "", []

    def batch(self, seed: int, tokens: int) -> Tensor:
        ids, _ = make_batch(self.config.vocab_size, tokens, seed)
        return ids.to(self.device).view(self.shape)

    def step(self, ids: Tensor) -> None:
        self.model.train()
        # transformers shifts labels itself.
        output = self.model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(output.loss.detach())


def timed_steps(runner: Any, options: Any, device: torch.device) -> list[float]:
    """Seconds of `steps` steps on fresh random tokens, behind those that warm up."""
    times = []
    for index in range(options.warmup_steps + options.steps):
        warm = index >= options.warmup_steps
        tokens = options.micro_batch_tokens if warm else options.warmup_tokens
        batch = runner.batch(index, tokens or options.micro_batch_tokens)
        _synchronize(device)
        if index == options.warmup_steps and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        started = time.perf_counter()
        runner.step(batch)
        _synchronize(device)
        if warm:
            times.append(time.perf_counter() - started)
    if options.profile and device.type == "cuda":
        runner.profiled = communication(profile_steps(lambda: runner.step(batch), 3), 3)
    return times


def run_config(config: ModelConfig, options: Any, ranks: int) -> RunConfig:
    """What the planner needs to know of these steps."""
    parallel = ParallelConfig(**options.parallel)
    row = options.micro_batch_tokens * parallel.cp
    batch = options.micro_batch_tokens * ranks
    return RunConfig(
        model=config,
        moe=MoEConfig(**options.moe),
        data=DataConfig(seq_len=min(options.document_tokens, row), global_batch_tokens=batch),
        parallel=parallel,
        trainer=TrainerConfig(
            micro_batch_tokens=row,
            dtype=options.dtype,
            activation_checkpointing=options.activation_checkpointing,
            chunk_tokens=options.chunk_tokens,
            offload_checkpoints=options.offload_checkpoints,
        ),
    )


def predict(config: ModelConfig, options: Any, ranks: int, gpu: Gpu) -> dict[str, Any]:
    """The planner's memory and time of such a step."""
    run = run_config(config, options, ranks)
    parts = find_peak(run, ranks, 1)
    step = predict_step(run, ranks, gpu, Assumptions(), options.micro_batch_tokens * ranks)
    return {
        "predicted_memory_gib": round(sum(parts.values()) / GIB, 2),
        "predicted_with_margin_gib": round(sum(add_margin(parts).values()) / GIB, 2),
        "predicted_host_gib": round(host_bytes(run) / GIB, 2),
        "predicted_step_time_s": round(step.seconds, 3),
    }


def speed(
    runner: Any, config: ModelConfig, options: Any, device: torch.device, times: list[float]
) -> dict[str, Any]:
    """Figures of the median step."""
    step_time = sorted(times)[len(times) // 2]
    tokens, row = options.micro_batch_tokens, options.micro_batch_tokens
    if isinstance(runner, Ours):
        row = runner.row
    bounds = row_bounds(row, options.document_tokens)
    squares = sum((b - a) ** 2 for a, b in itertools.pairwise(bounds)) * tokens // row
    flops = training_flops(
        config,
        num_tokens=tokens,
        sum_squared_lengths=squares,
        num_assignments=tokens * config.num_experts_per_token * config.num_layers,
    )
    palm = palm_training_flops(config, num_tokens=tokens, seq_len=options.document_tokens)
    peak = device_peak(device, getattr(torch, options.dtype))
    return {
        "step_time_s": round(step_time, 4),
        "steps": len(times),
        "tokens_per_s_per_rank": round(tokens / step_time),
        "tflops": round(flops / step_time / 1e12, 2),
        "mfu": round(flops / step_time / peak, 4) if peak else None,
        "mfu_palm": round(palm / step_time / peak, 4) if peak else None,
    }


def measure(runner: Any, config: ModelConfig, options: Any, device: torch.device) -> dict[str, Any]:
    """One row: what was run, speed, memory, and how far it came if memory was not enough."""
    ranks = dist.get_world_size()
    keys = ("micro_batch_tokens", "document_tokens", "activation_checkpointing", "chunk_tokens")
    result: dict[str, Any] = {
        "name": type(runner).__name__,
        "ranks": ranks,
        "parallel": OmegaConf.to_container(options.parallel),
        "shape": OmegaConf.to_container(options.shape),
        **{key: options[key] for key in (*keys, "offload_checkpoints")},
    }
    try:
        result |= speed(runner, config, options, device, timed_steps(runner, options, device))
        result |= {"loss": round(float(runner.losses[-1]), 4)} | getattr(runner, "profiled", {})
    except RuntimeError as error:  # out of memory, of the GPU or of what is pinned, among others
        result |= {"failed_in": runner.reached, "error": str(error)[:200]}
    if device.type == "cuda":
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        gpu = find_gpu(torch.cuda.get_device_name())
        if isinstance(runner, Ours) and gpu is not None:
            result |= predict(config, options, ranks, gpu)
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    values = OmegaConf.to_container(OmegaConf.load(recipes / "model" / f"{options.model}.yaml"))
    config = ModelConfig(**(values | OmegaConf.to_container(options.shape)))
    kernels = OmegaConf.load(recipes / "kernels" / f"{options.kernels}.yaml")
    asked = {"attention": options.attention} if options.attention else {}
    registry.configure(OmegaConf.merge(kernels, asked))
    device = join_world()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    failed = False
    for kind in [Ours, Transformers] if options.rival else [Ours]:
        try:
            runner = kind(config, options, device)
        except Exception as error:
            if kind is Ours:
                raise
            show({"name": kind.__name__, "error": repr(error)[:200]}, options)
            failed = True
            break
        if kind is Ours:
            about = {
                "model": options.model,
                "kernels": options.kernels,
                "parameters": count_parameters(runner.model),
                "active": count_active_parameters(runner.model),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "commit": commit,
            }
            show(about, options, is_first_row=True)
        row = measure(runner, config, options, device)
        show(row, options)
        if "failed_in" in row:
            os._exit(1)  # the others may wait for this rank, and destructors for them
        del runner
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    sys.exit(failed)


def show(row: dict[str, Any], options: Any, *, is_first_row: bool = False) -> None:
    """Print and write a row at once: what follows may fail."""
    if dist.get_rank() != 0:
        return
    line = json.dumps(row)
    print(line, flush=True)
    if options.output:
        with Path(options.output).open("w" if is_first_row else "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
