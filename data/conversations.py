"""From records of many shapes to examples: captions, conversations, pairs of answers.

A record says where its images stand by `<image>` in the text. Where it says nothing, they come
first. Whatever is wrong with a record is a `RecordError` of one of a few kinds, so that it can be
counted and named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = "<image>"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ai": "assistant",
}
"""Names of the roles in data sets, and ours."""
FIELDS = ("text", "messages", "prompt", "chosen", "rejected", "image", "images")
"""What is read of a record; the key `fields` gives other names to them."""
ALIASES = {"caption": "text", "conversations": "messages", "conversation": "messages"}

Part = str | int
"""A piece of text, or the number of an image of the record."""


class RecordError(Exception):
    """A record that cannot be used: args are its kind, for counts, and what is wrong."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Turn:
    """What one role says."""

    role: str
    """system, user or assistant; "" for text without roles."""
    parts: tuple[Part, ...]
    """Texts and images in order."""
    learnt: bool
    """Whether its text has labels."""

    @property
    def text(self) -> str:
        """Its text without the images."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Example:
    """One document, or two for a pair: what is preferred, and what is not."""

    documents: tuple[tuple[Turn, ...], ...]


def parse_example(record: Mapping[str, Any], num_images: int) -> Example:
    """The example of a record's fields (see FIELDS); its images are numbered 0 .. num_images-1."""
    if "chosen" in record or "rejected" in record:
        return _preference(record, num_images)
    if record.get("messages") is not None:
        turns = _place_images(_turns(record["messages"], "messages"), num_images)
        if not any(turn.learnt and turn.text.strip() for turn in turns):
            raise RecordError("no_answer", "no turn of the assistant has text")
        return Example((tuple(turns),))
    if record.get("text") is None:
        raise RecordError("no_text", "no text, messages, or chosen and rejected")
    text = _string(record["text"], "text")
    if not text.strip():
        raise RecordError("no_text", "the text is empty")
    if not num_images:
        raise RecordError("missing_image", "text without an image: give it to prepare_data")
    return Example((tuple(_place_images([Turn("", _split(text), True)], num_images)),))


def parse_prompt(text: str, num_images: int, *, chat: bool) -> tuple[Turn, ...]:
    """What a model is to continue: with `chat` a user's turn and the begun one of the assistant.

    Images are placed as in a record; RecordError where their numbers differ.
    """
    turns = [Turn("user" if chat else "", _split(text), False)]
    if chat:
        turns.append(Turn("assistant", (), True))
    return tuple(_place_images(turns, num_images))


def _preference(record: Mapping[str, Any], num_images: int) -> Example:
    prompt = record.get("prompt") if record.get("messages") is None else record["messages"]
    begun: list[Turn] = []
    if isinstance(prompt, str):
        begun = [Turn("user", _split(prompt), False)]
    elif prompt is not None:
        begun = _turns(prompt, "prompt")
    documents = []
    for key in ("chosen", "rejected"):
        given = record.get(key)
        if given is None:
            raise RecordError("no_answer", f"a pair without '{key}'")
        if isinstance(given, str):
            answer = [Turn("assistant", _split(given), True)]
        else:
            answer = _turns([given] if isinstance(given, Mapping) else given, key)
        turns = _place_images([*begun, *answer], num_images)
        if turns[-1].role != "assistant" or not turns[-1].text.strip():
            raise RecordError("no_answer", f"'{key}' does not end in an answer")
        if len(turns) < 2:
            raise RecordError("no_text", "a pair without a prompt")
        # Only the answers are compared; the turns before them are the same.
        asked = [Turn(turn.role, turn.parts, False) for turn in turns[:-1]]
        documents.append((*asked, turns[-1]))
    if documents[0] == documents[1]:
        raise RecordError("equal_pair", "chosen and rejected are equal")
    if documents[0][:-1] != documents[1][:-1]:
        raise RecordError("unequal_prompts", "chosen and rejected follow different turns")
    return Example(tuple(documents))


def _turns(messages: Any, field: str) -> list[Turn]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RecordError("wrong_type", f"'{field}' is {type(messages).__name__}, not a list")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RecordError(
                "wrong_type", f"'{field}' holds {type(message).__name__}, not objects"
            )
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError("unknown_role", f"role {role!r:.40}, not one of {', '.join(ROLES)}")
        content = message.get("content", message.get("value"))
        name = ROLES[role]
        turns.append(Turn(name, _parts(content, field), name == "assistant"))
    if not turns:
        raise RecordError("no_text", f"'{field}' is empty")
    return turns


def _parts(content: Any, field: str) -> tuple[Part, ...]:
    """Text with placeholders, or a list of {"type": "text" or "image"}; images all get -1."""
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RecordError("wrong_type", f"content of '{field}' is {type(content).__name__}")
    parts: list[Part] = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            # The list says where the images are, so a placeholder is only text.
            parts.append(_string(item.get("text"), field))
        elif kind in ("image", "image_url"):
            parts.append(-1)
        else:
            raise RecordError("wrong_type", f"'{field}' has content that is no text and no image")
    return tuple(part for part in parts if part != "")


def _split(text: str) -> tuple[Part, ...]:
    texts = text.split(PLACEHOLDER)
    parts: list[Part] = [texts[0]]
    for following in texts[1:]:
        parts += [-1, following]
    return tuple(part for part in parts if part != "")


def _place_images(turns: Sequence[Turn], num_images: int) -> list[Turn]:
    """Number the images in order; where no turn names any, put all before the first question."""
    named = sum(part == -1 for turn in turns for part in turn.parts)
    if not named and num_images:
        first = next((n for n, turn in enumerate(turns) if turn.role != "system"), 0)
        begin = Turn(
            turns[first].role, (-1,) * num_images + turns[first].parts, turns[first].learnt
        )
        turns = [*turns[:first], begin, *turns[first + 1 :]]
    elif named != num_images:
        raise RecordError("image_count", f"{named} images in the text, but {num_images} given")
    numbers = iter(range(num_images))
    return [
        Turn(
            turn.role, tuple(next(numbers) if part == -1 else part for part in turn.parts),
            turn.learnt,
        )
        for turn in turns
    ]  # fmt: skip


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"'{field}' is {type(value).__name__}, not a string")
    return value
