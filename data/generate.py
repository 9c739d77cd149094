"""Write documents of retrieval.py as the input of launch/prepare_data.py."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import zstandard
from rich.console import Console

from fulmen.data.config import RetrievalConfig
from fulmen.data.prepare import TOKENIZER_FILE
from fulmen.data.reading import list_input
from fulmen.data.retrieval import KINDS, Language, Prose, Words, make_document
from fulmen.data.tokenise import load_tokenizer, read_texts, start_worker

_DOCUMENTS_FILE = "documents.jsonl.zst"
# Tokens of documents that a process makes at once.
_TASK_TOKENS = 2**19

# Seed, frequencies of the kinds, and number and length of each document.
_Task = tuple[int, Mapping[str, float], list[tuple[int, int]]]

_language: Language | None = None  # of a worker process


def generate(config: RetrievalConfig, *, console: Console) -> int:
    """Write the folder `config.output` and return its tokens; ValueError for bad settings.

    Document n depends on the seed, on n and on its length alone, so any number of processes
    writes the same bytes.
    """
    ranges = _check(config)
    output = Path(config.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output={output} is not empty: give a new or empty folder")
    language = _make_language(config)
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(language, Words):
        language.tokenizer().save(str(output / TOKENIZER_FILE))
    lengths = _draw_lengths(ranges, config)
    # To begin takes a worker as long as some million tokens.
    useful = 1 + sum(lengths) // 4_000_000
    workers = config.num_workers or min(useful, len(os.sched_getaffinity(0)))
    tasks = _tasks(lengths, config.seed, Counter(config.kinds))
    partial = output / f".{_DOCUMENTS_FILE}.tmp"
    with open(partial, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for text in _texts(config, language, tasks, workers):
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    os.replace(partial, output / _DOCUMENTS_FILE)
    total = sum(lengths)
    console.print(f"{output}: {len(lengths):,} documents, {total:,} tokens")
    for least, most, _ in ranges:
        held = [length for length in lengths if least <= length <= most]
        console.print(f"  {least:,} to {most:,} tokens: {sum(held) / total:.2%} of the tokens")
    tokenizer = output if isinstance(language, Words) else config.tokenizer
    console.print(
        f"next: python launch/prepare_data.py input={output} output=FOLDER tokenizer={tokenizer}"
    )
    return total


def _check(config: RetrievalConfig) -> list[tuple[int, int, float]]:
    if config.tokens <= 0:
        raise ValueError(f"tokens={config.tokens} must be above 0")
    if config.num_workers < 0:
        raise ValueError(f"num_workers={config.num_workers} must be 0 (every core) or more")
    if config.haystack not in ("text", "words"):
        raise ValueError(f"haystack={config.haystack} must be text or words")
    if config.num_keys < 8:
        raise ValueError(f"num_keys={config.num_keys} must be 8 or more")
    unknown = [kind for kind in config.kinds if kind not in KINDS]
    if unknown or not config.kinds:
        raise ValueError(f"kinds={config.kinds}: give one or more of {', '.join(KINDS)}")
    ranges = []
    for row in config.lengths:
        try:
            least, most, share = int(row[0]), int(row[1]), float(row[2])
            good = len(row) == 3 and 16 <= least <= most and share > 0
        except (TypeError, ValueError, LookupError):
            good = False
        if not good:
            raise ValueError(
                f"lengths={config.lengths}: each must be [least, most, share of tokens], with "
                "16 <= least <= most and a share above 0"
            )
        ranges.append((least, most, share))
    if not ranges:
        raise ValueError("lengths is empty: give at least one [least, most, share of tokens]")
    return ranges


def _make_language(config: RetrievalConfig) -> Language:
    if config.haystack == "words":
        return Words(num_keys=config.num_keys)
    if config.tokenizer is None:
        raise ValueError(
            "tokenizer: give a tokenizer.json or a prepared folder with one, by which the lengths "
            "count, or haystack=words"
        )
    path = Path(config.tokenizer)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"tokenizer={config.tokenizer}: {path} does not exist")
    return Prose(load_tokenizer(str(path)), _input_texts(config))


def _input_texts(config: RetrievalConfig) -> Iterator[str]:
    inputs = [config.input] if isinstance(config.input, str) else list(config.input or [])
    files = list_input(
        inputs,
        suffixes=[".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"],
        document_per="file",
        output=Path(config.output).resolve(),
    )
    left = config.max_input_mb * 1e6
    for text in read_texts(files, text_field=config.text_field):
        if left <= 0:
            return
        left -= len(text.encode())
        yield text


def _draw_lengths(ranges: Sequence[tuple[int, int, float]], config: RetrievalConfig) -> list[int]:
    """Of all documents: the next is of the range that lacks most of its tokens."""
    rng = np.random.default_rng([config.seed, 0])
    shares = [share / sum(share for _, _, share in ranges) for _, _, share in ranges]
    drawn = [0] * len(ranges)
    lengths: list[int] = []
    while (total := sum(drawn)) < config.tokens:
        lacks = [share * total - held for share, held in zip(shares, drawn, strict=True)]
        number = lacks.index(max(lacks))
        least, most, _ = ranges[number]
        length = int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))
        length = min(max(length, least), most)
        drawn[number] += length
        lengths.append(length)
    return lengths


def _tasks(lengths: Sequence[int], seed: int, kinds: Mapping[str, float]) -> Iterator[_Task]:
    task: list[tuple[int, int]] = []
    held = 0
    for number, length in enumerate(lengths):
        task.append((number, length))
        held += length
        if held >= _TASK_TOKENS or number == len(lengths) - 1:
            yield seed, kinds, task
            task, held = [], 0


def _texts(
    config: RetrievalConfig,
    language: Language,
    tasks: Iterator[_Task],
    workers: int,
) -> Iterator[str]:
    if workers == 1:
        yield from chain.from_iterable(_make(language, *task) for task in tasks)
        return
    # spawn: the tokenizer's threads may hold locks that a fork would keep.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(config,),
    ) as pool:
        while batch := list(islice(tasks, 4 * workers)):  # so that memory stays bounded
            for texts in pool.map(_make_in_worker, batch):
                yield from texts


def _start(config: RetrievalConfig) -> None:
    global _language
    start_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _language = _make_language(config)


def _make_in_worker(task: _Task) -> list[str]:
    assert _language is not None
    return _make(_language, *task)


def _make(
    language: Language, seed: int, kinds: Mapping[str, float], documents: list[tuple[int, int]]
) -> list[str]:
    return [
        make_document(kinds, language, np.random.default_rng([seed, 1, number]), length=length)
        for number, length in documents
    ]
