"""Configuration of the data room: schemas which Hydra fills and checks."""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One prepared folder in the mixture."""

    path: str = MISSING
    """Folder written by launch/prepare_data.py."""
    weight: float = 1.0
    """Share of the mixture's tokens, relative to the other sources; 0 turns the source off."""


@dataclass
class DataConfig:
    """What the loader feeds to a training run."""

    seq_len: int = MISSING
    """Tokens in a row, the unit of packing; a longer document is cut into pieces of this length."""
    global_batch_tokens: int = MISSING
    """Tokens in one optimiser step over all ranks, padding included."""
    # Any, because Hydra cannot add to a mapping of dataclasses; each becomes a SourceConfig.
    sources: dict[str, Any] = field(default_factory=dict)
    """Prepared folders by name; a name is a key of metrics, so keep it short."""
    length_bounds: list[int] = field(default_factory=lambda: [32768, 131072])
    """Least tokens of a medium and of a long document: shares by length and accounts go by them."""
    prefetch_steps: int = 2
    """Steps which a background thread keeps ready; 0 loads in the training thread."""
    image_workers: int = 0
    """Processes of each rank that decode images; 0 = its background thread does."""

    def __post_init__(self) -> None:
        self.sources = {name: _to_source(name, value) for name, value in self.sources.items()}


def _to_source(name: str, value: Any) -> SourceConfig:
    if isinstance(value, SourceConfig):
        return value
    known = [item.name for item in fields(SourceConfig)]
    if not isinstance(value, dict) or "path" not in value or not set(value) <= set(known):
        raise ValueError(f"data.sources.{name}={value}: give path and, if you like, weight")
    try:
        return SourceConfig(str(value["path"]), float(value.get("weight", 1.0)))
    except (TypeError, ValueError):
        raise ValueError(f"data.sources.{name}.weight={value['weight']}: not a number") from None


@dataclass
class PrepareConfig:
    """One run of launch/prepare_data.py."""

    input: Any = MISSING
    """Files, globs or folders (searched whole): one string or a list of them."""
    output: str = MISSING
    """Folder to write; one folder is one source of a mixture."""
    tokenizer: str = "train"
    """tokenizer.json, a folder which holds one, or "train" for a byte-level BPE of this input."""
    vocab_size: int = 8192
    """Entries of a trained tokenizer, end-of-document token included."""
    train_sample_mb: float = 50.0
    """Text, in MB, from which a tokenizer is trained, drawn evenly from the input files."""
    end_of_document: str = "<end_of_document>"
    """Name of the token put after each document; the tokenizer must have it."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens of a trained tokenizer, as prepare_images needs them."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet) which holds the text."""
    document_per: str = "file"
    """What is one document of a plain text file: "file" or "line"."""
    suffixes: list[str] = field(
        default_factory=lambda: [
            ".txt", ".md", ".rst", ".py",
            ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet",
        ]
    )  # fmt: skip
    """File name endings taken from folders; files and globs given by name are always taken."""
    validation_fraction: float = 0.005
    """Share of documents, chosen by a hash of their text, which goes to the split "valid"."""
    shard_tokens: int = 100_000_000
    """Tokens, of all splits, after which a shard is closed; a killed run loses at most one."""
    max_rejected_fraction: float = 0.5
    """Fail when more than this share of lines or documents is malformed."""
    num_workers: int = 0
    """Tokenising processes; 0 takes every core this process may use."""


