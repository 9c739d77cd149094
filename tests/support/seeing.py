"""The smallest run that sees: conversations about pictures, and a model with a tower."""

from pathlib import Path

from fulmen.data.shards import read_manifest
from fulmen.models.config import VisionConfig
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.config import RunConfig
from support.pictures import encoded, picture, prepare, write_jsonl
from support.tiny import tiny_config


def write_conversations(
    folder: Path, *, answer: str = "it is {}, no more and no less", count: int = 60
) -> Path:
    """A prepared folder; some conversations have no image, some several."""
    (folder / "raw").mkdir(parents=True)
    records = []
    for number in range(count):
        names = [f"{number}-{place}.png" for place in range(number % 4)]
        for place, name in enumerate(names):
            size = 20 + number * 7 % 60, 20 + (number + place) * 13 % 60
            data = encoded(picture(*size, seed=10 * number + place))
            (folder / "raw" / name).write_bytes(data)
        question = {"role": "user", "content": f"what is {number} " + "<image>" * len(names)}
        said = {"role": "assistant", "content": answer.format(number)}
        records.append({"messages": [question, said], "images": names})
    write_jsonl(folder / "raw" / "x.jsonl", records)
    prepare(str(folder / "raw"), folder / "out", validation_fraction=0.2, max_tokens=128)
    return folder / "out"


def seeing_config(images: Path, cp: int = 1, zero_stage: int = 1) -> RunConfig:
    """A run on such a folder."""
    config = tiny_config(images, max_steps=4)
    config.data.seq_len, config.data.global_batch_tokens = 128, 512
    config.trainer.micro_batch_tokens = 128
    config.parallel = ParallelConfig(cp=cp, zero_stage=zero_stage)
    config.model.vision = tiny_vision(images)
    return config


def tiny_vision(images: Path) -> VisionConfig:
    """A tower for tiles of four patches, as `prepare` cuts them."""
    return VisionConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        mlp_hidden_size=24,
        tile_size=28,
        patch_size=14,
        image_token_id=read_manifest(images)["special_ids"]["image"],
        max_tiles_per_side=3,
        max_tiles=6,
    )
