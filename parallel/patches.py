"""Images in a row that is spread over ranks: who runs which tiles, and which patches travel.

A tile is one unit of the tower's work, whatever image it belongs to, so the tiles of all of a row's
images are dealt out in contiguous shares that differ by one at most. Its patches are shown where
their tokens lie, on any ranks, for an image may cross cut points. Every rank knows all layouts,
and so, without asking, how many patches each rank sends to each other. Only those travel that the
receiver shows: of a patch that is padding alone nobody gets the features. They have the tower's
width, not the text model's.

No patch is shown twice, so it has one receiver, and its gradient comes back from there alone:
forward and backward are one all-to-all each, in which nothing is added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.models.image_layout import NEWLINE, ImageLayout, place_images, tile_range
from fulmen.models.vl import Images
from fulmen.parallel.progress import exchange


@dataclass(frozen=True)
class PatchPlan:
    """What one rank of a row has to do with its images."""

    tiles: tuple[int, int]
    """First and end of the tiles that it runs, among those of all images."""
    rows: np.ndarray
    """`[sum(send)]` int64: the patches that it sends, by receiver; counted from its first tile."""
    send: list[int]
    """Patches to each rank of the row."""
    receive: list[int]
    """Patches from each rank of the row."""
    places: np.ndarray
    """`[image_tokens]` int64: where its own image tokens lie in its part."""
    sources: np.ndarray
    """`[image_tokens]` int64: the patch that each shows among those received, or `NEWLINE`."""


def plan_patches(
    images: Sequence[tuple[int, ImageLayout]], rank: int, size: int, tokens: int
) -> PatchPlan:
    """The plan of `rank` for a row of `size` parts of `tokens` each.

    `images` are the row's, by first token and in this order. Patches travel, and lie where they
    arrive, in the order of their tiles, so that one rank's lie behind those of the rank before.
    """
    num_tiles = sum(layout.num_tiles for _, layout in images)
    per_tile = images[0][1].tiling.patches_per_tile if images else 0
    own = tile_range(num_tiles, rank, size)
    cuts = [per_tile * tile_range(num_tiles, other, size)[0] for other in range(size)]
    cuts.append(per_tile * num_tiles)
    places, sources = place_images(images)
    ends = np.searchsorted(places, tokens * np.arange(size + 1))
    rows = []
    for other in range(size):
        shown = sources[ends[other] : ends[other + 1]]
        mine = shown[(shown >= cuts[rank]) & (shown < cuts[rank + 1])]
        rows.append(np.sort(mine) - cuts[rank])
    here = slice(ends[rank], ends[rank + 1])
    shown = sources[here]
    arriving = np.sort(shown[shown != NEWLINE])
    return PatchPlan(
        tiles=own,
        rows=np.concatenate(rows),
        send=[len(part) for part in rows],
        receive=np.diff(np.searchsorted(arriving, cuts)).tolist(),
        places=places[here] - rank * tokens,
        sources=np.where(shown == NEWLINE, NEWLINE, np.searchsorted(arriving, shown)),
    )


@dataclass(frozen=True)
class PatchRoute:
    """The exchange of a plan, with its rows on the device; `Images.route`."""

    rows: Tensor
    """As in the plan."""
    send: list[int]
    receive: list[int]


def collect_patches(group: dist.ProcessGroup, patches: Tensor, images: Images) -> Tensor:
    """`VisionLanguageModel.collect`: features of this rank's tiles to those of its tokens."""
    route = images.route
    assert route is not None, "the images of a part of a row need a route"
    leaving = patches.index_select(0, route.rows)
    return _Exchange.apply(leaving, route.send, route.receive, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, leaving: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.options = send, receive, group
        return _exchange("features of patches", leaving, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group = ctx.options
        back = _exchange("gradients of patches", gradients[0], receive, send, group)
        return back, None, None, None


def _exchange(
    name: str, leaving: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    arriving = leaving.new_empty(sum(receive), leaving.shape[1])
    with exchange(name, group):
        dist.all_to_all_single(arriving, leaving.contiguous(), receive, send, group=group)
    return arriving
