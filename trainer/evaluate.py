"""Loss on held-out documents, by source."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from fulmen.data.loader import evaluation_batches
from fulmen.data.shards import PreparedSplit
from fulmen.kernels.cross_entropy.op import IGNORE_INDEX
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import phase
from fulmen.trainer.inputs import model_inputs


@torch.no_grad()
def evaluate(
    model: TextModel,
    splits: Mapping[str, PreparedSplit],
    mesh: Mesh,
    *,
    seq_len: int,
    micro_batch_tokens: int,
    max_tokens: int,
) -> dict[str, float]:
    """Cross entropy per label in nats on each held-out split; all ranks call it."""
    losses = {}
    model.eval()
    for name, split in splits.items():
        sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # loss, labels
        for batch in evaluation_batches(
            split,
            seq_len=seq_len,
            micro_batch_tokens=micro_batch_tokens,
            max_tokens=max_tokens,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            tile_part=(mesh.cp_rank, mesh.cp),
        ):
            phase("evaluation")
            inputs = model_inputs(batch, mesh, model.config.vision)
            output = model(**inputs)
            assert isinstance(output, LossOutput)
            sums[0] += output.loss_sum.double()
            sums[1] += (inputs["labels"] != IGNORE_INDEX).sum()
        dist.all_reduce(sums)
        losses[name] = (sums[0] / sums[1]).item()
    model.train()
    return losses
