"""Prepare a folder of documents with images, whose lengths count the image tokens.

As prepare.py does for text: shards of consecutive records, each file in place when it is whole, a
manifest last, and a killed run goes on after its last shard. Every image is decoded once here, so
what training draws is known to be whole; its bytes are kept as they came, and decoded again by the
loader's workers.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from fulmen.data.buckets import length_histogram
from fulmen.data.config import PrepareImagesConfig
from fulmen.data.conversations import FIELDS, RecordError, parse_example
from fulmen.data.folder import PROGRESS, check_finished, keep_tokenizer, kept_shards, work_on
from fulmen.data.image_encoding import HEADERS, ImageEncodeSettings, SpecialIds, encode_all
from fulmen.data.image_reading import SUFFIXES, ReadLimits, read_fields, read_records
from fulmen.data.image_writing import ImageShardWriter
from fulmen.data.images import ImageLimits
from fulmen.data.prepare import REJECTED_FILE, num_workers, print_lengths
from fulmen.data.reading import InputFile, input_signature, list_input
from fulmen.data.shards import FORMAT_VERSION, MANIFEST, SPLITS, file_sha256, read_manifest
from fulmen.data.tokenise import (
    TOKENIZER_FILE,
    load_tokenizer,
    special_id,
    token_dtype,
    tokenizer_path,
    vocabulary_size,
)
from fulmen.data.writing import as_json, write_whole
from fulmen.models.image_layout import Tiling

_TOTALS = ("documents", "tokens", "images", "tiles", "image_tokens", "labels", "pairs")


def prepare_images(config: PrepareImagesConfig, *, console: Console) -> dict[str, Any]:
    """Write the folder `config.output`, or finish or recognise it, and return its manifest.

    Broken images and records are left out, counted by kind and listed in rejected.jsonl. Raises
    ValueError for settings that cannot be and for a folder that was begun with others.
    """
    _check_config(config)
    output = Path(config.output).resolve()
    files, held_out = _list_files(config, output)
    settings = _settings(config, files, len(held_out))
    if not (output / MANIFEST).exists():
        with work_on(output, settings):
            tokenizer = keep_tokenizer(
                output,
                config.tokenizer,
                lambda: _sample_texts(config, files),
                vocab_size=config.vocab_size,
                end_of_document=config.end_of_document,
                special_tokens=[config.image_token, config.begin_turn, config.end_turn],
                say=console.print,
            )
            shards = _write_shards(config, files, held_out, output, tokenizer, console)
            _finish(config, output, settings, tokenizer, shards, console)
    else:
        check_finished(output, settings)
        console.print(f"{output} is whole already, with the same settings: nothing to do")
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    return read_manifest(output)


def tiling_of(config: PrepareImagesConfig) -> Tiling:
    """The rules by which images become tiles."""
    max_tiles = 0 if config.resolution == "fixed" else config.max_tiles
    return Tiling(config.tile_size, config.patch_size, config.max_tiles_per_side, max_tiles)


def _check_config(config: PrepareImagesConfig) -> None:
    if not config.input:
        raise ValueError("input is empty: give a file, a glob, a folder, or a list of them")
    if config.resolution not in ("dynamic", "fixed"):
        raise ValueError(f"resolution={config.resolution} must be dynamic or fixed")
    if config.patch_size <= 0 or config.tile_size <= 0 or config.tile_size % config.patch_size:
        raise ValueError(
            f"tile_size={config.tile_size} must be a multiple of patch_size={config.patch_size}"
        )
    for key in ("max_tiles_per_side", "max_tiles", "max_image_pixels", "max_image_mb", "max_tokens",
                "shard_tokens", "shard_mb"):  # fmt: skip
        if getattr(config, key) <= 0:
            raise ValueError(f"{key}={getattr(config, key)} must be above 0")
    if config.max_caption_tokens is not None and config.max_caption_tokens < 2:
        raise ValueError(
            f"max_caption_tokens={config.max_caption_tokens} must be 2 or more, a token and the end"
        )
    if config.max_aspect_ratio < 1:
        raise ValueError(f"max_aspect_ratio={config.max_aspect_ratio} must be 1 or more")
    for key, least in (("validation_fraction", 0.0), ("max_rejected_fraction", 0.0)):
        if not least <= getattr(config, key) <= 1:
            raise ValueError(f"{key}={getattr(config, key)} must be in [0, 1]")
    if config.num_workers < 0:
        raise ValueError(f"num_workers={config.num_workers} must be 0 (every core) or more")
    for name in config.fields:
        if name not in FIELDS:
            raise ValueError(f"fields.{name}: the fields are {', '.join(FIELDS)}")
    if config.tokenizer != "train":
        _special_ids(load_tokenizer(str(tokenizer_path(config.tokenizer))), config)
    elif config.vocab_size < 260:
        raise ValueError(
            f"vocab_size={config.vocab_size} must be 260 or more: 256 bytes and four special tokens"
        )


def _special_ids(tokenizer: Tokenizer, config: PrepareImagesConfig) -> SpecialIds:
    keys = ("end_of_document", "image_token", "begin_turn", "end_turn")
    return SpecialIds(*(special_id(tokenizer, key, getattr(config, key)) for key in keys))


def _list_files(
    config: PrepareImagesConfig, output: Path
) -> tuple[list[InputFile], list[InputFile]]:
    """All files, those of `held_out` last, and these once more by themselves."""

    def listed(value: Any) -> list[InputFile]:
        inputs = [value] if isinstance(value, str) else list(value or [])
        return list_input(inputs, suffixes=SUFFIXES, document_per="file", output=output)

    held_out = listed(config.held_out)
    taken = {file.path for file in held_out}
    files = [file for file in listed(config.input) if file.path not in taken]
    for file in [*files, *held_out]:
        if not file.path.endswith(tuple(SUFFIXES)):
            raise ValueError(
                f"input: {file.path} is none of {', '.join(SUFFIXES)}: image files come in a tar, "
                "or named by a jsonl beside them"
            )
    if not files:
        raise ValueError("input: every file is in held_out")
    return files + held_out, held_out


def _settings(
    config: PrepareImagesConfig, files: Sequence[InputFile], num_held_out: int
) -> dict[str, Any]:
    """All that decides what is written, and nothing else."""
    settings = asdict(config)
    for key in ("input", "output", "held_out", "num_workers", "max_rejected_fraction"):
        del settings[key]
    if config.max_caption_tokens is None:  # as of folders from before there was this key
        del settings["max_caption_tokens"]
    settings["fields"] = dict(config.fields)
    if config.tokenizer != "train":
        settings["tokenizer"] = file_sha256(tokenizer_path(config.tokenizer))
        del settings["vocab_size"], settings["train_sample_mb"]
    return settings | {
        "input_files": len(files),
        "held_out_files": num_held_out,
        "input_bytes": sum(file.size_bytes for file in files),
        "input_signature": input_signature(files),
    }


def _read_limits(config: PrepareImagesConfig) -> ReadLimits:
    return ReadLimits(int(config.max_image_mb * 2**20), dict(config.fields))


def _sample_texts(config: PrepareImagesConfig, files: Sequence[InputFile]) -> Iterator[str]:
    """The headers of turns, and texts of the first records, each turn's behind its header."""
    yield from HEADERS.values()
    limits, left = _read_limits(config), config.train_sample_mb * 1e6
    for chunk in read_records(files, limits):
        for raw in chunk:
            try:
                fields, images = read_fields(raw, limits)
                example = parse_example(fields, len(images))
            except RecordError:
                continue
            for document in example.documents:
                for turn in document:
                    text = turn.text.encode("utf-8", "ignore").decode()
                    left -= len(text)
                    yield HEADERS.get(turn.role, "") + text
        if left <= 0:
            return


