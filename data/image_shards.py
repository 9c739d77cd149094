"""What a prepared folder holds beside tokens where its documents have images or a mask."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulmen.models.image_layout import ImageLayout, Tiling, image_layout

IMAGE_COLUMNS = ("document", "first", "tokens", "tiles", "width", "height", "offset", "bytes")
"""Of a shard's image index: place of its document in the shard, first token in that, ..."""
DOCUMENT_COLUMNS = ("labels", "chosen", "images", "tiles", "image_tokens")
"""Of a shard's index of documents; `chosen` is the length of a pair's first half, or 0."""
LABELS, CHOSEN, IMAGES, TILES, IMAGE_TOKENS = range(len(DOCUMENT_COLUMNS))
_IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredImage:
    """One image of a document: where its bytes lie, and where its tokens."""

    path: str
    offset: int
    num_bytes: int
    first: int
    """First of its tokens, in the document or, once packed, in the micro-batch."""
    width: int
    height: int
    layout: ImageLayout


class ImageIndex:
    """Masks, images and pairs of one split, by shard and place of the document in the shard."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        entry = manifest["splits"][split]
        shards = entry["shards"]
        self.tiling = Tiling(**manifest["tiling"])
        self.special_ids: dict[str, int] = manifest["special_ids"]
        self.longest: int = entry["longest"]
        """Tokens of the longest document."""
        self.masks = [
            np.asarray(np.memmap(folder / one["mask_file"], dtype=np.uint8, mode="r"))
            for one in shards
        ]
        """1 for each token with a label, that is, for each to be predicted; by shard."""
        self._blobs = [str(folder / one["images_file"]) for one in shards]
        self._images = [np.load(folder / one["image_index_file"], mmap_mode="r") for one in shards]
        self._documents = [
            np.load(folder / one["documents_index_file"], mmap_mode="r") for one in shards
        ]

    def totals(self, shards: _IntArray, places: _IntArray) -> _IntArray:
        """`[n, 5]`, see DOCUMENT_COLUMNS, of documents at places of shards."""
        found = np.zeros((len(shards), len(DOCUMENT_COLUMNS)), np.int64)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            found[mine] = self._documents[shard][places[mine]]
        return found

    def images(self, shard: int, place: int) -> list[StoredImage]:
        """The images of a document, in the order of their tokens."""
        index = self._images[shard]
        begin, end = np.searchsorted(index[:, 0], [place, place + 1]).tolist()
        found = []
        for row in index[begin:end].tolist():
            _, first, tokens, _, width, height, offset, num_bytes = row
            layout = image_layout(width, height, self.tiling)
            if layout.num_tokens != tokens:
                raise ValueError(
                    f"{self._blobs[shard]}: an image of {width} x {height} pixels has {tokens} "
                    f"tokens there, and {layout.num_tokens} by this code: prepare the folder anew"
                )
            found.append(
                StoredImage(self._blobs[shard], offset, num_bytes, first, width, height, layout)
            )
        return found
