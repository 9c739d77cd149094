"""Prepare a data folder: tokenise the input into shards, and go on where a killed run stopped.

A shard covers a run of consecutive input documents: its files are written under `.progress/`,
renamed into place, and then recorded there together with the place in the input where the shard
ends. Where shards end depends on the documents alone, so a run that was killed and started again
writes the same bytes as one that was not. The manifest comes last and means "whole".
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from fulmen.data.buckets import length_histogram
from fulmen.data.config import PrepareConfig
from fulmen.data.folder import (
    PROGRESS,
    check_finished,
    keep_tokenizer,
    kept_shards,
    remove_all,
    work_on,
)
from fulmen.data.reading import InputFile, check_parquet, input_signature, list_input, read_chunks
from fulmen.data.shards import FORMAT_VERSION, MANIFEST, SPLITS, file_sha256, read_manifest
from fulmen.data.tokenise import (
    TOKENIZER_FILE,
    EncodeSettings,
    encode_chunks,
    load_tokenizer,
    read_texts,
    special_id,
    token_dtype,
    tokenizer_path,
    vocabulary_size,
)
from fulmen.data.writing import ShardWriter, as_json, write_whole

REJECTED_FILE = "rejected.jsonl"


def prepare(config: PrepareConfig, *, console: Console) -> dict[str, Any]:
    """Write the folder `config.output`, or finish or recognise it, and return its manifest.

    Raises ValueError for settings that cannot be, for a folder prepared or begun with other
    settings (nothing is overwritten), and when too much of the input is malformed.
    """
    _check_config(config)
    output = Path(config.output).resolve()
    inputs = [config.input] if isinstance(config.input, str) else list(config.input)
    files = list_input(
        inputs, suffixes=config.suffixes, document_per=config.document_per, output=output
    )
    check_parquet(files, config.text_field)
    settings = _settings(config, files)
    if not (output / MANIFEST).exists():
        was_there, is_begun = output.exists(), (output / PROGRESS).exists()
        with work_on(output, settings):
            tokenizer = keep_tokenizer(
                output,
                config.tokenizer,
                lambda: _sample_texts(config, files),
                vocab_size=config.vocab_size,
                end_of_document=config.end_of_document,
                special_tokens=config.special_tokens,
                say=console.print,
            )
            shards = _write_shards(config, files, output, tokenizer, console)
            if not any(shard["documents"] + shard["rejected"] for shard in shards):
                if not is_begun:  # left there, it would refuse the right input
                    remove_all(output, keep_folder=was_there)
                raise ValueError("the input holds no document that is not empty")
            _finish(config, output, settings, tokenizer, shards, console)
    else:
        check_finished(output, settings)
        console.print(f"{output} is whole already, with the same settings: nothing to do")
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    return read_manifest(output)


def _check_config(config: PrepareConfig) -> None:
    if not config.input:
        raise ValueError("input is empty: give a file, a glob, a folder, or a list of them")
    if config.document_per not in ("file", "line"):
        raise ValueError(f"document_per={config.document_per} must be file or line")
    if not 0 <= config.validation_fraction < 1:
        raise ValueError(f"validation_fraction={config.validation_fraction} must be in [0, 1)")
    if not 0 <= config.max_rejected_fraction <= 1:
        raise ValueError(f"max_rejected_fraction={config.max_rejected_fraction} must be in [0, 1]")
    if config.shard_tokens <= 0:
        raise ValueError(f"shard_tokens={config.shard_tokens} must be above 0")
    if config.num_workers < 0:
        raise ValueError(f"num_workers={config.num_workers} must be 0 (every core) or more")
    if config.tokenizer != "train":
        path = tokenizer_path(config.tokenizer)
        special_id(load_tokenizer(str(path)), "end_of_document", config.end_of_document)
        return
    if config.vocab_size < 257:
        raise ValueError(f"vocab_size={config.vocab_size} must be 257 or more: 256 bytes and the "
                         "end-of-document token")  # fmt: skip
    if config.train_sample_mb <= 0:
        raise ValueError(f"train_sample_mb={config.train_sample_mb} must be above 0")


def _settings(config: PrepareConfig, files: Sequence[InputFile]) -> dict[str, Any]:
    """All that decides what is written, and nothing else."""
    settings: dict[str, Any] = {
        "input_files": len(files),
        "input_bytes": sum(file.size_bytes for file in files),
        "input_signature": input_signature(files),
    }
    if config.tokenizer == "train":
        settings["tokenizer"] = "train"
        settings["vocab_size"] = config.vocab_size
        settings["train_sample_mb"] = config.train_sample_mb
        if config.special_tokens:
            settings["special_tokens"] = list(config.special_tokens)
    else:
        settings["tokenizer"] = file_sha256(tokenizer_path(config.tokenizer))
    for key in ("end_of_document", "text_field", "document_per"):
        settings[key] = getattr(config, key)
    settings["validation_fraction"] = config.validation_fraction
    settings["shard_tokens"] = config.shard_tokens
    return settings


def _sample_texts(config: PrepareConfig, files: Sequence[InputFile]) -> Iterator[str]:
    """The first documents of files all over the input, up to each file's part of the sample."""
    share = min(1.0, config.train_sample_mb * 1e6 / max(1, sum(file.size_bytes for file in files)))
    quota = taken = 0.0
    for file in files:
        quota += file.size_bytes * share
        if share < 1 and taken >= quota:
            continue
        for text in read_texts([file], text_field=config.text_field):
            taken += len(text.encode("utf-8"))
            yield text
            if share < 1 and taken >= quota:
                break


