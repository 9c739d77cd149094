"""What a step adds up on the device, read only when it is logged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.models.text import LossOutput
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig


class StepStats:
    """Sums over this rank's micro-batches of one step, on the device.

    `names` are those of the objective's own sums; those of the routers are always there.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, *, num_micro_batches: int, names: tuple[str, ...]
    ) -> None:
        model, self._names = config.model, names
        # The objective's, then of the routers: their losses, and what they dropped.
        self._sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=mesh.device)
        self._counts = torch.zeros(
            model.num_layers, model.num_experts, dtype=torch.int64, device=mesh.device
        )
        self._aux_loss_coef = config.moe.aux_loss_coef
        # Load-balancing losses of a layer in the step, of which each rank has a part.
        is_global = config.moe.aux_loss_scope == "global"
        self._num_aux_losses = num_micro_batches * (1 if is_global else mesh.dp)

    def weigh_aux_loss(self, output: LossOutput) -> Tensor:
        """The part that a micro-batch's load-balancing loss has in the step's loss."""
        return self._aux_loss_coef * output.aux_loss / self._num_aux_losses

    @torch.no_grad()
    def add(self, output: LossOutput, **sums: Tensor) -> None:
        """Add one micro-batch; does not wait for the device."""
        values = [*(sums[name] for name in self._names), output.aux_loss, output.num_dropped]
        self._sums += torch.stack([value.double() for value in values])
        self._counts += output.counts

    @property
    def num_dropped(self) -> Tensor:
        """Assignments that this rank has dropped in the step, on the device."""
        return self._sums[-1].clone()

    def reduce(self) -> "ReducedStats":
        """Sums over all ranks; every rank must call it. Waits for the device."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._counts)
        *sums, aux_loss_sum, dropped = self._sums.tolist()
        return ReducedStats(
            dict(zip(self._names, sums, strict=True)),
            aux_loss_sum / self._num_aux_losses,
            int(dropped),
            self._counts.cpu(),
        )


class ReducedStats:
    """The sums of one step over all ranks, as numbers."""

    def __init__(
        self, sums: dict[str, float], aux_loss: float, num_dropped: int, counts: Tensor
    ) -> None:
        self.sums = sums
        self.aux_loss = aux_loss
        self.num_dropped = num_dropped
        self.num_assignments = int(counts.sum())
        self._counts = counts

    @property
    def of_routers(self) -> dict[str, Any]:
        """What a step's row says of the routers; the load as a tensor (layers, experts)."""
        counts = self._counts.double()
        return {
            "expert_load": counts / counts.mean(1, keepdim=True).clamp(min=1e-9),
            "aux_loss": self.aux_loss,
            "drop_rate": self.drop_rate,
            "expert_imbalance": self.expert_imbalance,
        }

    @property
    def drop_rate(self) -> float:
        """Dropped over all assignments."""
        return self.num_dropped / max(self.num_assignments, 1)

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's assignments over the mean, averaged over layers; 1 is balance."""
        counts = self._counts.double()
        return float((counts.amax(1) / counts.mean(1).clamp(min=1e-9)).mean())
