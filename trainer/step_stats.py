"""What a step adds up on the device, read only when it is logged."""

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.models.text import LossOutput


class StepStats:
    """Sums over this rank's micro-batches of one step, on the device."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, aux loss, dropped
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, output: LossOutput) -> None:
        """Add one micro-batch; does not wait for the device."""
        self._sums += torch.stack(
            [output.loss_sum.double(), output.aux_loss.double(), output.num_dropped.double()]
        )
        self._counts += output.counts

    def reduce(self) -> "ReducedStats":
        """Sums over all ranks; every rank must call it. Waits for the device."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._counts)
        loss_sum, aux_loss_sum, dropped = self._sums.tolist()
        return ReducedStats(loss_sum, aux_loss_sum, int(dropped), self._counts.cpu())


class ReducedStats:
    """The sums of one step over all ranks, as numbers."""

    def __init__(
        self, loss_sum: float, aux_loss_sum: float, num_dropped: int, counts: Tensor
    ) -> None:
        self.loss_sum = loss_sum
        self.aux_loss_sum = aux_loss_sum
        self.num_dropped = num_dropped
        self.num_assignments = int(counts.sum())
        self._counts = counts

    @property
    def drop_rate(self) -> float:
        """Dropped over all assignments."""
        return self.num_dropped / max(self.num_assignments, 1)

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's assignments over the mean, averaged over layers; 1 is balance."""
        counts = self._counts.double()
        return float((counts.amax(1) / counts.mean(1).clamp(min=1e-9)).mean())
