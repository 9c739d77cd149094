"""Sample from a trained model: `python launch/generate.py run=runs/text01_tiny/ID [key=value ...]`.

With images: `... prompt='<image>What is written here?' images=[a.png]`.
Keys and their defaults: recipes/generate.yaml.
"""

import math
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen.data.shards import MANIFEST, read_manifest
from fulmen.launch.checkpoints import find_checkpoint, find_tokenizer
from fulmen.launch.hydra_main import run_hydra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fulmen.trainer.reading.prompts import Prompt


@dataclass
class GenerateConfig:
    """What to sample from and how."""

    run: str | None = None
    """Run folder: its newest checkpoint is used, and the samples go into its report."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    tokenizer: str | None = None
    """tokenizer.json; null = the one of the run's first source."""
    prompts: list[str] = field(default_factory=list)
    """Texts to continue."""
    prompt: str | None = None
    """One text, instead of prompts."""
    images: list[str] = field(default_factory=list)
    """Image files that the prompt shows, where it says `<image>`, or in front of it."""
    chat: bool | None = None
    """The prompt is what a user says, and the assistant answers; null = if it has images."""
    resolution: str = "dynamic"
    """dynamic: a thumbnail and a grid of tiles for each image; fixed: the thumbnail alone."""
    max_new_tokens: int = 100
    """Tokens to add to each prompt."""
    temperature: float = 0.8
    """0 = always the most likely token."""
    top_k: int | None = 50
    """Only the k most likely tokens; null = all."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    chunk_tokens: int = 32_768
    """Tokens of a prompt that are read at a time."""


def sample(config: GenerateConfig) -> None:
    """Load, continue each prompt, print; with `run`, also add the samples to the report."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("generation runs in one process: start with python, without torchrun")
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    check(config)

    import torch

    from fulmen.trainer.generate import generate
    from fulmen.trainer.load import load_model
    from fulmen.trainer.manifest import verify
    from fulmen.trainer.prompt_images import PromptImages
    from fulmen.trainer.report import write_report
    from fulmen.trainer.run_folder import update_summary

    verify(checkpoint)
    tokenizer, prompts, stop_ids = read_prompts(config, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, dtype=getattr(torch, config.dtype), device=device)
    generator = torch.Generator().manual_seed(config.seed)
    samples = []
    print(f"samples of {checkpoint}:")
    for shown, prompt in prompts:
        images, vision = None, model.config.vision
        if prompt.pictures:
            assert vision is not None
            images = PromptImages.of(prompt.pictures, tile_size=vision.tile_size)
        new_ids = generate(
            model,
            prompt.ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            generator=generator,
            stop_ids=stop_ids,
            chunk_tokens=config.chunk_tokens,
            images=images,
        )
        samples.append(shown + tokenizer.decode(new_ids))
        print(f"--------\n{samples[-1]}")
    if config.run is not None:
        try:
            update_summary(Path(config.run), {"samples": samples})
            print(f"--------\nreport: {write_report(Path(config.run))}")
        except OSError as error:  # such as a run that belongs to somebody else
            print(f"--------\nnot added to the report of run={config.run}: {error}")


def check(config: GenerateConfig) -> None:
    """Raise `ValueError`, naming the key, for what can be told to fail before anything runs."""
    for key, choices in (("dtype", ("float32", "bfloat16")), ("resolution", ("dynamic", "fixed"))):
        if getattr(config, key) not in choices:
            raise ValueError(f"{key}={getattr(config, key)}: must be one of {', '.join(choices)}")
    if config.images and config.prompt is None:
        raise ValueError("images: say what is to be done with them, prompt=TEXT")
    if not texts_of(config):
        raise ValueError("prompts is empty: give prompt=TEXT, or prompts=[TEXT,...]")
    for text in texts_of(config):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {text!r} is not UTF-8: give it in that encoding") from None
    for key, least in (("max_new_tokens", 0), ("top_k", 1), ("chunk_tokens", 1)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value}: must be at least {least}")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(f"temperature={config.temperature}: must be finite and at least 0")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"seed={config.seed}: must be in [-2**63, 2**63)")


def texts_of(config: GenerateConfig) -> list[str]:
    """What is to be continued."""
    return config.prompts if config.prompt is None else [config.prompt]


def read_prompts(
    config: GenerateConfig, checkpoint: Path
) -> "tuple[Tokenizer, list[tuple[str, Prompt]], Collection[int]]":
    """The tokenizer, each prompt as it is shown and as it is read, and the tokens that end one."""
    from fulmen.data.tokenise import load_tokenizer
    from fulmen.trainer.reading.prompts import Prompt, PromptMaker, open_picture
    from fulmen.trainer.weights import load_model_config

    tokenizer_file = find_tokenizer(config.tokenizer, checkpoint)
    texts = texts_of(config)
    chat = bool(config.images) if config.chat is None else config.chat
    if not chat and not config.images:
        tokenizer = load_tokenizer(str(tokenizer_file))
        end_id = end_of_document_id(tokenizer_file)
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        prompts = [(text, Prompt(ids, ())) for text, ids in zip(texts, encoded, strict=True)]
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise ValueError(
                    f"prompt {text!r} has no tokens: give at least one character of text"
                )
        return tokenizer, prompts, () if end_id is None else (end_id,)
    vision = load_model_config(checkpoint).vision
    if config.images and vision is None:
        raise ValueError("images: the model has no eyes (model.vision): give text alone")
    pictures = [open_picture(Path(path)) for path in config.images]
    maker = PromptMaker.open(tokenizer_file, vision, fixed=config.resolution == "fixed")
    names = "".join(f"[{path}]\n" for path in config.images)
    prompts = [
        (f"{names}{text}\n" if chat else names + text, maker.make(text, pictures, chat=chat))
        for text in texts
    ]
    return maker.tokenizer, prompts, maker.stop_ids


def end_of_document_id(tokenizer_file: Path) -> int | None:
    """The token that ends a document in the prepared folder that the tokenizer lies in, if any."""
    if not (tokenizer_file.parent / MANIFEST).exists():
        return None
    end_id: int = read_manifest(tokenizer_file.parent)["end_of_document"]["id"]
    return end_id


def quote_prompt(word: str) -> str:
    """Any text behind `prompt=` as Hydra takes it: `<image>` would be no value for it."""
    key, _, text = word.partition("=")
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key != "prompt" or is_quoted or text == "null":
        return word
    # A value is read twice, and each time only certain backslashes are no mere characters: by
    # OmegaConf those in front of `${`, by Hydra those in front of a quote.
    text = re.sub(r"(\\*)\$\{", lambda found: rf"{2 * found[1]}\${{", text)
    escaped = re.sub(
        r'(\\*)("|\Z)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), text
    )
    return f'{key}="{escaped}"'


def main() -> None:
    """Entry point."""
    sys.argv[1:] = [quote_prompt(word) for word in sys.argv[1:]]
    run_hydra(sample, "generate", GenerateConfig)


if __name__ == "__main__":
    main()
