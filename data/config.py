"""Configuration of the data room: schemas which Hydra fills and checks."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One prepared folder in the mixture."""

    # Folder written by launch/prepare_data.py.
    path: str = MISSING
    # Share of the mixture's tokens, relative to the other sources; 0 turns the source off.
    weight: float = 1.0


@dataclass
class DataConfig:
    """What the loader feeds to a training run."""

    # Tokens in a row, the unit of packing; a longer document is cut into pieces of this length.
    seq_len: int = MISSING
    # Tokens in one optimiser step over all ranks, padding included.
    global_batch_tokens: int = MISSING
    # Prepared folders by name; a name is a key of metrics, so keep it short.
    sources: dict[str, SourceConfig] = MISSING
    # Steps which a background thread keeps ready; 0 loads in the training thread.
    prefetch_steps: int = 2


@dataclass
class PrepareConfig:
    """One run of launch/prepare_data.py."""

    # Files, globs or folders (searched whole): one string or a list of them.
    input: Any = MISSING
    # Folder to write; one folder is one source of a mixture.
    output: str = MISSING
    # tokenizer.json, a folder which holds one, or "train" for a byte-level BPE of this input.
    tokenizer: str = "train"
    # Entries of a trained tokenizer, end-of-document token included.
    vocab_size: int = 8192
    # Text, in MB, from which a tokenizer is trained, drawn evenly from the input files.
    train_sample_mb: float = 50.0
    # Name of the token put after each document; the tokenizer must have it.
    end_of_document: str = "<end_of_document>"
    # Field (jsonl) or column (parquet) which holds the text.
    text_field: str = "text"
    # What is one document of a plain text file: "file" or "line".
    document_per: str = "file"
    # File name endings taken from folders; files and globs given by name are always taken.
    suffixes: list[str] = field(
        default_factory=lambda: [
            ".txt", ".md", ".rst", ".py",
            ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet",
        ]
    )  # fmt: skip
    # Share of documents, chosen by a hash of their text, which goes to the split "valid".
    validation_fraction: float = 0.005
    # Tokens, of all splits, after which a shard is closed; a killed run loses at most one.
    shard_tokens: int = 100_000_000
    # Fail when more than this share of lines or documents is malformed.
    max_rejected_fraction: float = 0.5
    # Tokenising processes; 0 takes every core this process may use.
    num_workers: int = 0
