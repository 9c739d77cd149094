"""From records with images to tokens, labels' mask and checked images, in worker processes."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fulmen.data.conversations import Example, RecordError, Turn, parse_example
from fulmen.data.image_reading import RawRecord, ReadLimits, read_fields
from fulmen.data.images import ImageError, ImageLimits, decode_image, layout_of
from fulmen.data.tokenise import load_tokenizer
from fulmen.data.workers import Workers
from fulmen.models.image_layout import ImageLayout, Tiling

HEADERS = {
    "system": "system ai_setting=assistant\n",
    "user": "user name=user\n",
    "assistant": "ai name=assistant\n",
}
"""What follows the token that begins a turn, as MiniMax-01 has it."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that no text can spell."""

    end_of_document: int
    image: int
    begin_turn: int
    end_turn: int


@dataclass(frozen=True)
class ImageEncodeSettings:
    """What a worker must know."""

    tokenizer_file: str
    ids: SpecialIds
    tiling: Tiling
    images: ImageLimits
    reading: ReadLimits
    max_tokens: int
    max_caption_tokens: int | None
    validation_fraction: float
    held_out_from: int
    """Number of the first file whose documents are all held out."""


@dataclass(frozen=True)
class PlacedImage:
    """An image's place in its document; a pair has each image twice, from the same bytes."""

    blob: int
    """Number of its bytes in `blobs`."""
    first: int
    """First of its tokens, in the document."""
    layout: ImageLayout
    width: int
    height: int


@dataclass(frozen=True)
class EncodedRecord:
    """A document, or why there is none."""

    file: int
    row: int
    name: str
    problem: tuple[str, str] | None = None
    """Kind and reason."""
    tokens: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    learnt: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    """1 where the token is to be predicted from those before it."""
    chosen: int = 0
    """Tokens of the preferred one of two documents; 0 = no pair."""
    valid: bool = False
    blobs: tuple[bytes, ...] = ()
    images: tuple[PlacedImage, ...] = ()


def encode_records(
    settings: ImageEncodeSettings, chunk: Sequence[RawRecord]
) -> list[EncodedRecord]:
    """Parse, check and tokenise some records; none stops the others."""
    tokenizer = _process_tokenizer(settings.tokenizer_file)
    done = []
    for raw in chunk:
        try:
            done.append(_encode(settings, tokenizer, raw))
        except (RecordError, ImageError) as error:
            problem = (error.kind, error.reason)
            done.append(EncodedRecord(raw.file, raw.row, raw.name, problem=problem))
    return done


@functools.lru_cache(maxsize=1)
def _process_tokenizer(file: str) -> Tokenizer:
    return load_tokenizer(file)


def _encode(settings: ImageEncodeSettings, tokenizer: Tokenizer, raw: RawRecord) -> EncodedRecord:
    fields, blobs = read_fields(raw, settings.reading)
    example = parse_example(fields, len(blobs))
    # Cheap before dear: only a record that is otherwise whole has its images decoded.
    sizes = [decode_image(data, settings.images).size for data in blobs]
    layouts = [layout_of(size, settings.tiling) for size in sizes]
    tokens, learnt, chosen, placed = tokenise_example(
        example, layouts, settings.ids, tokenizer, settings.max_caption_tokens
    )
    if len(tokens) > settings.max_tokens:
        raise RecordError(
            "too_long", f"{len(tokens)} tokens, more than max_tokens={settings.max_tokens}"
        )
    return EncodedRecord(
        raw.file,
        raw.row,
        raw.name,
        tokens=np.array(tokens, np.uint32),
        learnt=np.array(learnt, np.uint8),
        chosen=chosen,
        valid=raw.file >= settings.held_out_from or _is_valid(settings, blobs, tokens),
        blobs=tuple(blobs),
        images=tuple(PlacedImage(n, first, layouts[n], *sizes[n]) for n, first in placed),
    )


def _is_valid(settings: ImageEncodeSettings, blobs: Sequence[bytes], tokens: list[int]) -> bool:
    """Whether a document is held out: a hash of its first image says so, or else of its tokens.

    So all questions about one picture are on the same side.
    """
    data = blobs[0] if blobs else np.array(tokens, "<u4").tobytes()
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(settings.validation_fraction * 2**64)


def tokenise_example(
    example: Example,
    layouts: Sequence[ImageLayout],
    ids: SpecialIds,
    tokenizer: Tokenizer,
    max_caption_tokens: int | None = None,
) -> tuple[list[int], list[int], int, list[tuple[int, int]]]:
    """Tokens and mask of an example, length of the chosen one, and (image, first token) of each.

    The mask is 1 at tokens to be predicted: the text of a caption and its end, the assistant's
    words and the end of its turn. Image tokens, roles and questions have none. Of a caption
    `max_caption_tokens` are kept, its end among them.
    """
    tokens: list[int] = []
    learnt: list[int] = []
    placed: list[tuple[int, int]] = []
    ends = []

    def add(more: list[int], mask: bool) -> None:
        tokens.extend(more)
        learnt.extend([int(mask)] * len(more))

    for document in example.documents:
        first = len(tokens)
        cut = max_caption_tokens if _is_plain(document) else None
        left = None if cut is None else cut - 1
        for number, turn in enumerate(document):
            if turn.role:
                add([ids.begin_turn, *_text_ids(tokenizer, HEADERS[turn.role])], False)
            for part in turn.parts:
                if isinstance(part, int):
                    placed.append((part, len(tokens)))
                    add([ids.image] * layouts[part].num_tokens, False)
                else:
                    text = _text_ids(tokenizer, part)[:left]
                    left = None if left is None else left - len(text)
                    add(text, turn.learnt)
            if turn.role:
                add([ids.end_turn], turn.learnt)
            if number + 1 < len(document):
                add(_text_ids(tokenizer, "\n"), False)
        add([ids.end_of_document], _is_plain(document))
        learnt[first] = 0  # nothing stands before it
        ends.append(len(tokens))
    return tokens, learnt, ends[0] if len(ends) > 1 else 0, placed


def tokenise_prompt(
    turns: tuple[Turn, ...],
    layouts: Sequence[ImageLayout],
    ids: SpecialIds,
    tokenizer: Tokenizer,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a document without its end and that of its last turn, and where images begin."""
    tokens, _, _, placed = tokenise_example(Example((turns,)), layouts, ids, tokenizer)
    return tokens[: -1 if _is_plain(turns) else -2], placed


def _is_plain(document: Sequence[Turn]) -> bool:
    return not document[-1].role


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("bad_utf8", "text holds half a surrogate pair") from None
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode_all(
    settings: ImageEncodeSettings, chunks: Iterator[list[RawRecord]], *, num_workers: int
) -> Iterator[list[EncodedRecord]]:
    """Encode chunks in `num_workers` processes, results in input order; one = this process."""
    workers = Workers(0 if num_workers == 1 else num_workers)
    encode = functools.partial(encode_records, settings)

    def one_by_one(chunk: list[RawRecord]) -> list[EncodedRecord]:
        """A chunk that killed its process: only the record that did it is lost."""
        singly = workers.map(encode, [[raw] for raw in chunk], lost=_crashed)
        return [record for records in singly for record in records]

    try:
        yield from workers.map(encode, chunks, lost=one_by_one, ahead=2)
    finally:
        workers.close()


def _crashed(chunk: list[RawRecord]) -> list[EncodedRecord]:
    problem = ("crashed", "its worker process died: a decoder crashed, or memory ran out")
    return [EncodedRecord(raw.file, raw.row, raw.name, problem=problem) for raw in chunk]
