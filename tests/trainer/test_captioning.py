"""Runs that train a tower on prepared captions: batches, meshes, resumption, zero-shot, size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captioned import tiny_coca
from support.pictures import encoded, picture, prepare, write_jsonl
from support.tiny import read_checkpoint, tiny_config
from support.worlds import run_world

from fulmen.data.config import SourceConfig
from fulmen.data.loader import evaluation_batches
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer
from fulmen.models.coca import Captions, CoCa
from fulmen.models.vision import VisionTower
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.caption_inputs import caption_inputs, check_captions, most_pairs
from fulmen.trainer.config import RunConfig, StageConfig, ZeroShotConfig, check_config
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.resize_tower import POSITIONS, resize_tower
from fulmen.trainer.zero_shot import classify_by_checkpoint

WORDS = ("red", "deep blue", "a green one")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Captions of 2 to 8 words, which are cut, and the words alone as names of classes."""
    raw = tmp_path_factory.mktemp("raw")
    captions, classes = [], []
    for number in range(90):
        name = f"{number}.png"
        (raw / name).write_bytes(encoded(picture(20 + number % 30, 30, seed=number)))
        word = WORDS[number % 3]
        more = "".join(f" {number * place % 97}" for place in range(8 * (number % 4)))
        captions.append({"text": f"{word} number {number}{more}", "image": name})
        classes.append({"text": word, "image": name})
    write_jsonl(raw / "captions.jsonl", captions)
    write_jsonl(raw / "classes.jsonl", classes[:40])
    write_jsonl(raw / "talk.jsonl", [
        {"messages": [{"role": "user", "content": "what <image>"},
                      {"role": "assistant", "content": "it"}], "images": [f"{n}.png"]}
        for n in range(5)
    ])  # fmt: skip
    out = tmp_path_factory.mktemp("prepared")
    made = {name: out / name for name in ("captions", "classes", "talk", "long", "dynamic")}
    options: dict[str, Any] = {"resolution": "fixed", "max_caption_tokens": 20}
    prepare(str(raw / "captions.jsonl"), made["captions"], validation_fraction=0.3, **options)
    options["tokenizer"] = str(made["captions"])
    prepare(str(raw / "classes.jsonl"), made["classes"], validation_fraction=1.0, **options)
    prepare(str(raw / "talk.jsonl"), made["talk"], **options)
    prepare(str(raw / "captions.jsonl"), made["long"], **options | {"max_caption_tokens": None})
    prepare(str(raw / "captions.jsonl"), made["dynamic"], **options | {"resolution": "dynamic"})
    return made


def config_of(folders: dict[str, Path], **changes: Any) -> RunConfig:
    """Steps of 4 micro-batches of 96 tokens."""
    config = tiny_config(folders["captions"], max_steps=4)
    image_token_id = read_manifest(folders["captions"])["special_ids"]["image"]
    config.objective = "coca"
    config.model = tiny_coca(301, image_token_id)
    config.data.seq_len, config.data.global_batch_tokens = 48, 384
    config.data.sources = {"captions": SourceConfig(path=str(folders["captions"]))}
    config.trainer.micro_batch_tokens = 96
    config.log.every_steps, config.evaluation.every_steps = 1, 2
    config.evaluation.max_tokens = 300
    config.evaluation.zero_shot = {
        "words": ZeroShotConfig(str(folders["classes"]), ["{}", "it is {} number"])
    }
    return replace(config, **changes)


def rows_of(
    device: torch.device, config: RunConfig, run_dir: Path, stop: int | None = None
) -> list[dict[str, Any]]:
    """Rows of a run, or of its first steps."""
    run_dir.mkdir(exist_ok=True)
    if stop is not None:
        config.trainer.max_steps = stop
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    try:
        trainer.fit()
    finally:
        trainer.close()
    rows = list(read_metrics(run_dir / "metrics.jsonl"))
    if trainer.mesh.rank == 0:  # what steps were judged by
        losses = [row["loss"] for row in rows if "loss" in row]
        assert trainer.health.state()["losses"] == pytest.approx(losses, rel=1e-6)
    return rows


