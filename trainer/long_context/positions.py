"""Loss by position: what a model gains from all the text before a token."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from fulmen.data.shards import PreparedSplit
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.prefill import Reader

BINS_PER_DOUBLING = 2


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the tokens between two positions."""

    documents: int
    edges: list[int]
    """Of the bins, from position 1 to the length; the first token of a text has no loss."""
    losses: list[float]
    """Of each bin, in nats a token."""


def position_loss(
    reader: Reader, split: PreparedSplit, *, length: int, samples: int, mesh: Mesh | None = None
) -> PositionLoss | None:
    """Over the first `length` tokens of held-out documents that have as many; None without one.

    All ranks call it; the documents, the first `samples` of them, are shared out between the rows.
    """
    lengths = np.array(split.lengths(np.arange(split.num_documents)))
    chosen = np.flatnonzero(lengths >= length)[:samples].tolist()
    if not chosen:
        return None
    rows, row = (1, 0) if mesh is None else (mesh.dp, mesh.dp_rank)
    edges = bin_edges(length)
    # Position p has the loss of the token there, given those before it.
    bins = torch.bucketize(torch.arange(1, length), torch.tensor(edges[1:]), right=True)
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    for begin in range(0, len(chosen), rows):
        number = chosen[min(begin + row, len(chosen) - 1)]
        ids = torch.from_numpy(split.document(number)[:length].astype(np.int64))
        losses = reader.losses(ids).cpu().double()
        # All ranks of a row have the same losses: the first one counts them.
        if begin + row < len(chosen) and (mesh is None or mesh.cp_rank == 0):
            sums += torch.bincount(bins, weights=losses, minlength=len(sums))
    if mesh is not None:
        on_device = sums.to(mesh.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    counts = torch.bincount(bins, minlength=len(sums)) * len(chosen)
    return PositionLoss(len(chosen), edges, (sums / counts).tolist())


def bin_edges(length: int) -> list[int]:
    """From 1 to `length`, as many in each doubling."""
    steps = range(int(np.ceil(BINS_PER_DOUBLING * np.log2(length))))
    return sorted({*(int(2 ** (step / BINS_PER_DOUBLING)) for step in steps), length})
