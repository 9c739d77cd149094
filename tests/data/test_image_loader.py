"""Documents with images in the loader: their tokens, labels, tiles, accounts, order and resume."""

import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.crashing import crash_on_three
from support.folders import write_folder
from support.loaders import open_loader as open_small_loader
from support.loaders import take
from support.pictures import encoded, picture, prepare, write_jsonl

from fulmen.data.config import SourceConfig
from fulmen.data.image_decoding import ImageDecoder, TileJob
from fulmen.data.image_shards import StoredImage
from fulmen.data.images import ImageLimits, image_tiles
from fulmen.data.loader import PackedLoader, StepBatch, evaluation_batches
from fulmen.data.micro_batches import check_vision
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer
from fulmen.data.workers import Workers
from fulmen.models.image_layout import Tiling, image_layout
from fulmen.trainer.reading.questions import _read_image

SEQ_LEN, MICRO, BATCH = 128, 256, 1024
Sources = dict[str, SourceConfig]


def records(folder: Path, count: int) -> list[dict[str, Any]]:
    """Captions, conversations of several images, text alone, and pairs; images of many shapes."""
    folder.mkdir()
    made: list[dict[str, Any]] = []
    for number in range(count):
        names = []
        for place in range(number % 3 or 1):
            names.append(f"{number}-{place}.png")
            size = 20 + number * 7 % 60, 20 + (number + place) * 13 % 60
            image = picture(*size, seed=10 * number + place)
            (folder / names[-1]).write_bytes(encoded(image))
        question = {"role": "user", "content": f"what is {number} " + "<image>" * len(names)}
        answer = {"role": "assistant", "content": f"it is {number}"}
        kind = number % 5
        if kind == 0:
            made.append({"text": f"picture {number}", "images": names})
        elif kind == 1:
            made.append({"messages": [question, answer], "images": names})
        elif kind == 2:
            more = [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
            made.append({"messages": [question, answer, *more], "images": names})
        elif kind == 3:
            made.append({"messages": [{"role": "user", "content": "hi"}, answer]})
        else:
            prompt = question["content"]
            made.append({"prompt": prompt, "chosen": "yes yes", "rejected": "no", "images": names})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in several shards, a tenth or so held out."""
    path = tmp_path_factory.mktemp("images")
    made = records(path / "raw", 60)
    write_jsonl(path / "raw" / "x.jsonl", made)
    manifest = prepare(
        str(path / "raw"), path / "out", shard_tokens=1500, validation_fraction=0.15,
        max_tokens=SEQ_LEN,
    )  # fmt: skip
    assert manifest["rejected"] < 20
    assert manifest["splits"]["train"]["pairs"] > 4
    assert manifest["splits"]["valid"]["documents"] > 3
    assert len(manifest["splits"]["train"]["shards"]) > 1
    return path / "out"


@pytest.fixture(scope="module")
def sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The folder beside text, by one tokenizer."""
    text = tmp_path_factory.mktemp("text") / "text"
    rng = np.random.default_rng(1)
    documents = [rng.integers(10, 250, rng.integers(1, 300)).tolist() for _ in range(50)]
    sha256 = read_manifest(folder)["tokenizer"]["sha256"]
    write_folder(text, documents, vocab_size=300, tokenizer_sha256=sha256)
    return {"pictures": SourceConfig(str(folder), 3.0), "text": SourceConfig(str(text), 1.0)}


def open_loader(sources: Sources, **options: Any) -> PackedLoader:
    sizes: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "micro_batch_tokens": MICRO,
        "batch_tokens": lambda tokens: BATCH,
        "vocab_size": 300,
    }
    return open_small_loader(sources, **(sizes | options))