def values(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Losses and what is evaluated."""
    names = ("loss", "caption_loss", "contrastive_loss", "contrastive_accuracy", "temperature")
    kept = [
        {k: v for k, v in row.items() if k in (*names, "grad_norm") or k.startswith("eval_")}
        for row in rows
    ]
    assert len(kept) == 6
    assert all(len(row) in (5, 6) for row in kept)
    return [list(row.values()) for row in kept]


@pytest.mark.slow
def test_meshes_and_resumption(folders: dict[str, Path], tmp_path: Path) -> None:
    """As long as as many pairs are compared, whoever has them; and bit for bit in two parts."""
    large = config_of(folders)
    large.trainer.micro_batch_tokens = 384
    wanted = run_world(rows_of, 1, large, tmp_path / "one")[0]
    assert wanted[0]["contrastive_loss"] > 1
    assert wanted[-2]["loss"] < wanted[0]["loss"]
    config = config_of(folders, parallel=ParallelConfig(zero_stage=3))
    config.trainer.micro_batch_tokens, config.data.image_workers = 192, 2
    got = run_world(rows_of, 2, config, tmp_path / "two")[0]
    for mine, theirs in zip(values(got), values(wanted), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    # Four smaller contrasts are another loss.
    apart = run_world(rows_of, 1, config_of(folders), tmp_path / "apart")[0]
    assert apart[0]["caption_loss"] == pytest.approx(wanted[0]["caption_loss"], rel=1e-5)
    assert apart[0]["contrastive_loss"] < wanted[0]["contrastive_loss"] - 0.5

    parts = tmp_path / "parts"
    run_world(rows_of, 1, config_of(folders), parts, 2)
    run_world(rows_of, 1, config_of(folders), parts)
    whole, again = (
        read_checkpoint(path / "checkpoints" / "step_4") for path in (tmp_path / "apart", parts)
    )
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def classified(device: torch.device, checkpoint: Path) -> dict[str, float]:
    mesh = build_mesh(ParallelConfig(), device)
    return classify_by_checkpoint(checkpoint, None, dtype=torch.float32, mesh=mesh)


@pytest.mark.slow
def test_a_tower_goes_on_with_larger_tiles(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(folders)
    rows = run_world(rows_of, 1, config, tmp_path / "small", 1)[0]
    small = tmp_path / "small" / "checkpoints" / "step_1"
    (found,) = run_world(classified, 1, small)
    assert found == {"words": rows[-1]["eval_zero_shot/words"]}
    resize_tower(small, tmp_path / "large", 42)
    assert config.model.vision is not None
    vision = replace(config.model.vision, tile_size=42)
    towers = {}
    for path, shape in ((small, config.model.vision), (tmp_path / "large", vision)):
        weights = {n.removeprefix("model."): t for n, t in read_checkpoint(path).items()}
        towers[path.name] = VisionTower(shape)
        state = {
            name.removeprefix("vision_tower."): tensor
            for name, tensor in weights.items()
            if name.startswith("vision_tower.")
        }
        towers[path.name].load_state_dict(state)
    assert weights[POSITIONS].shape == (10, 16)
    pixels = torch.randn(2, 3, 42, 42)
    # As the tower would have resized them itself, as CLIP does: see test_vision.py.
    assert torch.equal(towers["step_1"](pixels), towers["large"](pixels))

    with pytest.raises(ValueError, match=r"tile_size=40: must be a multiple of .*patch_size=14"):
        resize_tower(small, tmp_path / "odd", 40)
    prepared = tmp_path / "prepared"
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "0.png").write_bytes(encoded(picture(seed=1)))
    write_jsonl(raw / "x.jsonl", [{"text": f"number {n}", "image": "0.png"} for n in range(30)])
    prepare(
        str(raw), prepared, resolution="fixed", tile_size=42, tokenizer=str(folders["captions"])
    )
    config.model.vision = vision
    config.data.sources = {"captions": SourceConfig(path=str(prepared))}
    config.evaluation.every_steps, config.trainer.max_steps = None, 1
    config.evaluation.zero_shot = {}
    config.checkpoint.resume = str(tmp_path / "large")
    (row,) = run_world(rows_of, 1, config, tmp_path / "goes_on")[0]
    assert row["step"] == 1


def first_batch(folder: Path, config: RunConfig, dp_size: int = 1) -> Any:
    split = PreparedSplit(folder, "valid", name="x", vocab_size=301)
    batches = evaluation_batches(
        split, seq_len=48, micro_batch_tokens=96, max_tokens=10**6, dp_rank=dp_size - 1,
        dp_size=dp_size,
    )  # fmt: skip
    return list(batches)[-1 if dp_size > 1 else 0]


@pytest.mark.fast
def test_inputs_are_the_captions(folders: dict[str, Path]) -> None:
    config = config_of(folders)
    batch = first_batch(folders["captions"], config)
    pixels, captions = caption_inputs(batch, config.model, torch.device("cpu"))
    tokenizer = load_tokenizer(str(folders["captions"] / "tokenizer.json"))
    ends = read_manifest(folders["captions"])["special_ids"]["end_of_document"]
    image = read_manifest(folders["captions"])["special_ids"]["image"]
    bounds = batch.cu_seqlens.tolist()
    assert pixels.shape == (len(captions.lengths), 3, 28, 28)
    assert captions.labels is not None
    assert 3 <= len(captions.lengths) <= most_pairs(config.model, 96)
    assert captions.lengths.max() == 20  # cut
    for number, length in enumerate(captions.lengths.tolist()):
        ids = captions.input_ids[number, :length].tolist()
        labels = captions.labels[number].tolist()
        assert ids[0] == image
        assert labels[: length - 1] == ids[1:]
        assert labels[length - 1] == ends
        assert set(labels[length:]) <= {-100}
        begin, end = bounds[number : number + 2]
        assert [*ids[1:], ends] == batch.input_ids[0, begin + 4 : end].tolist()
        assert tokenizer.decode(ids[1:]).startswith(WORDS)
    # The last rank of many has padding alone: a row that does not count.
    nothing = caption_inputs(
        first_batch(folders["captions"], config, dp_size=97), config.model, torch.device("cpu")
    )
    assert nothing[0].shape == (1, 3, 28, 28)
    assert nothing[1].count == 0


def zero_shot(device: torch.device, config: RunConfig, run_dir: Path) -> tuple[float, float]:
    """Accuracy as evaluated, and image by image."""
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    try:
        got = trainer.objective.evaluate()["zero_shot/words"]
        weights = {name: p.full_tensor() for name, p in trainer.engine.parameters.items()}
    finally:
        trainer.close()
    model = CoCa(config.model)
    model.load_state_dict(weights)
    settings = config.evaluation.zero_shot["words"]
    split = PreparedSplit(settings.path, "valid", name="words", vocab_size=301)
    tokenizer = load_tokenizer(str(Path(settings.path) / "tokenizer.json"))
    assert config.model.vision is not None

    def embed(text: str) -> torch.Tensor:
        ids = [config.model.vision.image_token_id, *tokenizer.encode(text).ids]
        return model(None, Captions(torch.tensor([ids]), torch.tensor([len(ids)])))[0]

    classes = torch.stack(
        [sum(embed(one.replace("{}", word)) for one in settings.templates) for word in WORDS]
    )
    classes = classes / classes.norm(dim=1, keepdim=True)
    right = []
    for batch in evaluation_batches(split, seq_len=48, micro_batch_tokens=48, max_tokens=10**6):
        pixels, captions = caption_inputs(batch, config.model, device)
        for image, ids, length in zip(
            pixels, captions.input_ids, captions.lengths.tolist(), strict=True
        ):
            word = tokenizer.decode(ids[1:length].tolist())
            scores = classes @ model(image[None])[0]
            right.append(WORDS[int(scores.argmax())] == word)
    assert len(right) == 40
    return got, sum(right) / 40


@pytest.mark.slow
def test_zero_shot_is_the_nearest_name(folders: dict[str, Path], tmp_path: Path) -> None:
    got, wanted = run_world(zero_shot, 1, config_of(folders), tmp_path)[0]
    assert got == pytest.approx(wanted)
    assert 0 < got < 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("dynamic", r"data\.sources\.x: .* no images of one tile each.*resolution=fixed"),
        ("talk", r"data\.sources\.x: .* has other documents: objective=coca learns from captions"),
        ("long", r"data\.sources\.x: .* document of \d+ tokens.*max_caption_tokens=20"),
    ],
)
def test_other_folders_are_refused(folders: dict[str, Path], folder: str, message: str) -> None:
    split = PreparedSplit(folders[folder], "train", name="x", vocab_size=301)
    with pytest.raises(ValueError, match=message):
        check_captions(split, config_of(folders).model)


@pytest.mark.fast
def test_other_documents_are_refused(folders: dict[str, Path]) -> None:
    split = PreparedSplit(folders["talk"], "train", name="x", vocab_size=301)
    (batch, *_) = evaluation_batches(split, seq_len=48, micro_batch_tokens=48, max_tokens=999)
    with pytest.raises(ValueError, match="one image of one tile and then its text"):
        caption_inputs(batch, config_of(folders).model, torch.device("cpu"))


def opening(device: torch.device, config: RunConfig, run_dir: Path) -> str:
    try:
        Trainer(config, build_mesh(config.parallel, device), run_dir)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.fast
def test_mistakes_in_zero_shot_are_told_by_key(folders: dict[str, Path], tmp_path: Path) -> None:
    for settings, wanted in (
        (ZeroShotConfig(str(folders["classes"]), ["number"]), r".templates=['number']: give"),
        (ZeroShotConfig(str(folders["talk"])), ": split 'valid'"),
        (ZeroShotConfig(str(tmp_path / "no")), ".path: data folder"),
    ):
        config = config_of(folders)
        config.evaluation.zero_shot = {"words": settings}
        said = run_world(opening, 1, config, tmp_path)[0]
        assert said.startswith(f"evaluation.zero_shot.words{wanted}"), said


@pytest.mark.fast
def test_what_a_later_stage_lacks_is_told_at_the_start(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def staged() -> RunConfig:
        config = config_of(folders)
        config.trainer.max_steps = None
        config.stages = {name: StageConfig(tokens=1500) for name in ("one", "two")}
        return config

    config = staged()
    config.stages["two"].evaluation = {"zero_shot": {"words": {"path": f"{tmp_path}/no"}}}
    said = run_world(opening, 1, config, tmp_path)[0]
    assert said.startswith("stages.two: evaluation.zero_shot.words.path: data folder"), said
    config = staged()
    config.data.sources["talk"] = SourceConfig(str(folders["talk"]), 0.0)
    config.stages["two"].weights = {"talk": 1.0, "captions": 1.0}
    config.evaluation.every_steps = None
    said = run_world(opening, 1, config, tmp_path)[0]
    assert said.startswith("stages.two: data.sources.talk: "), said
    config = config_of(folders)
    config.evaluation.reading.every_steps = 5
    with pytest.raises(ValueError, match=r"evaluation\.reading\.every_steps is not for objective"):
        check_config(config, 1)
