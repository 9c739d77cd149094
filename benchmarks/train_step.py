"""Speed and memory of whole training steps, beside transformers' model of the same shape.

    python benchmarks/train_step.py model=text01_1b steps=50 micro_batch_tokens=16384 [rival=false]
    torchrun --nproc-per-node 2 benchmarks/train_step.py rival=false parallel.cp=2 profile=true

Random tokens in packed documents of `document_tokens`, the row's first one half as long, so that
others cross the cuts between ranks; `micro_batch_tokens` are a rank's. Keys of `parallel` are those
of the configuration, `shape.KEY=VALUE` changes the model. That both models compute the same is
shown by tests/models/test_transformers.py. Prints one JSON line per model and, with `output=FILE`,
writes them there; `profile=true` adds what a step exchanges, and how much of it is not hidden. On a
lent machine hydra-core, omegaconf, antlr4 and zstandard travel as wheels (`pip download
--no-deps`); nothing else is needed.
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from overlap import communication, profile_steps
from torch import Tensor, nn

from fulmen.data.packing import PackedBatch
from fulmen.kernels import registry
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.rendezvous import join_world
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.flops import device_peak, palm_training_flops, training_flops
from fulmen.trainer.inputs import model_inputs
from fulmen.trainer.optim import Optimizer

DEFAULTS = {
    "model": "text01_1b",
    "steps": 50,
    "warmup_steps": 5,
    "micro_batch_tokens": 16384,
    "document_tokens": 8192,
    "activation_checkpointing": "none",
    "dtype": "bfloat16",
    "compile": False,
    "rival": True,
    "kernels": "auto",  # or torch, a file of recipes/kernels
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
        )
        self.optimizer = Optimizer(self.engine, OptimConfig(lr=1e-4))
        self.row = options.micro_batch_tokens * self.mesh.cp
        self.bounds = torch.tensor(row_bounds(self.row, options.document_tokens), dtype=torch.int32)

    def batch(self, seed: int) -> dict[str, Any]:
        ids, labels = make_batch(self.config.vocab_size, self.row, 1000 * seed + self.mesh.dp_rank)
        return model_inputs(PackedBatch(ids, labels, self.bounds, self.row), self.mesh)

    def step(self, batch: dict[str, Any]) -> None:
        self.engine.begin_micro_batch(is_last=True)
        output = self.model(**batch)
        loss = output.loss_sum / (self.row * self.mesh.dp) + 0.01 * output.aux_loss / self.mesh.dp
        loss.backward()
        self.engine.clip_grad_norm(1.0)
        self.optimizer.step(1e-4)


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
        self.config, self.device, self.tokens = config, device, options.micro_batch_tokens

    def batch(self, seed: int) -> Tensor:
        ids, _ = make_batch(self.config.vocab_size, self.tokens, seed)
        return ids.to(self.device).view(self.shape)

    def step(self, ids: Tensor) -> None:
        self.model.train()
        # transformers shifts labels itself.
        output = self.model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(runner: Any, config: ModelConfig, options: Any, device: torch.device) -> dict[str, Any]:
    """Median step time over `steps` steps on fresh random tokens, and the peak memory."""
    times = []
    for index in range(options.warmup_steps + options.steps):
        batch = runner.batch(index)
        _synchronize(device)
        if index == options.warmup_steps and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        started = time.perf_counter()
        runner.step(batch)
        _synchronize(device)
        if index >= options.warmup_steps:
            times.append(time.perf_counter() - started)
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
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    result = {
        "name": type(runner).__name__,
        "ranks": dist.get_world_size(),
        "parallel": OmegaConf.to_container(options.parallel),
        "step_time_s": round(step_time, 4),
        "tokens_per_s_per_rank": round(tokens / step_time),
        "tflops": round(flops / step_time / 1e12, 2),
        "mfu": round(flops / step_time / peak, 4) if peak else None,
        "mfu_palm": round(palm / step_time / peak, 4) if peak else None,
        "peak_memory_gib": round(memory, 2) if memory else None,
    }
    if options.profile and device.type == "cuda":
        result |= communication(profile_steps(lambda: runner.step(batch), 3), 3)
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
    registry.configure(OmegaConf.load(recipes / "kernels" / f"{options.kernels}.yaml"))
    device = join_world()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    rows: list[dict[str, Any]] = []
    for kind in [Ours, Transformers] if options.rival else [Ours]:
        runner = kind(config, options, device)
        if not rows:
            rows.append(
                {
                    "model": options.model,
                    "kernels": options.kernels,
                    "parameters": count_parameters(runner.model),
                    "active": count_active_parameters(runner.model),
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "commit": commit,
                }
            )
        rows.append(measure(runner, config, options, device))
        del runner
        if device.type == "cuda":
            torch.cuda.empty_cache()
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    for row in rows if is_first else []:
        print(json.dumps(row))
    if options.output and is_first:
        Path(options.output).write_text("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
