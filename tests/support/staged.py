"""The smallest run that has stages: two sources, documents of three lengths, four stages."""

import random
from pathlib import Path

from fulmen.data.config import SourceConfig
from fulmen.trainer.config import PhaseConfig, RunConfig, ScheduleConfig, StageConfig
from support.folders import write_folder
from support.tiny import VOCAB_SIZE, tiny_config

BOUNDS = [24, 72]
SAVE_EVERY = 3


def write_sources(folder: Path) -> None:
    """Prepared folders `text` and `qa`, with documents of 1 to 200 tokens."""
    chance = random.Random(0)
    for name, count in (("text", 600), ("qa", 200)):
        documents = [
            [
                chance.randrange(VOCAB_SIZE)
                for _ in range(chance.choice([1, 9, 23, 24, 50, 90, 200]))
            ]
            for _ in range(count)
        ]
        path = write_folder(
            folder / name, documents[20:], documents[:20], vocab_size=VOCAB_SIZE, num_shards=2
        )
        (path / "tokenizer.json").write_text("{}")


def staged_config(data: Path) -> RunConfig:
    """Four stages of a few steps each, on two processes; cp 1, 1, 2, 2."""
    config = tiny_config(data / "text")
    config.data.sources["qa"] = SourceConfig(str(data / "qa"), 0.0)
    config.data.length_bounds = BOUNDS
    config.trainer.max_steps = None
    config.checkpoint.every_steps = SAVE_EVERY
    config.checkpoint.keep = 2
    config.evaluation.every_steps = 4
    constant = ScheduleConfig(warmup_steps=2, phases=[PhaseConfig(10_000, 0.5)])
    config.stages = {
        "start": StageConfig(tokens=1500),
        "to_64": StageConfig(
            tokens=1400,
            seq_len=64,
            rope_theta=5e4,
            schedule=constant,
            lengths={"short": 0.3, "medium": 0.7},
            transition_tokens=600,
            late_weights={"qa": 0.2},
        ),
        "to_128": StageConfig(
            tokens=2000,
            seq_len=128,
            rope_theta=1e5,
            global_batch_tokens=512,
            micro_batch_tokens=128,
            schedule=constant,
            lengths={"short": 0.3, "medium": 0.3, "long": 0.4},
            transition_tokens=600,
            late_weights={"qa": 0.2},
            parallel={"cp": 2},
        ),
        "to_256": StageConfig(
            tokens=2000,
            seq_len=256,
            rope_theta=1e5,
            global_batch_tokens=512,
            micro_batch_tokens=256,
            schedule=constant,
            lengths={"short": 0.2, "medium": 0.2, "long": 0.6},
            transition_tokens=600,
            late_weights={"qa": 0.2},
            parallel={"cp": 2, "ep": 2},
            trainer={"activation_checkpointing": "full"},
        ),
    }
    return config
