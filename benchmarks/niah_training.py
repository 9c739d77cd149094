"""A small model that learns to retrieve: trained on synthetic texts, then the ladder of needles.

    python benchmarks/niah_training.py model=hybrid seconds=420 output=niah_hybrid
    python benchmarks/niah_training.py model=lightning seconds=420 output=niah_lightning

The two differ in their softmax layers alone: every second one, or none. Texts hide facts in a
haystack and ask for them later (data/retrieval.py, kind "needle"); the loss is that of the answers.
They come in `lengths`, short ones first: a length is left when the loss of its answers falls
below `enough`, or when its share of the time is over, and shorter ones stay in every second step.
Then each cell of the ladder, to 4 times the longest length, is read as launch/evaluate.py does.

Writes into `output`: training.jsonl, results.json and a heat map a task. Nothing goes on after
`seconds` of training and `evaluation_seconds` of the ladder, whose finished lengths are kept.
"""

import itertools
import json
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from fulmen.data.retrieval import Words, make_document
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import LossOutput, TextModel, count_parameters
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.rendezvous import join_world
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.long_context.config import TASKS
from fulmen.trainer.long_context.pictures import draw_heat_map
from fulmen.trainer.long_context.tasks import Cell, depths_of, score_cells
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.prefill import Reader

DEFAULTS: dict[str, Any] = {
    "model": "hybrid",
    "seconds": 420,
    "evaluation_seconds": 120,
    "output": "niah_hybrid",
    "lengths": [64, 256, 1024, 4096, 16384],
    "shares": [0.25, 0.1, 0.1, 0.15, 0.4],
    "enough": 0.05,
    "step_tokens": 16384,
    "lr": 1e-3,
    "warmup_steps": 100,
    "num_keys": 128,
    "spacing": [16, 256],  # least and most tokens for each question
    "seed": 0,
    "dtype": "bfloat16",
    "workers": 6,
    "tasks": ["niah", "many_keys"],
    "depths": 11,
    "samples": 4,
    "ladder": None,  # null = from the shortest length to 4 times the longest, doubling
    "chunk_tokens": 32768,
    "shape": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rotary_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "expert_hidden_size": 256,
        # Each angle must have been all the way round within the trained length: at 1e6 nothing was
        # found beyond it.
        "rope_theta": 1e4,
        # DeepNorm's weight is made for depth; four layers learn to retrieve sooner without it.
        "residual_alpha": 1.0,
    },
}
SOFTMAX_EVERY = {"hybrid": 2, "lightning": 0, "softmax": 1}
IGNORE = -100


