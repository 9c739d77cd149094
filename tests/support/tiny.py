"""The smallest run that has every part: both layer kinds, experts, several sources of noise."""

import json
import random
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fulmen.data.config import DataConfig, PrepareConfig, SourceConfig
from fulmen.data.prepare import prepare
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.text import TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import (
    EvaluationConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    to_dataclass,
)

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""
VOCAB_SIZE = 301
"""Odd, so that the embedding and the head never divide evenly."""


def tiny_model(**changes: int) -> ModelConfig:
    """Lightning, softmax, lightning."""
    values: dict[str, int] = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "expert_hidden_size": 24,
        "vocab_size": VOCAB_SIZE,
        "softmax_every": 2,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def tiny_engine(
    device: torch.device,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    compile_blocks: bool = False,
    seed: int = 0,
    moe: MoEConfig | None = None,
    chunk_tokens: int | None = None,
    offload_checkpoints: bool = False,
) -> tuple[TextModel, ZeroEngine]:
    """`tiny_model` spread over the ranks of this world."""
    with torch.device("meta"):
        model = TextModel(tiny_model(), moe or MoEConfig())
    engine = parallelize(
        model,
        build_mesh(parallel, device),
        parallel,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        compile_blocks=compile_blocks,
        seed=seed,
        chunk_tokens=chunk_tokens,
        offload_checkpoints=offload_checkpoints,
    )
    return model, engine


def tiny_config(data: str | Path, *, max_steps: int = 6) -> RunConfig:
    """A run on a prepared folder: four micro-batches a step, on one, two or four ranks."""
    return RunConfig(
        seed=3,
        model=tiny_model(),
        data=DataConfig(
            seq_len=32, global_batch_tokens=256, sources={"text": SourceConfig(path=str(data))}
        ),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(
            warmup_steps=4,
            phases=[
                PhaseConfig(tokens=1500, lr_factor=1.0),
                PhaseConfig(tokens=100_000, lr_factor=0.1, decay="exponential"),
            ],
        ),
        parallel=ParallelConfig(zero_stage=1),
        trainer=TrainerConfig(max_steps=max_steps, micro_batch_tokens=64, dtype="float32"),
        evaluation=EvaluationConfig(max_tokens=256),
    )


def compose_config(overrides: list[str]) -> RunConfig:
    """The configuration that the command line `launch/pretrain.py *overrides` makes."""
    ConfigStore.instance().store(name="config_schema", node=RunConfig)
    with initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return to_dataclass(compose("config", overrides), RunConfig)


def text01_data(path: str = "none") -> list[str]:
    """What the recipe text01 cannot know, as overrides."""
    return [f"data.sources.{name}.path={path}" for name in ("corpus", "long_qa")]


def as_overrides(config: RunConfig) -> list[str]:
    """`tiny_config`'s values as command-line overrides of the recipe text01_tiny."""
    groups = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(groups, dict)
    overrides = [f"seed={config.seed}", "~data.sources.stdlib"]
    for name in ("model", "optim", "parallel", "trainer", "checkpoint", "evaluation"):
        for key, value in groups[name].items():
            shown = json.dumps(value).replace('"', "") if isinstance(value, dict) else value
            overrides.append(f"{name}.{key}={'null' if value is None else shown}")
    overrides.append(f"data.seq_len={config.data.seq_len}")
    overrides.append(f"data.global_batch_tokens={config.data.global_batch_tokens}")
    for name, source in config.data.sources.items():
        overrides.append(f"+data.sources={{{name}: {{path: '{source.path}'}}}}")
    overrides.append(f"schedule.warmup_steps={config.schedule.warmup_steps}")
    phases = json.dumps(groups["schedule"]["phases"]).replace('"', "")
    return [*overrides, f"schedule.phases={phases}"]


def prepare_tiny_data(folder: Path) -> Path:
    """A prepared folder of some thousand tokens: documents of one word and of several rows."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 6))) for _ in range(60)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    lines = []
    for _ in range(400):
        length = chance.choice([1, 2, 5, 12, 30, 80])
        lines.append(" ".join(chance.choices(words, weights, k=length)))
    text = folder / "text.txt"
    text.write_text("\n".join(lines))
    prepare(
        PrepareConfig(
            input=str(text),
            output=str(folder / "prepared"),
            tokenizer="train",
            vocab_size=VOCAB_SIZE,
            document_per="line",
            validation_fraction=0.1,
            num_workers=1,
        ),
        console=Console(quiet=True),
    )
    return folder / "prepared"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, whole, read by DCP alone."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=torch.float32)
        if not name.startswith("rng.")
        else torch.zeros(entry.size, dtype=torch.uint8)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