@dataclass
class PrepareImagesConfig:
    """One run of launch/prepare_images.py."""

    input: Any = MISSING
    """Tars (webdataset), parquet or jsonl: files, globs, folders, or a list of them."""
    output: str = MISSING
    """Folder to write; one folder is one source of a mixture."""
    held_out: Any = None
    """Files, globs or folders all of whose documents go to the split "valid"."""
    tokenizer: str = "train"
    """tokenizer.json, a folder which holds one, or "train" for a byte-level BPE of this input."""
    vocab_size: int = 8192
    """Entries of a trained tokenizer, special tokens included."""
    train_sample_mb: float = 50.0
    """Text, in MB, from the start of the input, from which a tokenizer is trained."""
    end_of_document: str = "<end_of_document>"
    """Name of the token put after each document."""
    image_token: str = "<image>"
    """Name of the token that stands, once for each, where an image's features go."""
    begin_turn: str = "<beginning_of_sentence>"
    """Name of the token that begins a turn of a conversation."""
    end_turn: str = "<end_of_sentence>"
    """Name of the token that ends it; the assistant learns to give it."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names that the input has for text, messages, prompt, chosen, rejected, image or images."""
    resolution: str = "dynamic"
    """dynamic: a thumbnail and a grid of tiles; fixed: the thumbnail alone."""
    tile_size: int = 336
    """Pixels of a tile's side."""
    patch_size: int = 14
    """Pixels of a patch's side; one token each."""
    max_tiles_per_side: int = 6
    """Tiles along one side of a grid."""
    max_tiles: int = 18
    """Tiles of a grid."""
    max_tokens: int = 8192
    """Tokens of a document, image tokens included; a longer one is rejected, for none is cut."""
    max_caption_tokens: int | None = None
    """Tokens to which a caption's text is cut, its end included; null = none is cut."""
    max_image_pixels: int = 50_000_000
    """Pixels that an image may have, by its header."""
    max_aspect_ratio: float = 100.0
    """Longer by shorter side that an image may have."""
    max_image_mb: float = 64.0
    """Megabytes that the file of an image, or the text of a record, may have."""
    validation_fraction: float = 0.005
    """Share of documents, by a hash of their first image, which goes to the split "valid"."""
    shard_tokens: int = 100_000_000
    """Tokens, of all splits, after which a shard is closed; a killed run loses at most one."""
    shard_mb: float = 2048.0
    """Megabytes of images after which a shard is closed."""
    max_rejected_fraction: float = 0.5
    """Fail when more than this share of records is broken."""
    num_workers: int = 0
    """Processes; 0 takes every core this process may use. What is written does not depend on it."""


@dataclass
class RetrievalConfig:
    """One run of launch/make_retrieval.py."""

    output: str = MISSING
    """Folder to write: documents as .jsonl.zst for launch/prepare_data.py, and the tokenizer."""
    seed: int = 0
    """Of all documents; two sets for one run need two seeds."""
    tokens: int = 10_000_000
    """Tokens to write in all; the last document may pass it."""
    lengths: list[Any] = field(default_factory=lambda: [[2048, 8192, 0.3], [8192, 32768, 0.7]])
    """[least, most, share of tokens] of each range; within one, lengths are log-uniform."""
    kinds: list[str] = field(
        default_factory=lambda: ["needle", "multi_value", "tracking", "passage"]
    )
    """Kinds of questions, all equally frequent; one that is named twice comes twice as often."""
    haystack: str = "text"
    """text (of `input`), or words: a synthetic language that a small model learns in minutes."""
    input: Any = None
    """Files, globs or folders of the haystack's text; null = Python's standard library."""
    tokenizer: str | None = None
    """tokenizer.json, or a prepared folder, by which lengths count; words bring their own."""
    text_field: str = "text"
    """Field (jsonl) or column (parquet) which holds the text of `input`."""
    max_input_mb: float = 20.0
    """Text, in MB, after which no more of `input` is read."""
    num_keys: int = 1024
    """Keys of the language of words; a document has at most as many questions."""
    num_workers: int = 0
    """Processes; 0 takes as many as save time, at most the cores that this process may use.

    What is written does not depend on it."""


@dataclass
class MakeImagesConfig:
    """One run of launch/make_images.py."""

    output: str = MISSING
    """Folder to write: tars for launch/prepare_images.py in captions, conversations, pairs, ..."""
    seed: int = 0
    """Of all records."""
    captions: int = 2000
    """Pictures with a caption."""
    conversations: int = 2000
    """Conversations about one or two pictures."""
    pairs: int = 500
    """Pairs of a right and a wrong answer."""
    texts: int = 0
    """Conversations about pictures that are described instead of shown."""
    labelled: int = 0
    """Pictures of texts that captions have too, with the text alone: for classification."""
    held_out: int = 200
    """Records of each sort that is made, with texts that none of the others have."""
    kinds: list[str] = field(default_factory=lambda: ["digits", "words"])
    """What is written: digits, words, or handwritten (scikit-learn's digits)."""
    letters: list[int] = field(default_factory=lambda: [2, 4])
    """Least and most digits or letters."""
    width: list[int] = field(default_factory=lambda: [48, 160])
    """Least and most pixels."""
    height: list[int] = field(default_factory=lambda: [32, 96])
    """Least and most pixels."""
    cell: int | None = None
    """Pixels of a typewriter's cells: each letter in a square of its own, from the left, on any
    line; null = texts of all sizes at all places."""
    text_pairs: float = 0.3
    """Share of pairs without a picture."""
    shard_records: int = 1000
    """Records of one tar."""
