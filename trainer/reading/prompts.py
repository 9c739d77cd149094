"""From a text and images to what a model reads, as `prepare_images` writes its documents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from PIL import Image
from tokenizers import Tokenizer

from fulmen.data.config import PrepareImagesConfig
from fulmen.data.conversations import RecordError, parse_prompt
from fulmen.data.image_encoding import SpecialIds, tokenise_prompt
from fulmen.data.images import ImageError, ImageLimits, decode_image, layout_of
from fulmen.data.shards import MANIFEST, read_manifest
from fulmen.data.tokenise import load_tokenizer, special_id
from fulmen.models.config import VisionConfig
from fulmen.models.image_layout import RELEASED, Tiling
from fulmen.trainer.prompt_images import Picture


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers."""

    ids: list[int]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts with images for one model."""

    tokenizer: Tokenizer
    ids: SpecialIds
    tiling: Tiling | None
    """None where the model has no eyes."""

    @classmethod
    def open(
        cls, tokenizer_file: Path, vision: VisionConfig | None, *, fixed: bool = False
    ) -> Self:
        """`fixed` gives each image its thumbnail alone. ValueError for tokens that do not fit."""
        tokenizer = load_tokenizer(str(tokenizer_file))
        ids = special_ids(tokenizer_file, tokenizer)
        if vision is None:
            return cls(tokenizer, ids, None)
        if ids.image != vision.image_token_id:
            raise ValueError(
                f"the tokenizer {tokenizer_file} has {ids.image} for an image token, the model "
                f"{vision.image_token_id}: give the tokenizer of its data"
            )
        tiling = vision.tiling
        if fixed:
            tiling = replace(tiling, max_tiles=0)
        return cls(tokenizer, ids, tiling)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset((self.ids.end_turn, self.ids.end_of_document))

    def make(self, text: str, images: Sequence[Image.Image], *, chat: bool) -> Prompt:
        """A text with images at its `<image>`s, or in front; with `chat` what a user says.

        ValueError where their numbers differ, or an image is too long for any grid.
        """
        assert not images or self.tiling is not None
        try:
            turns = parse_prompt(text, len(images), chat=chat)
            layouts = [layout_of(image.size, self.tiling or RELEASED) for image in images]
        except (RecordError, ImageError) as error:
            raise ValueError(f"prompt: {error.reason}") from None
        tokens, placed = tokenise_prompt(turns, layouts, self.ids, self.tokenizer)
        pictures = (Picture(first, layouts[number], images[number]) for number, first in placed)
        return Prompt(tokens, tuple(pictures))


def special_ids(tokenizer_file: Path, tokenizer: Tokenizer) -> SpecialIds:
    """As the prepared folder that the tokenizer lies in says, else by their usual names."""
    if (tokenizer_file.parent / MANIFEST).exists():
        manifest = read_manifest(tokenizer_file.parent)
        if "special_ids" in manifest:
            return SpecialIds(**manifest["special_ids"])
    usual = PrepareImagesConfig()
    keys = ("end_of_document", "image_token", "begin_turn", "end_turn")
    return SpecialIds(*(special_id(tokenizer, key, getattr(usual, key)) for key in keys))


def open_picture(path: Path) -> Image.Image:
    """The image in a file; ValueError that names the file for whatever is no whole image."""
    try:
        return decode_image(path.read_bytes(), ImageLimits())
    except OSError as error:
        raise ValueError(f"image {path} cannot be read: {error.strerror}") from None
    except ImageError as error:
        raise ValueError(f"image {path} is of no use, {error.kind}: {error.reason}") from None
