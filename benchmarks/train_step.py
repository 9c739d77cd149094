"""Speed and memory of whole training steps, beside transformers' model of the same shape.

    python benchmarks/train_step.py model=text01_1b steps=50 micro_batch_tokens=16384 [rival=false]

Random tokens in packed documents of `document_tokens`; one process. That both models compute the
same is shown by tests/models/test_transformers.py. Prints one JSON line per model and, with
`output=FILE`, writes them there. On a lent machine hydra-core, omegaconf and antlr4 travel as
wheels (`pip download --no-deps`); nothing else is needed.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from fulmen.kernels import registry
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.rendezvous import join_world
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.flops import device_peak, palm_training_flops, training_flops
from fulmen.trainer.optim import Optimizer

DEFAULTS = {
    "model": "text01_1b",
    "steps": 50,
    "warmup_steps": 5,
    "micro_batch_tokens": 16384,
    "document_tokens": 8192,
    "activation_checkpointing": "none",
    "dtype": "bfloat16",
    "rival": True,
    "kernels": "auto",  # or torch, a file of recipes/kernels
    "output": None,
}


def make_batch(vocab_size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids `[1, tokens]` and the labels that follow from them."""
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, ids.roll(-1, 1)


class Ours:
    """The trainer's own path: mixed precision with fp32 master weights, fused AdamW."""

    def __init__(self, config: ModelConfig, options: Any, device: torch.device) -> None:
        self.config, self.device = config, device
        with torch.device("meta"):
            self.model = TextModel(config, MoEConfig())
        mesh = build_mesh(ParallelConfig(), device)
        self.engine = parallelize(
            self.model,
            mesh,
            ParallelConfig(),
            dtype=getattr(torch, options.dtype),
            activation_checkpointing=options.activation_checkpointing,
            compile_blocks=False,
            seed=0,
        )
        self.optimizer = Optimizer(self.engine, OptimConfig(lr=1e-4))
        tokens, document = options.micro_batch_tokens, options.document_tokens
        if tokens % document:
            raise ValueError("micro_batch_tokens must be a multiple of document_tokens")
        bounds = range(0, tokens + 1, document)
        self.cu_seqlens = torch.tensor(list(bounds), dtype=torch.int32, device=device)
        self.document_lengths = [document] * (tokens // document)
        self.tokens = tokens

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        output = self.model(
            ids,
            labels=labels,
            cu_seqlens=self.cu_seqlens,
            document_lengths=self.document_lengths,
            num_tokens=self.tokens,
        )
        return output.loss_sum / self.tokens + 0.01 * output.aux_loss

    def step(self, ids: Tensor, labels: Tensor) -> None:
        self.engine.begin_micro_batch(is_last=True)
        self.loss(ids, labels).backward()
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
        self.shape = (
            options.micro_batch_tokens // options.document_tokens,
            options.document_tokens,
        )

    def step(self, ids: Tensor, labels: Tensor) -> None:
        self.model.train()
        # transformers shifts labels itself.
        output = self.model(input_ids=ids.view(self.shape), labels=ids.view(self.shape))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(runner: Any, config: ModelConfig, options: Any, device: torch.device) -> dict[str, Any]:
    """Median step time over `steps` steps on fresh random tokens, and the peak memory."""
    times = []
    for index in range(options.warmup_steps + options.steps):
        batch = make_batch(config.vocab_size, options.micro_batch_tokens, index)
        ids, labels = (part.to(device) for part in batch)
        _synchronize(device)
        if index == options.warmup_steps and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        runner.step(ids, labels)
        _synchronize(device)
        if index >= options.warmup_steps:
            times.append(time.perf_counter() - started)
    step_time = sorted(times)[len(times) // 2]
    tokens, document = options.micro_batch_tokens, options.document_tokens
    flops = training_flops(
        config,
        num_tokens=tokens,
        sum_squared_lengths=tokens * document,
        num_assignments=tokens * config.num_experts_per_token * config.num_layers,
    )
    palm = palm_training_flops(config, num_tokens=tokens, seq_len=document)
    peak = device_peak(device, getattr(torch, options.dtype))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "name": type(runner).__name__,
        "step_time_s": round(step_time, 4),
        "tokens_per_s": round(tokens / step_time),
        "tflops": round(flops / step_time / 1e12, 2),
        "mfu": round(flops / step_time / peak, 4) if peak else None,
        "mfu_palm": round(palm / step_time / peak, 4) if peak else None,
        "peak_memory_gib": round(memory, 2) if memory else None,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    values = OmegaConf.to_container(OmegaConf.load(recipes / "model" / f"{options.model}.yaml"))
    config = ModelConfig(**values)
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
    dist.destroy_process_group()
    for row in rows:
        print(json.dumps(row))
    if options.output:
        Path(options.output).write_text("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
