"""Which sources' held-out documents are asked about."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from fulmen.data.config import SourceConfig
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer
from fulmen.models.config import ModelConfig
from fulmen.trainer.inputs import check_images
from fulmen.trainer.reading.questions import Question, holds_conversations, stored_questions


def held_out_questions(
    sources: Mapping[str, SourceConfig],
    names: Sequence[str],
    model: ModelConfig,
    *,
    max_documents: int | None,
    max_answer_tokens: int,
) -> tuple[Tokenizer, dict[str, list[Question]]]:
    """Their tokenizer, and the questions of these sources, or of all with conversations on images.

    ValueError where there are none, or the model does not see images as they were prepared.
    """
    splits = open_splits(sources, names, model.vocab_size)
    check_images(list(splits.values()), model.vision)
    path = next(iter(splits.values())).path
    tokenizer = load_tokenizer(str(path / read_manifest(path)["tokenizer"]["file"]))
    questions = {}
    for name, split in splits.items():
        questions[name] = stored_questions(
            split, tokenizer, max_documents=max_documents, max_answer_tokens=max_answer_tokens
        )
        if not questions[name]:
            raise ValueError(
                f"reading: the held-out documents of data.sources.{name} have no question about "
                f"an image with an answer of max_answer_tokens={max_answer_tokens} or fewer"
            )
    return tokenizer, questions


def open_splits(
    sources: Mapping[str, SourceConfig], names: Sequence[str], vocab_size: int
) -> dict[str, PreparedSplit]:
    """The held-out documents of these sources, or of all that hold conversations about images."""
    splits = {
        name: PreparedSplit(source.path, "valid", name=name, vocab_size=vocab_size, verify=False)
        for name, source in sources.items()
        if name in names or (not names and _has_images(source.path))
    }
    kept = {name: split for name, split in splits.items() if names or holds_conversations(split)}
    if not kept:
        raise ValueError(
            "reading: no source of data.sources holds out conversations about images: name one "
            "that has questions (sources=[NAME]), or leave reading out"
        )
    return kept


def _has_images(path: str) -> bool:
    """Whether there can be any in what is held out; a folder may hold out nothing."""
    manifest = read_manifest(path)
    return "tiling" in manifest and manifest["splits"].get("valid", {}).get("images", 0) > 0
