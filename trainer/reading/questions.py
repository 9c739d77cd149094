"""Questions about the images of held-out documents: a document up to one of its answers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from fulmen.data.image_decoding import read_image
from fulmen.data.image_encoding import HEADERS
from fulmen.data.image_shards import CHOSEN, IMAGES, StoredImage
from fulmen.data.images import ImageError
from fulmen.data.shards import PreparedSplit
from fulmen.trainer.prompt_images import Picture
from fulmen.trainer.reading.prompts import Prompt

EXTRA_TOKENS = 8
"""That an answer may have more than the stored one."""
log = logging.getLogger("fulmen")


@dataclass(frozen=True)
class Question:
    """A prompt and what may be said to it."""

    name: str
    """Its own among the questions of a source."""
    text: str
    """What is asked, for people."""
    truths: tuple[str, ...]
    """Answers that are right; one letter where there are options."""
    max_new_tokens: int
    """Of an answer, with its end."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    make_prompt: Callable[[], Prompt]
    """Decodes the images, so only who reads it calls it."""
    options: tuple[str, ...] = ()
    """What may be chosen as A, B, ...; none for free answers."""


def stored_questions(
    split: PreparedSplit, tokenizer: Tokenizer, *, max_documents: int | None, max_answer_tokens: int
) -> list[Question]:
    """The questions about images in a split's held-out documents, evenly from all of them.

    Before an answer stand the stored answers to the questions before it. Of a pair of answers the
    preferred one is right.
    """
    images = split.images
    if images is None:
        return []
    numbers = np.arange(split.num_documents)
    totals = images.totals(*split.places(numbers))
    numbers = numbers[totals[:, IMAGES] > 0]
    count = len(numbers) if max_documents is None else min(max_documents, len(numbers))
    chosen = [int(numbers[len(numbers) * place // count]) for place in range(count)]
    return [
        question
        for number in chosen
        for question in _of_document(split, tokenizer, number)
        if question.max_new_tokens <= max_answer_tokens + EXTRA_TOKENS
    ]


def holds_conversations(split: PreparedSplit) -> bool:
    """Whether its documents are turns, some of them about images, and no pairs of answers."""
    if split.images is None:
        return False
    totals = split.images.totals(*split.places(np.arange(split.num_documents)))
    starts_with_turn = split.document(0)[0] == split.images.special_ids["begin_turn"]
    return bool(starts_with_turn and totals[:, IMAGES].any() and not totals[:, CHOSEN].any())


def _of_document(split: PreparedSplit, tokenizer: Tokenizer, number: int) -> Iterator[Question]:
    images = split.images
    assert images is not None
    (shard,), (place,) = (found.tolist() for found in split.places(np.array([number])))
    (_,), (offset,) = split.locate(np.array([number]))
    ids = split.document(number).tolist()
    end = int(images.totals(np.array([shard]), np.array([place]))[0, CHOSEN]) or len(ids)
    mask = np.concatenate([[0], images.masks[shard][offset : offset + end], [0]])
    stored = images.images(shard, place)
    special = images.special_ids
    stops = frozenset((special["end_turn"], special["end_of_document"]))
    starts, ends = (np.flatnonzero(np.diff(mask.astype(int)) == step) for step in (1, -1))
    asked_from = 0
    for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
        seen = [image for image in stored if image.first < start]
        answer = ids[start : stop - 1] if ids[stop - 1] in stops else ids[start:stop]
        if seen and answer:
            yield Question(
                f"{number}-{start}",
                _show(ids[asked_from:start], asked_from, stored, tokenizer, special),
                (tokenizer.decode(answer, skip_special_tokens=False),),
                len(answer) + EXTRA_TOKENS,
                stops,
                partial(_read_prompt, ids[:start], seen),
            )
        asked_from = stop


def _show(
    ids: Sequence[int],
    first: int,
    images: Sequence[StoredImage],
    tokenizer: Tokenizer,
    special: dict[str, int],
) -> str:
    """What tokens from place `first` of a document say, each image as one `<image>`."""
    starts = {image.first for image in images}
    shown = [
        token
        for place, token in enumerate(ids, first)
        if token != special["image"] or place in starts
    ]
    text: str = tokenizer.decode(shown, skip_special_tokens=False)
    begin, end = (str(tokenizer.id_to_token(special[key])) for key in ("begin_turn", "end_turn"))
    for header in HEADERS.values():
        text = text.replace(begin + header, "")
    return text.replace(end, "").strip()


def _read_prompt(ids: list[int], images: Sequence[StoredImage]) -> Prompt:
    pictures = (Picture(image.first, image.layout, _read_image(image)) for image in images)
    return Prompt(ids, tuple(pictures))


def _read_image(image: StoredImage) -> Image.Image:
    """Black where it cannot be read any more, as in training."""
    try:
        return read_image(image)
    except (OSError, ImageError) as error:
        log.warning("image at byte %d of %s: %s; it is black", image.offset, image.path, error)
        return Image.new("RGB", (image.width, image.height))