def assert_same(left: PackedBatch, right: PackedBatch) -> None:
    assert (left.num_tokens, left.pairs) == (right.num_tokens, right.pairs)
    for name in ("input_ids", "labels", "cu_seqlens", "sources"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert left.images is not None
    assert right.images is not None
    assert left.images.images == right.images.images
    assert torch.equal(left.images.tiles, right.images.tiles)
    assert left.images.failures == right.images.failures == ()


def facts(step: StepBatch) -> tuple[Any, ...]:
    return (
        step.num_tokens, step.num_labels, step.sum_squared_lengths, step.num_images, step.num_tiles,
        step.num_image_tokens, step.num_pairs, step.account, step.digest, step.state,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dp_size", "image_workers", "prefetch"), [(1, 2, 2), (2, 0, 0), (4, 0, 1)]
)
def test_same_on_every_mesh(
    sources: Sources, dp_size: int, image_workers: int, prefetch: int
) -> None:
    wanted = take(open_loader(sources), 4)
    for rank in range(dp_size):
        options = {"image_workers": image_workers, "prefetch_steps": prefetch}
        got = take(open_loader(sources, dp_rank=rank, dp_size=dp_size, **options), 4)
        for step, whole in zip(got, wanted, strict=True):
            assert facts(step) == facts(whole)
            for pair in zip(step.micro_batches, whole.micro_batches[rank::dp_size], strict=True):
                assert_same(*pair)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_resume_in_the_middle(sources: Sources, dp_size: int) -> None:
    wanted = take(open_loader(sources), 12)
    # Through JSON, as a checkpoint stores it.
    state = json.loads(json.dumps(wanted[4].state))
    got = take(open_loader(sources, state=state, dp_size=dp_size), 7)
    for step, whole in zip(got, wanted[5:], strict=True):
        assert facts(step) == facts(whole)
        for pair in zip(step.micro_batches, whole.micro_batches[::dp_size], strict=True):
            assert_same(*pair)


@pytest.mark.parametrize("text", ["a_text", "text"])
def test_each_step_adds_up(sources: Sources, folder: Path, text: str) -> None:
    """Whichever source comes first."""
    image_id = read_manifest(folder)["special_ids"]["image"]
    named = {"pictures": sources["pictures"], text: sources["text"]}
    drawn = dict.fromkeys(named, 0)
    for step in take(open_loader(named), 12):
        batches = step.micro_batches
        images = [batch.images for batch in batches if batch.images is not None]
        assert step.num_tokens == sum(batch.num_tokens for batch in batches)
        assert step.num_labels == sum(int((batch.labels != -100).sum()) for batch in batches)
        for number, name in enumerate(sorted(named)):
            mine = [batch.labels[batch.sources == number] for batch in batches]
            assert step.labels[name] == sum(int((labels != -100).sum()) for labels in mine)
        squares = 0
        for batch in batches:
            lengths = batch.cu_seqlens.diff().tolist()
            squares += sum(n * n for n in lengths) - (MICRO - batch.num_tokens) ** 2
        assert step.sum_squared_lengths == squares
        assert step.num_images == sum(len(one.images) for one in images) > 0
        assert step.num_tiles == sum(one.num_tiles for one in images)
        assert step.num_tiles == sum(len(one.tiles) for one in images)
        assert step.num_pairs == sum(len(batch.pairs) for batch in batches)
        counted = sum(int((batch.input_ids == image_id).sum()) for batch in batches)
        assert step.num_image_tokens == counted
        for name, row in step.account.items():
            drawn[name] += sum(row.values())
    assert abs(drawn["pictures"] - 3 * drawn[text]) < 4 * 3 * SEQ_LEN * 3


def test_tokens_and_tiles_lie_together(sources: Sources, folder: Path) -> None:
    """Each image's tokens are where it says, and its tiles are those of its own bytes."""
    ids = read_manifest(folder)["special_ids"]
    tiling = PreparedSplit(folder, "train", name="x", vocab_size=300).images.tiling  # type: ignore[union-attr]
    seen = 0
    for step in take(open_loader(sources), 6):
        for batch in step.micro_batches:
            assert batch.images is not None
            here = torch.zeros(MICRO, dtype=torch.bool)
            first_tile = 0
            for image in batch.images.images:
                span = slice(image.first, image.first + image.layout.num_tokens)
                assert not here[span].any()
                here[span] = True
                data = Path(image.path).read_bytes()
                data = data[image.offset : image.offset + image.num_bytes]
                tiles, layout = image_tiles(data, tiling, ImageLimits())
                assert layout == image.layout
                held = batch.images.tiles[first_tile : first_tile + len(tiles)]
                assert np.array_equal(held.numpy(), tiles)
                first_tile += len(tiles)
                # No document ends inside an image.
                assert not any(span.start < e < span.stop for e in batch.cu_seqlens.tolist())
                seen += 1
            assert torch.equal(here, batch.input_ids[0] == ids["image"])
            assert not (here.roll(-1)[:-1] & (batch.labels[0, :-1] != -100)).any()
    assert seen > 30


def test_only_answers_have_labels(folder: Path) -> None:
    """The labels' text, document by document: answers, ends of turns, and captions."""
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    ids = read_manifest(folder)["special_ids"]
    sources = {"pictures": SourceConfig(str(folder), 1.0)}
    texts: set[str] = set()
    for step in take(open_loader(sources), 8):
        for batch in step.micro_batches:
            chosen = {pair.document for pair in batch.pairs}
            bounds = batch.cu_seqlens.tolist()
            for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
                if begin >= batch.num_tokens:
                    continue
                assert batch.labels[0, end - 1] == -100
                labels = [one for one in batch.labels[0, begin:end].tolist() if one != -100]
                text = tokenizer.decode(labels, skip_special_tokens=False)
                if number in chosen:
                    assert text == "yes yes<end_of_sentence>"
                elif number - 1 in chosen:
                    assert text == "no<end_of_sentence>"
                else:
                    texts.add("".join(c for c in text if not c.isdigit()))
                # Labels are the next tokens.
                inside = batch.labels[0, begin : end - 1]
                wanted = batch.input_ids[0, begin + 1 : end]
                assert torch.equal(inside[inside != -100], wanted[inside != -100])
                assert batch.input_ids[0, end - 1] == ids["end_of_document"]
    assert texts == {
        "picture <end_of_document>",
        "it is <end_of_sentence>",
        "it is <end_of_sentence>yes<end_of_sentence>",
    }


def test_pairs_share_their_prompt_and_their_image(folder: Path) -> None:
    found = 0
    for step in take(open_loader({"pictures": SourceConfig(str(folder), 1.0)}), 8):
        for batch in step.micro_batches:
            assert batch.images is not None
            bounds = batch.cu_seqlens.tolist()
            for pair in batch.pairs:
                first, middle, end = bounds[pair.document : pair.document + 3]
                left, right = batch.input_ids[0, first:middle], batch.input_ids[0, middle:end]
                prompt = int((batch.labels[0, first:middle] != -100).nonzero()[0]) + 1
                assert torch.equal(left[:prompt], right[:prompt])
                images = batch.images.images
                here = [one for one in images if first <= one.first < middle]
                there = [one for one in images if middle <= one.first < end]
                assert len(here) == len(there) > 0
                for a, b in zip(here, there, strict=True):
                    assert (a.path, a.offset, a.first - first) == (
                        b.path,
                        b.offset,
                        b.first - middle,
                    )
                found += 1
    assert found > 5


def test_ranks_share_the_tiles_of_a_micro_batch(sources: Sources) -> None:
    (whole,) = take(open_loader(sources), 1)
    parts = [take(open_loader(sources, tile_part=(part, 3)), 1)[0] for part in range(3)]
    for place, batch in enumerate(whole.micro_batches):
        assert batch.images is not None
        mine = [part.micro_batches[place].images for part in parts]
        sizes = [len(one.tiles) for one in mine if one is not None]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([one.tiles for one in mine if one]), batch.images.tiles)
        assert [one.first_tile for one in mine if one] == np.cumsum([0, *sizes[:-1]]).tolist()


