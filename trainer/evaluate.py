"""Held-out documents: their micro-batches, and the loss on them by source."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from fulmen.data.loader import evaluation_batches
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.kernels.cross_entropy.op import IGNORE_INDEX
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import phase
from fulmen.trainer.config import RunConfig
from fulmen.trainer.inputs import model_inputs


def held_out_batches(
    split: PreparedSplit,
    mesh: Mesh,
    config: RunConfig,
    *,
    max_tokens: int | None = None,
    doing: str = "evaluation",
) -> Iterator[PackedBatch]:
    """This rank's micro-batches of a split, as long as in training; equally many on each rank.

    `max_tokens` over all ranks, None = `evaluation.max_tokens`; `doing` is what is said of a rank
    that does not go on.
    """
    for batch in evaluation_batches(
        split,
        seq_len=config.data.seq_len,
        micro_batch_tokens=config.trainer.micro_batch_tokens,
        max_tokens=config.evaluation.max_tokens if max_tokens is None else max_tokens,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        tile_part=(mesh.cp_rank, mesh.cp),
    ):
        phase(doing)
        yield batch


@torch.no_grad()
def evaluate(
    model: TextModel,
    splits: Mapping[str, PreparedSplit],
    mesh: Mesh,
    config: RunConfig,
) -> dict[str, float]:
    """Cross entropy per label in nats on each held-out split; all ranks call it."""
    losses = {}
    model.eval()
    for name, split in splits.items():
        sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # loss, labels
        for batch in held_out_batches(split, mesh, config):
            inputs = model_inputs(batch, mesh, model.config.vision)
            output = model(**inputs)
            assert isinstance(output, LossOutput)
            sums[0] += output.loss_sum.double()
            sums[1] += (inputs["labels"] != IGNORE_INDEX).sum()
        dist.all_reduce(sums)
        losses[name] = (sums[0] / sums[1]).item()
    model.train()
    return losses
