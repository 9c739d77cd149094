"""Read planned micro-batches: their tokens, and where there are images, their tiles."""

from collections.abc import Sequence
from dataclasses import replace

from fulmen.data.image_batches import decode_images
from fulmen.data.image_decoding import ImageDecoder
from fulmen.data.packing import PackedBatch, read_micro_batch
from fulmen.data.shards import IntArray, PreparedSplit
from fulmen.models.image_layout import Tiling


class MicroBatchReader:
    """Reads micro-batches of `num_tokens` tokens from the sources.

    ValueError where sources with images do not fit together.
    """

    def __init__(
        self,
        splits: Sequence[PreparedSplit],
        num_tokens: int,
        *,
        image_workers: int = 0,
        tile_part: tuple[int, int] = (0, 1),
    ) -> None:
        self._splits, self._num_tokens, self._tile_part = splits, num_tokens, tile_part
        self._tile_size = _common_tile_size(splits)
        self._decoder = ImageDecoder(image_workers if self._tile_size else 0)

    def read(self, micro_batches: Sequence[IntArray]) -> list[PackedBatch]:
        """The micro-batches of these pieces."""
        batches = [
            read_micro_batch(pieces, self._splits, num_tokens=self._num_tokens)
            for pieces in micro_batches
        ]
        part, num_parts = self._tile_part
        decoded = decode_images(
            [batch.images for batch in batches if batch.images is not None],
            self._decoder,
            part=part,
            num_parts=num_parts,
            tile_size=self._tile_size,
        )
        if not decoded:
            return batches
        return [replace(batch, images=one) for batch, one in zip(batches, decoded, strict=True)]

    def close(self) -> None:
        """End the decoding processes."""
        self._decoder.close()


def check_fits(split: PreparedSplit, seq_len: int) -> None:
    """ValueError for a document with images that a row cannot hold: none is cut."""
    if split.images is not None and split.images.longest > seq_len:
        raise ValueError(
            f"data.sources.{split.name}: {split.path} has a document of {split.images.longest} "
            f"tokens, and documents with images are not cut: set data.seq_len={seq_len} to at "
            f"least that, or prepare the folder with max_tokens={seq_len}"
        )


def check_vision(splits: Sequence[PreparedSplit], tiling: Tiling, image_token_id: int) -> None:
    """ValueError for a source whose images are not those of a model's tower.

    Its grids may be fewer, as those of a fixed resolution are: a document has its own layout.
    """
    for split in splits:
        if split.images is None:
            continue
        here = split.images.tiling
        for key, ours, theirs in (
            ("tile_size", here.tile_size, tiling.tile_size),
            ("patch_size", here.patch_size, tiling.patch_size),
            ("image_token_id", split.images.special_ids["image"], image_token_id),
        ):
            if ours != theirs:
                raise ValueError(
                    f"model.vision.{key}={theirs}, but data.sources.{split.name} was prepared with "
                    f"{ours} ({split.path}): set model.vision.{key}={ours}, or prepare it anew"
                )


def _common_tile_size(splits: Sequence[PreparedSplit]) -> int:
    """Pixels of a tile's side; 0 where no source has images."""
    with_images = [split for split in splits if split.images is not None]
    for other in with_images[1:]:
        first = with_images[0]
        assert first.images is not None
        assert other.images is not None
        for what, here, there in (
            ("tile_size", first.images.tiling.tile_size, other.images.tiling.tile_size),
            ("patch_size", first.images.tiling.patch_size, other.images.tiling.patch_size),
            ("special tokens", first.images.special_ids, other.images.special_ids),
        ):
            if here != there:
                raise ValueError(
                    f"data.sources.{first.name} and data.sources.{other.name} were prepared with "
                    f"different {what} ({here} and {there}): prepare both alike"
                )
    if not with_images:
        return 0
    assert with_images[0].images is not None
    return with_images[0].images.tiling.tile_size
