"""Tokenise chunks of raw documents, one process each, and train a tokenizer where none is given."""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fulmen.data.reading import Chunk, InputFile, read_chunks
from fulmen.data.shards import IntArray

TOKENIZER_FILE = "tokenizer.json"
REJECTED, EMPTY = -1, 0
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_WORD = 10_000
"""Of what a tokenizer is trained on."""


class MalformedError(Exception):
    """A raw document that cannot be used: args are the line of its file and the reason."""


@dataclass(frozen=True)
class EncodeSettings:
    """What a tokenising process must know."""

    tokenizer_file: str
    end_of_document_id: int
    dtype: str
    text_field: str
    validation_fraction: float


@dataclass(frozen=True)
class EncodedChunk:
    """A tokenised chunk: for each of its rows a length, and the documents' tokens back to back.

    `lengths` [rows] counts the tokens, end-of-document token included; REJECTED and EMPTY mark
    rows that gave no document. `valid` [rows] marks documents of the validation split. `reasons`
    says, by row of the chunk, on which line of a rejected row what is wrong.
    """

    tokens: npt.NDArray[Any]
    lengths: IntArray
    valid: npt.NDArray[np.bool_]
    reasons: dict[int, tuple[int, str]]


def load_tokenizer(file: str) -> Tokenizer:
    """A tokenizer that gives a text's own tokens alone: nothing cut, padded or added.

    ValueError for a file that is none.
    """
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{file} is not a tokenizer.json that can be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells out "<end_of_document>" must not end its document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_path(given: str) -> Path:
    """The file that the key `tokenizer` names, itself or by its folder."""
    path = Path(given)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"tokenizer={given}: {path} does not exist: give a tokenizer.json, a folder "
            "with one, or tokenizer=train"
        )
    return path


def special_id(tokenizer: Tokenizer, key: str, token: str) -> int:
    """Id of the special token that a key names; ValueError where the tokenizer has none."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        special = [
            str(added.content)
            for added in tokenizer.get_added_tokens_decoder().values()
            if added.special
        ]
        raise ValueError(
            f"the tokenizer has no token {key}={token}: "
            f"its special tokens are {', '.join(special[:20]) or 'none'}"
        )
    return int(token_id)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids need not be without gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_dtype(tokenizer: Tokenizer) -> str:
    """What a shard's tokens are kept as."""
    return "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"


@functools.lru_cache(maxsize=1)
def _process_tokenizer(file: str) -> Tokenizer:
    # Each process has a core; threads inside it would only fight over the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_tokenizer(file)


def encode_chunk(settings: EncodeSettings, chunk: Chunk) -> EncodedChunk:
    """Decode, check, split and tokenise the rows of a chunk."""
    lengths = np.full(len(chunk.raw), REJECTED, dtype=np.int64)
    valid = np.zeros(len(chunk.raw), dtype=np.bool_)
    reasons: dict[int, tuple[int, str]] = {}
    texts, places = [], []
    limit = int(settings.validation_fraction * 2**64)
    for place, raw in enumerate(chunk.raw):
        try:
            text = decode_text(raw, chunk.kind, chunk.rows[place], settings.text_field)
            if not text:
                lengths[place] = EMPTY
                continue
            digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        except UnicodeEncodeError:
            reasons[place] = chunk.rows[place], "text holds half a surrogate pair (bad \\u escape)"
            continue
        except MalformedError as error:
            reasons[place] = error.args[0], error.args[1]
            continue
        valid[place] = int.from_bytes(digest, "little") < limit
        texts.append(text)
        places.append(place)
    tokenizer = _process_tokenizer(settings.tokenizer_file)
    ids = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    for place, one in zip(places, ids, strict=True):
        if one:
            one.append(settings.end_of_document_id)
        lengths[place] = len(one)
    total = sum(map(len, ids))
    tokens = np.fromiter(chain.from_iterable(ids), dtype=settings.dtype, count=total)
    return EncodedChunk(tokens=tokens, lengths=lengths, valid=valid, reasons=reasons)


def decode_text(raw: bytes | str | None, kind: str, row: int, text_field: str) -> str:
    """The text of a raw document, "" for a blank line; MalformedError otherwise."""
    if raw is None:
        raise MalformedError(row, f"column '{text_field}' is null")
    if isinstance(raw, str):
        return raw
    if row == 1 and kind != "parquet":
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1 if kind == "whole" else row
        raise MalformedError(line, f"invalid UTF-8 at byte {error.start} of the document") from None
    if kind in ("whole", "parquet"):
        return text
    if kind == "lines":
        return text.rstrip("\r")
    if not text.strip():
        return ""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(row, f"bad JSON: {error}") from None
    if not isinstance(record, dict):
        raise MalformedError(row, f"the line is a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise MalformedError(row, f"no field '{text_field}'")
    value = record[text_field]
    if not isinstance(value, str):
        raise MalformedError(row, f"field '{text_field}' is {type(value).__name__}, not a string")
    return value


def read_texts(files: Sequence[InputFile], *, text_field: str) -> Iterator[str]:
    """The texts of all documents in order, without the malformed ones."""
    for chunk in read_chunks(files, text_field=text_field):
        for raw, row in zip(chunk.raw, chunk.rows, strict=True):
            try:
                text = decode_text(raw, chunk.kind, row, text_field)
                text.encode("utf-8")
            except (MalformedError, UnicodeEncodeError):
                continue  # prepare_data counts and reports them
            yield text


def encode_chunks(
    settings: EncodeSettings, chunks: Iterator[Chunk], *, num_workers: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Tokenise chunks in `num_workers` processes; results come in input order, without `raw`.

    One worker means this process. A few chunks for each worker are under way at a time, so
    reading, tokenising and writing overlap and memory stays bounded.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield replace(chunk, raw=[]), encode_chunk(settings, chunk)
        return
    # spawn: threads of arrow and of the tokenizer's training may hold locks that fork would keep.
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
    )
    under_way: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    try:
        # The processes start and load the tokenizer while the first chunks are read.
        for _ in range(num_workers):
            pool.submit(encode_chunk, settings, Chunk("lines", [], [], [], 0))
        for chunk in chunks:
            under_way.append((replace(chunk, raw=[]), pool.submit(encode_chunk, settings, chunk)))
            if len(under_way) >= 4 * num_workers:
                head, future = under_way.popleft()
                yield head, future.result()
        while under_way:
            head, future = under_way.popleft()
            yield head, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a tokenising process was killed (out of memory?): run again with a smaller "
            "num_workers; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def train_tokenizer(
    texts: Iterator[str],
    *,
    vocab_size: int,
    end_of_document: str,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Train a byte-level BPE, so that any text can be encoded; end_of_document has id 0.

    The other special tokens follow.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document, *special_tokens],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_cut_words, texts), trainer)
    return tokenizer


def _cut_words(text: str) -> str:
    """With spaces in words that are none: the time of training grows by the square of a word."""
    if max(map(len, text.split()), default=0) <= _LONGEST_WORD:
        return text
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})(?=\S)", r"\1 ", text)