def _write_shards(
    config: PrepareImagesConfig,
    files: Sequence[InputFile],
    held_out: Sequence[InputFile],
    output: Path,
    tokenizer: Tokenizer,
    console: Console,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the records of all, in order."""
    shards = kept_shards(output)
    start: tuple[int, int] = tuple(shards[-1]["end"]) if shards else (0, 0)
    if shards:
        console.print(f"going on after {len(shards)} finished shard(s) of an interrupted run")
    encode = ImageEncodeSettings(
        tokenizer_file=str(output / TOKENIZER_FILE),
        ids=_special_ids(tokenizer, config),
        tiling=tiling_of(config),
        images=ImageLimits(config.max_image_pixels, config.max_aspect_ratio),
        reading=_read_limits(config),
        max_tokens=config.max_tokens,
        max_caption_tokens=config.max_caption_tokens,
        validation_fraction=config.validation_fraction,
        held_out_from=len(files) - len(held_out),
    )
    writer: ImageShardWriter | None = None
    chunks = read_records(files, encode.reading, start=start)
    for records in encode_all(encode, chunks, num_workers=num_workers(config.num_workers)):
        for record in records:
            if writer is None:
                writer = ImageShardWriter(
                    len(shards),
                    output=output,
                    progress=output / PROGRESS,
                    dtype=token_dtype(tokenizer),
                )
            writer.add(record, files=files)
            full = writer.tokens >= config.shard_tokens
            if full or writer.bytes >= config.shard_mb * 2**20:
                shards.append(writer.close())
                console.print(f"shard {writer.number}: {writer.tokens:,} tokens written")
                writer = None
    if writer is not None:
        shards.append(writer.close())
    return shards


def _finish(
    config: PrepareImagesConfig,
    output: Path,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    shards: Sequence[dict[str, Any]],
    console: Console,
) -> None:
    """Put the list of rejected records in place, judge it, and write the manifest."""
    progress = output / PROGRESS
    lines = [(progress / f"rejected-{n:05d}.jsonl").read_bytes() for n in range(len(shards))]
    write_whole(output / REJECTED_FILE, b"".join(lines), temporary_folder=progress)
    by_kind: dict[str, int] = {}
    for shard in shards:
        for kind, count in shard["rejected_by_kind"].items():
            by_kind[kind] = by_kind.get(kind, 0) + count
    documents, rejected = sum(shard["documents"] for shard in shards), sum(by_kind.values())
    console.print(
        f"documents: {documents:,}; rejected: {rejected:,} (each in {output / REJECTED_FILE})"
    )
    for kind, count in sorted(by_kind.items()):
        console.print(f"  {kind:>16}: {count:>12,}")
    if rejected > config.max_rejected_fraction * (rejected + documents):
        raise ValueError(
            f"{rejected} of {rejected + documents} records are broken, above max_rejected_fraction="
            f"{config.max_rejected_fraction}: see {output / REJECTED_FILE}"
        )
    if not documents:
        raise ValueError(f"the input holds no usable record: see {output / REJECTED_FILE}")
    ids = asdict(_special_ids(tokenizer, config))
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": {"file": TOKENIZER_FILE, "sha256": file_sha256(output / TOKENIZER_FILE)},
        "vocab_size": vocabulary_size(tokenizer),
        "end_of_document": {"token": config.end_of_document, "id": ids["end_of_document"]},
        "special_ids": ids,
        "tiling": asdict(tiling_of(config)),
        "dtype": token_dtype(tokenizer),
        "documents": documents,
        "tokens": sum(shard["tokens"] for shard in shards),
        "rejected": rejected,
        "rejected_by_kind": dict(sorted(by_kind.items())),
        "splits": {},
    }
    for split in SPLITS:
        parts = [shard["splits"][split] for shard in shards if split in shard["splits"]]
        totals = {key: sum(part[key] for part in parts) for key in _TOTALS}
        offsets = [np.load(output / part["index_file"], mmap_mode="r") for part in parts]
        lengths = length_histogram(offsets)
        longest = max((int(np.diff(one).max()) for one in offsets), default=0)
        manifest["splits"][split] = {
            **totals, "longest": longest, "lengths": lengths, "shards": parts
        }  # fmt: skip
        console.print(
            f"split {split}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, "
            f"{totals['image_tokens']:,} of them of {totals['images']:,} images"
        )
        print_lengths(lengths, totals["tokens"], console)
    write_whole(output / MANIFEST, as_json(manifest), temporary_folder=progress)
    console.print(f"{output} is whole: vocab_size={manifest['vocab_size']}")
