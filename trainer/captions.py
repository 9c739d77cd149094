"""Captioned images as an objective: how a vision tower is pretrained by itself (models/coca.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.data.loader import StepBatch
from fulmen.data.packing import IGNORE_LABEL, PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.models.coca import CoCa, CoCaLosses
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import phase
from fulmen.trainer.caption_inputs import caption_inputs, check_captions, most_pairs
from fulmen.trainer.config import RunConfig
from fulmen.trainer.evaluate import held_out_batches
from fulmen.trainer.objective import Objective
from fulmen.trainer.zero_shot import ZeroShot


class Captioning(Objective):
    """Cross entropy of the captions, a mean over a step's labels, and of which image has which,
    a mean over its images, each times its weight.

    What is compared are the pairs of one micro-batch on all ranks: a step of several micro-batches
    has several smaller contrasts.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        mesh: Mesh,
        train: Sequence[PreparedSplit],
        held_out: Mapping[str, PreparedSplit],
    ) -> None:
        super().__init__(config, model, mesh, train, held_out)
        assert isinstance(model, CoCa)
        assert config.model.coca is not None
        self._coca = config.model.coca
        self._model = model
        for split in [*train, *held_out.values()]:
            check_captions(split, config.model)
        self._zero_shot = {}
        if held_out:
            self._zero_shot = {
                name: ZeroShot(name, one, config, mesh)
                for name, one in config.evaluation.zero_shot.items()
            }

    def begin_step(self, batch: StepBatch) -> None:
        self._num_labels, self._num_images = batch.num_labels, batch.num_images
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        self._temperature = torch.zeros((), device=self.mesh.device)

    def loss(self, micro_batch: PackedBatch) -> Tensor:
        output = self._forward(micro_batch)
        self._sums += _sums_of(output)
        self._temperature = output.temperature
        coca = self._coca
        return (
            coca.caption_weight * output.caption_loss_sum / self._num_labels
            + coca.contrastive_weight * output.contrastive_loss_sum / self._num_images
        )

    @property
    def num_dropped(self) -> Tensor:
        return torch.zeros((), device=self.mesh.device)

    def read_step(self) -> dict[str, Any]:
        means = self._means(self._sums, self._num_labels, self._num_images)
        # There are no experts; one, where no token has a choice, is in balance.
        return means | {
            "temperature": self._temperature.item(),
            "drop_rate": 0.0,
            "expert_imbalance": 1.0,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self._model.eval()
        values: dict[str, float] = {}
        for source, split in self.held_out.items():
            sums = torch.zeros(5, dtype=torch.float64, device=self.mesh.device)
            for batch in held_out_batches(split, self.mesh, self.config):
                sums[:3] += _sums_of(self._forward(batch))
                sums[3] += (batch.labels != IGNORE_LABEL).sum()
                sums[4] += 0 if batch.images is None else len(batch.images.images)
            counts = sums[3:].clone()
            dist.all_reduce(counts)
            found = self._means(sums[:3], *counts.tolist())
            values |= {f"{name}/{source}": value for name, value in found.items()}
        for name, one in self._zero_shot.items():
            phase("zero-shot classification")
            values[f"zero_shot/{name}"] = one.accuracy(self._model)
        self._model.train()
        return values

    def _forward(self, batch: PackedBatch) -> CoCaLosses:
        pixels, captions = caption_inputs(batch, self.config.model, self.mesh.device)
        room = most_pairs(self.config.model, self.config.trainer.micro_batch_tokens)
        output = self._model(pixels, captions, room=room)
        assert isinstance(output, CoCaLosses)
        return output

    def _means(self, sums: Tensor, num_labels: float, num_images: float) -> dict[str, float]:
        """Of this rank's sums, over all ranks."""
        sums = sums.clone()
        dist.all_reduce(sums)
        caption, contrastive, right = sums.tolist()
        caption, contrastive = caption / num_labels, contrastive / num_images
        coca = self._coca
        return {
            "loss": coca.caption_weight * caption + coca.contrastive_weight * contrastive,
            "caption_loss": caption,
            "contrastive_loss": contrastive,
            "contrastive_accuracy": right / (2 * num_images),
        }


def _sums_of(output: CoCaLosses) -> Tensor:
    sums = output.caption_loss_sum, output.contrastive_loss_sum, output.num_right
    return torch.stack([one.detach().double() for one in sums])