def make_rows(
    keys: int, spacing: tuple[int, int], length: int, rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels `[rows, length]`, one text a row; only answers have labels."""
    language, rng = Words(num_keys=keys), np.random.default_rng(seed)
    language.spacing = spacing
    (end,) = language.encode("<end_of_document>")
    (ask,) = language.encode("ask")
    kinds = {"needle": 1.0}
    texts = [make_document(kinds, language, rng, length=length) for _ in range(rows)]
    ids = np.array([[*language.encode(text), end] for text in texts])
    labels = np.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    # "ask KEY V V": what follows the key and the first half of the value is the answer.
    asked = ids == ask
    is_answer = np.zeros_like(asked)
    is_answer[:, 1:] |= asked[:, :-1]
    is_answer[:, 2:] |= asked[:, :-2]
    is_answer[:, -1] = False
    return ids, np.where(is_answer, labels, IGNORE)


class Rows:
    """Texts made ahead in other processes."""

    def __init__(self, options: Any) -> None:
        self.options, self.seeds = options, itertools.count(1000 * options.seed)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(options.workers, mp_context=context)

    def of(self, lengths: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the last length and, every second time, of one of those before it."""
        chance, waiting = np.random.default_rng(len(lengths)), deque[Any]()
        for turn in itertools.count():
            older = turn % 2 and len(lengths) > 1
            length = int(chance.choice(lengths[:-1])) if older else lengths[-1]
            rows = max(1, self.options.step_tokens // length)
            seed = next(self.seeds)
            texts = self.options.num_keys, tuple(self.options.spacing), length, rows, seed
            waiting.append(self.pool.submit(make_rows, *texts))
            if len(waiting) > 2 * self.options.workers:
                yield waiting.popleft().result()


class Training:
    """The trainer's own path: mixed precision with fp32 master weights, fused AdamW."""

    def __init__(self, options: Any) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.device = join_world()
        self.mesh = build_mesh(ParallelConfig(), self.device)
        vocab_size = -(-Words(num_keys=options.num_keys).vocab_size // 64) * 64
        every = SOFTMAX_EVERY[options.model]
        config = ModelConfig(**options.shape, vocab_size=vocab_size, softmax_every=every)
        with torch.device("meta"):
            self.model = TextModel(config, MoEConfig())
        self.engine = parallelize(
            self.model,
            self.mesh,
            ParallelConfig(),
            dtype=getattr(torch, options.dtype),
            activation_checkpointing="none",
            compile_blocks=False,
            seed=options.seed,
        )
        optim = OptimConfig(lr=options.lr, weight_decay=0.01)
        self.optimizer, self.steps, self.tokens = Optimizer(self.engine, optim), 0, 0

    def run(self, log: Path) -> None:
        """Through all lengths; one line of `log` every few seconds."""
        options, rows = self.options, Rows(self.options)
        self.started = time.monotonic()
        deadline = self.started
        with log.open("w") as file:
            for place, share in enumerate(options.shares):
                deadline += share * options.seconds
                lengths = list(options.lengths[: place + 1])
                self._one_length(lengths, deadline, rows, file)
        rows.pool.shutdown(wait=False, cancel_futures=True)

    def _one_length(self, lengths: list[int], deadline: float, rows: Rows, file: Any) -> None:
        recent, said = deque[float](maxlen=20), time.monotonic()
        is_last = len(lengths) == len(self.options.lengths)
        for ids, labels in rows.of(lengths):
            loss = self._step(ids, labels)
            if ids.shape[1] == lengths[-1]:
                recent.append(loss)
            now, mean = time.monotonic(), sum(recent) / len(recent)
            learnt = not is_last and len(recent) == recent.maxlen and mean < self.options.enough
            if now - said > 5 or learnt or now > deadline:
                said = now
                line = {
                    "length": lengths[-1],
                    "step": self.steps,
                    "seconds": round(now - self.started, 1),
                    "tokens": self.tokens,
                    "answer_loss": round(mean, 4),
                }
                print(json.dumps(line), flush=True)
                print(json.dumps(line), file=file, flush=True)
            if learnt or now > deadline:
                return

    def _step(self, ids: np.ndarray, labels: np.ndarray) -> float:
        self.engine.begin_micro_batch(is_last=True)
        on_device = (torch.from_numpy(x).to(self.device) for x in (ids, labels))
        count = max(1, int((labels != IGNORE).sum()))
        output = self.model(next(on_device), labels=next(on_device))
        assert isinstance(output, LossOutput)
        (output.loss_sum / count + 0.01 * output.aux_loss).backward()
        self.engine.clip_grad_norm(1.0)
        self.optimizer.step(self._lr())
        self.steps, self.tokens = self.steps + 1, self.tokens + ids.size
        return output.loss_sum.item() / count

    def _lr(self) -> float:
        """Warm-up by steps; down to a tenth over the last third of the time."""
        done = (time.monotonic() - self.started) / self.options.seconds
        warm = min(1.0, (self.steps + 1) / self.options.warmup_steps)
        return self.options.lr * warm * min(1.0, max(0.1, 1 - 0.9 * (done - 2 / 3) * 3))


def climb(training: Training, output: Path) -> None:
    """Accuracy by task, length and depth, as far as the time goes; one JSON line a length."""
    options = training.options
    longest = options.lengths[-1]
    ladder = options.ladder
    if ladder is None:
        ladder = [options.lengths[0]]
        while ladder[-1] < 4 * longest:
            ladder.append(2 * ladder[-1])
    training.model.eval()
    reader = Reader(training.model, chunk_tokens=options.chunk_tokens, mesh=training.mesh)
    language = Words(num_keys=options.num_keys)
    found: dict[str, dict[int, dict[float, float]]] = {task: {} for task in options.tasks}
    details: dict[str, dict[str, int]] = {}
    started = time.monotonic()
    for length, task in itertools.product(ladder, options.tasks):
        # A fact takes five tokens; a text should be haystack for the most part.
        if length < 20 * TASKS[task].num_distractors:
            continue
        if time.monotonic() - started > options.evaluation_seconds:
            print(json.dumps({"task": task, "length": length, "left_out": "no time"}), flush=True)
            continue
        cells = [Cell(task, length, depth) for depth in depths_of(options.depths)]
        scores = score_cells(
            reader, language, cells, samples=options.samples, seed=1, mesh=training.mesh
        )
        found[task][length] = {}
        for cell, score in zip(cells, scores, strict=True):
            found[task][length][cell.depth] = score.accuracy
            details[f"{task}/{length}/{cell.depth:.2f}"] = asdict(score)
        mean = sum(found[task][length].values()) / len(cells)
        print(json.dumps({"task": task, "length": length, "accuracy": round(mean, 4)}), flush=True)
        facts = {
            "model": options.model,
            "parameters": count_parameters(training.model),
            "trained_length": longest,
            "steps": training.steps,
            "tokens": training.tokens,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "accuracy": found,
            "cells": details,
            "options": OmegaConf.to_container(options),
        }
        (output / "results.json").write_text(json.dumps(facts, indent=1))
        title = f"{task}, {options.model} model"
        draw_heat_map(output / f"{task}.png", found[task], title=title, trained_length=longest)


def main() -> None:
    options = OmegaConf.merge(OmegaConf.create(DEFAULTS), OmegaConf.from_cli(sys.argv[1:]))
    if options.model not in SOFTMAX_EVERY:
        sys.exit(f"error: model={options.model}: must be one of {', '.join(SOFTMAX_EVERY)}")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    training = Training(options)
    training.run(output / "training.jsonl")
    climb(training, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