def _write_shards(
    config: PrepareConfig,
    files: Sequence[InputFile],
    output: Path,
    tokenizer: Tokenizer,
    console: Console,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the records of all, in order."""
    progress = output / PROGRESS
    shards = kept_shards(output)
    start: tuple[int, int] = tuple(shards[-1]["end"]) if shards else (0, 0)
    if shards:
        console.print(f"going on after {len(shards)} finished shard(s) of an interrupted run")
    encode = EncodeSettings(
        tokenizer_file=str(output / TOKENIZER_FILE),
        end_of_document_id=special_id(tokenizer, "end_of_document", config.end_of_document),
        dtype=token_dtype(tokenizer),
        text_field=config.text_field,
        validation_fraction=config.validation_fraction,
    )

    def new_writer() -> ShardWriter:
        return ShardWriter(len(shards), output=output, progress=progress, dtype=encode.dtype)

    chunks = read_chunks(files, text_field=config.text_field, start=start)
    writer = new_writer()
    with _Bar(files, start, shards, console) as bar:
        for chunk, encoded in encode_chunks(
            encode, chunks, num_workers=num_workers(config.num_workers)
        ):
            ends = np.cumsum(np.maximum(encoded.lengths, 0))
            begin = 0
            while begin < len(ends):
                before = int(ends[begin - 1]) if begin else 0
                # The shard ends with the document that reaches its size.
                full = before + config.shard_tokens - writer.tokens
                stop = min(int(np.searchsorted(ends, full)) + 1, len(ends))
                writer.add(chunk, encoded, begin, stop, files=files)
                begin = stop
                if writer.tokens >= config.shard_tokens:
                    shards.append(writer.close())
                    console.print(f"shard {writer.number}: {writer.tokens:,} tokens written")
                    writer = new_writer()
            bar.advance(chunk.input_bytes, encoded.lengths)
        if writer.documents or writer.rejected or writer.empty:
            shards.append(writer.close())
    return shards


def num_workers(given: int) -> int:
    """Processes of a preparation: as many as given, or one a core."""
    return given or len(os.sched_getaffinity(0))


class _Bar:
    """The progress line: documents, tokens, tokens/s, time left by bytes of input."""

    def __init__(
        self,
        files: Sequence[InputFile],
        start: tuple[int, int],
        shards: Sequence[dict[str, Any]],
        console: Console,
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=10),
            TextColumn(
                "{task.fields[documents]:,} documents, {task.fields[tokens]:.1f} M tokens, "
                "{task.fields[speed]:.2f} M tokens/s, {task.fields[rejected]:,} rejected"
            ),
            TimeRemainingColumn(),
            console=console,
        )
        self._documents = sum(shard["documents"] for shard in shards)
        self._tokens_before = self._tokens = sum(shard["tokens"] for shard in shards)
        self._rejected = sum(shard["rejected"] for shard in shards)
        self._task = self._progress.add_task(
            "tokenise",
            total=sum(file.size_bytes for file in files),
            completed=sum(file.size_bytes for file in files[: start[0]]),
            documents=self._documents,
            tokens=self._tokens / 1e6,
            speed=0.0,
            rejected=self._rejected,
        )

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, input_bytes: int, lengths: np.ndarray) -> None:
        self._documents += int((lengths > 0).sum())
        self._tokens += int(np.maximum(lengths, 0).sum())
        self._rejected += int((lengths < 0).sum())
        elapsed = self._progress.tasks[0].elapsed or 0.0
        self._progress.update(
            self._task,
            advance=input_bytes,
            documents=self._documents,
            tokens=self._tokens / 1e6,
            speed=(self._tokens - self._tokens_before) / 1e6 / max(elapsed, 1e-3),
            rejected=self._rejected,
        )


def _finish(
    config: PrepareConfig,
    output: Path,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    shards: Sequence[dict[str, Any]],
    console: Console,
) -> None:
    """Put the list of rejected lines in place, judge it, and write the manifest."""
    progress = output / PROGRESS
    totals = {
        key: sum(shard[key] for shard in shards)
        for key in ("documents", "tokens", "rejected", "empty")
    }
    rejected = b"".join(
        (progress / f"rejected-{number:05d}.jsonl").read_bytes() for number in range(len(shards))
    )
    write_whole(output / REJECTED_FILE, rejected, temporary_folder=progress)
    console.print(
        f"documents: {totals['documents']:,}; rejected as malformed: {totals['rejected']:,} "
        f"(each with file and line in {output / REJECTED_FILE}); empty: {totals['empty']:,}"
    )
    if totals["rejected"] > config.max_rejected_fraction * (
        totals["rejected"] + totals["documents"]
    ):
        raise ValueError(
            f"{totals['rejected']} of {totals['rejected'] + totals['documents']} documents are "
            f"malformed, above max_rejected_fraction={config.max_rejected_fraction}: see "
            f"{output / REJECTED_FILE} (is text_field={config.text_field} right?)"
        )
    if not totals["documents"]:
        raise ValueError(f"the input holds no usable document: see {output / REJECTED_FILE}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": {"file": TOKENIZER_FILE, "sha256": file_sha256(output / TOKENIZER_FILE)},
        "vocab_size": vocabulary_size(tokenizer),
        "end_of_document": {
            "token": config.end_of_document,
            "id": special_id(tokenizer, "end_of_document", config.end_of_document),
        },
        "dtype": token_dtype(tokenizer),
        **totals,
        "splits": {},
    }
    for split in SPLITS:
        parts = [shard["splits"][split] for shard in shards if split in shard["splits"]]
        documents, tokens = (sum(part[key] for part in parts) for key in ("documents", "tokens"))
        offsets = [np.load(output / part["index_file"], mmap_mode="r") for part in parts]
        lengths = length_histogram(offsets)
        manifest["splits"][split] = {
            "documents": documents,
            "tokens": tokens,
            "lengths": lengths,
            "shards": parts,
        }
        console.print(f"split {split}: {documents:,} documents, {tokens:,} tokens")
        print_lengths(lengths, tokens, console)
        if not documents and (split == "train" or config.validation_fraction):
            console.print(
                f"warning: split {split} is empty: change validation_fraction="
                f"{config.validation_fraction} if it is needed"
            )
    write_whole(output / MANIFEST, as_json(manifest), temporary_folder=progress)
    console.print(f"{output} is whole: vocab_size={manifest['vocab_size']}")


def print_lengths(lengths: list[dict[str, int]], tokens: int, console: Console) -> None:
    """One line for each row of `length_histogram`."""
    for row in lengths:
        console.print(
            f"  {row['from']:>10,} to {2 * row['from'] - 1:>10,} tokens: "
            f"{row['documents']:>12,} documents, {row['tokens']:>16,} tokens "
            f"({row['tokens'] / tokens:6.2%})"
        )
