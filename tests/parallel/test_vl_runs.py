"""Runs of a model that sees, on prepared images: equal losses on any mesh."""

from pathlib import Path

import pytest
from support.pictures import encoded, picture, prepare, write_jsonl
from support.tiny import tiny_config
from support.worlds import run_world
from test_sequence import held_out_losses, losses_of

from fulmen.data.shards import read_manifest
from fulmen.models.config import VisionConfig
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.config import RunConfig

MESHES = [(2, 2, 1), (4, 2, 3)]
"""(processes, cp, ZeRO stage)."""


def config_of(images: Path, cp: int, zero_stage: int) -> RunConfig:
    config = tiny_config(images, max_steps=4)
    config.data.seq_len, config.data.global_batch_tokens = 128, 512
    config.trainer.micro_batch_tokens = 128
    config.parallel = ParallelConfig(cp=cp, zero_stage=zero_stage)
    config.log.every_steps, config.evaluation.every_steps = 1, 2
    config.model.vision = VisionConfig(
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
    return config


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions and conversations; some documents have no image, some several."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "raw").mkdir()
    records = []
    for number in range(60):
        names = [f"{number}-{place}.png" for place in range(number % 4)]
        for place, name in enumerate(names):
            size = 20 + number * 7 % 60, 20 + (number + place) * 13 % 60
            data = encoded(picture(*size, seed=10 * number + place))
            (folder / "raw" / name).write_bytes(data)
        question = {"role": "user", "content": f"what is {number} " + "<image>" * len(names)}
        answer = {"role": "assistant", "content": f"it is {number}, no more and no less"}
        records.append({"messages": [question, answer], "images": names})
    write_jsonl(folder / "raw" / "x.jsonl", records)
    prepare(str(folder / "raw"), folder / "out", validation_fraction=0.2, max_tokens=128)
    return folder / "out"


@pytest.mark.slow
def test_runs_on_images_equal_one_rank(images: Path, tmp_path: Path) -> None:
    wanted = run_world(losses_of, 1, config_of(images, 1, 1), tmp_path / "one")[0]
    assert len(wanted) == 4
    for size, cp, stage in MESHES:
        name = f"{size}-{cp}-{stage}"
        config = config_of(images, cp, stage)
        config.data.image_workers = size % 4
        got = run_world(losses_of, size, config, tmp_path / name)[0]
        for mine, one in zip(got, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-5), name
        ours, theirs = (held_out_losses(tmp_path / folder) for folder in (name, "one"))
        assert len(theirs) == 2
        assert ours == pytest.approx(theirs, rel=1e-5)