def test_an_image_lost_later_is_black(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan stays: tokens are those of the whole folder, only pixels are missing."""
    sources = {"pictures": SourceConfig(str(folder), 1.0)}
    wanted = take(open_loader(sources), 2)
    damaged = shutil.copytree(folder, tmp_path / "copy")
    loader = open_loader({"pictures": SourceConfig(str(damaged), 1.0)})
    for path in damaged.glob("train-*.img"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(b"\0" * (size // 4))
            file.truncate(size * 7 // 8)
    with caplog.at_level(logging.WARNING, "fulmen.data"):
        got = take(loader, 2)
    failures = [
        one for step in got for batch in step.micro_batches if batch.images
        for one in batch.images.failures
    ]  # fmt: skip
    assert failures
    assert len(caplog.records) == len(failures)
    assert str(damaged) in failures[0]
    whole = 0
    for step, other in zip(got, wanted, strict=True):
        assert facts(step) == facts(other)
        for left, right in zip(step.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert left.images is not None
            assert right.images is not None
            assert left.images.tiles.shape == right.images.tiles.shape
            same = (left.images.tiles == right.images.tiles).flatten(1).all(1)
            assert not left.images.tiles[~same].any(), "what differs is black"
            whole += int(same.sum())
    assert whole


def test_evaluation_reads_whole_documents(folder: Path) -> None:
    split = PreparedSplit(folder, "valid", name="x", vocab_size=300)
    lengths = split.lengths(np.arange(split.num_documents))
    enough = list(
        evaluation_batches(split, seq_len=SEQ_LEN, micro_batch_tokens=MICRO, max_tokens=10**6)
    )
    assert sum(batch.num_tokens for batch in enough) == sum(lengths)
    assert sum(len(batch.images.images) for batch in enough if batch.images) > 3
    some = list(
        evaluation_batches(
            split, seq_len=SEQ_LEN, micro_batch_tokens=MICRO, max_tokens=sum(lengths[:3]) - 1
        )
    )
    assert sum(batch.num_tokens for batch in some) == sum(lengths[:2])


def test_wrong_settings_are_named(sources: Sources, folder: Path, tmp_path: Path) -> None:
    longest = read_manifest(folder)["splits"]["train"]["longest"]
    with pytest.raises(ValueError, match=f"of {longest} tokens.*data.seq_len"):
        open_loader(sources, seq_len=32)
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    lines = [{"text": "x", "image": "a.png"}]
    write_jsonl(tmp_path / "x.jsonl", lines)
    prepare(str(tmp_path), tmp_path / "other", tokenizer=str(folder), tile_size=42)
    other = {"other": SourceConfig(str(tmp_path / "other"), 1.0)}
    with pytest.raises(ValueError, match=r"other.*pictures.*different tile_size \(42 and 28\)"):
        open_loader({"pictures": sources["pictures"]} | other)


def test_a_model_must_fit(folder: Path) -> None:
    split = PreparedSplit(folder, "train", name="x", vocab_size=300)
    check_vision([split], Tiling(28, 14), 1)
    for tiling, image_id, message in (
        (Tiling(56, 14), 1, "tile_size=56.*x was prepared with 28"),
        (Tiling(28, 7), 1, "patch_size=7.*with 14"),
        (Tiling(28, 14), 5, "image_token_id=5.*with 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_vision([split], tiling, image_id)


@pytest.mark.slow
def test_a_killed_worker_costs_its_job_alone() -> None:
    workers = Workers(2)
    got = list(workers.map(crash_on_three, range(12), lost=lambda number: -number))
    assert got == [0, 10, 20, -3, 40, 50, 60, 70, 80, 90, 100, 110]
    assert list(workers.map(crash_on_three, [1], lost=lambda number: -number)) == [10]
    workers.close()


def test_decoder_counts(folder: Path) -> None:
    split = PreparedSplit(folder, "train", name="x", vocab_size=300)
    assert split.images is not None
    images: Sequence[Any] = [one for place in range(4) for one in split.images.images(0, place)]
    decoder = ImageDecoder()
    tiles = list(decoder.tiles([TileJob(one, 0, 1) for one in images]))
    assert len(tiles) == len(images)
    assert all(problem == "" and pixels.any() for pixels, problem in tiles)
    assert decoder.failures == 0


def test_a_tiff_that_was_turned_twice_is_black(folder: Path, tmp_path: Path) -> None:
    """As an earlier fulmen put it into its index: 40 x 24 pixels of what is 24 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "one.img"
    path.write_bytes(encoded(picture(40, 24), "TIFF", exif=exif))
    split = PreparedSplit(folder, "train", name="x", vocab_size=300)
    assert split.images is not None
    size = path.stat().st_size
    for (width, height), right in (((24, 40), True), ((40, 24), False)):
        layout = image_layout(width, height, split.images.tiling)
        image = StoredImage(str(path), 0, size, 0, width, height, layout)
        [(tiles, problem)] = ImageDecoder().tiles([TileJob(image, 0, 1)])
        assert tiles.any() == right
        assert problem == "" if right else "40 x 24 in its index: prepare the folder" in problem
        assert (_read_image(image).getextrema() == ((0, 0),) * 3) != right
