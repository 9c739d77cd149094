"""ZeRO stages 0 to 3, dense and expert parameters apart, on torch's FSDP2.

One engine serves every stage, because FSDP2 lets each unit choose when it gathers, keeps and
reduces:

| stage | parameters between steps | parameters in a step    | gradients over micro-batches    |
|-------|--------------------------|-------------------------|---------------------------------|
| 0     | full copy                | kept                    | full, all-reduced after the last |
| 1     | sharded                  | gathered once, kept     | full, scattered after the last   |
| 2     | sharded                  | gathered once, kept     | scattered after each             |
| 3     | sharded                  | gathered where used     | scattered after each             |

The optimiser state is a full copy in stage 0 and sharded otherwise. All ranks share the parameters,
but experts that are spread over ep and etp only the edp ranks that hold the same. Gradients are
*sums* over ranks: the loss is divided by global counts before the backward pass, so nothing depends
on the number of ranks or on the size of a mesh axis.

A unit may hold frozen parameters beside others, or nothing else. FSDP2 reduces the gradients that
there are, and where no gradient passes through a unit it drops the gathered weights at the end of
the backward pass.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fulmen.models.parts import PARTS, parts_of
from fulmen.parallel.mesh import Mesh


class ZeroEngine:
    """Shards a model built on the meta device, and drives its micro-batches and gradient norm."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        frozen: Collection[str] = (),
    ) -> None:
        """`dtype` is that of the forward and backward pass; parameters and reductions are fp32.

        `frozen` names parameters that get no gradient; they are sharded and gathered as the others.
        """
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        self.model = model
        self.mesh = mesh
        self.parameters: dict[str, DTensor] = {}
        """Name -> sharded fp32 parameter. The model's own attributes are at times the gathered
        ones, so this is what optimiser and checkpoints use."""
        self._stages: dict[FSDPModule, int] = {}
        self._policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def shard(
        self,
        module: nn.Module,
        stage: int,
        *,
        experts: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make `module`'s parameters, less those of units inside it, one unit of ZeRO `stage`.

        `dtype` is that of its computation, if it is not the model's.
        """
        policy = self._policy
        if dtype is not None:
            policy = dataclasses.replace(policy, param_dtype=dtype)
        spread = experts and self.mesh.spreads_experts
        if spread:
            mesh = self.mesh.experts["edp", "one"] if stage == 0 else self.mesh.experts["edp"]
        else:
            mesh = self.mesh.replicate if stage == 0 else self.mesh.shard
        unit = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=stage == 3,
            mp_policy=policy,
            shard_placement_fn=self._expert_placement if experts and (stage or spread) else None,
        )
        unit.set_gradient_divide_factor(1.0)
        # With a divide factor, torch would ask for a reduction that gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
        self._stages[unit] = stage

    def _expert_placement(self, parameter: nn.Parameter) -> Shard:
        if isinstance(parameter, DTensor):
            return self._placement_beside(parameter)
        return Shard(expert_shard_dim(parameter.shape, self.mesh.world_size))

    def _placement_beside(self, parameter: DTensor) -> Shard:
        """A dim that ep and etp leave; `check_experts` has seen that one divides.

        Sharding a dim twice would interleave its parts, which no checkpoint format knows.
        """
        taken = {
            placement.dim
            for placement, size in zip(
                parameter.placements, parameter.device_mesh.shape, strict=True
            )
            if size > 1 and isinstance(placement, Shard)
        }
        free = [dim for dim in (1, 2) if dim not in taken]
        return Shard(next((d for d in free if parameter.shape[d] % self.mesh.edp == 0), free[0]))

    def begin_micro_batch(self, *, is_last: bool) -> None:
        """Say whether the coming backward pass is the step's last; call before its forward."""
        for unit, stage in self._stages.items():
            unit.set_requires_gradient_sync(is_last or stage >= 2, recurse=False)
            unit.set_reshard_after_backward(is_last or stage == 3, recurse=False)
            unit.set_is_last_backward(is_last)

    @property
    def stages(self) -> Mapping[nn.Module, int]:
        """ZeRO stage of each unit."""
        return cast(Mapping[nn.Module, int], self._stages)  # a unit is a module of its own class

    def drop_gathered(self) -> None:
        """Forget copies that were gathered, as the parts that they are of have other values now."""
        for unit in self._stages:
            unit.reshard()

    def materialize(self) -> None:
        """Allocate this rank's shards, without values; call once, after the last `shard`."""
        # What `to_empty` does, without asking DTensor how each of them is laid out: it takes longer
        # over that than all else takes here.
        with torch.no_grad():
            self.model._apply(partial(_allocate, device=self.mesh.device))
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} was left out of every ZeRO unit"
            self.parameters[name] = parameter

    @property
    def trainable(self) -> dict[str, DTensor]:
        """Those of `parameters` that are not frozen."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None, loss: Tensor | None = None) -> Tensor:
        """Norm of the whole gradient over all ranks, an fp32 scalar; scales it to `max_norm`.

        `loss`, this rank's part of the step's, becomes the sum over ranks on the same way.
        """
        gradients = []
        for parameter in self.trainable.values():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor), "every parameter takes part in every step"
            gradients.append(gradient.to_local())
        held = [gradient for gradient in gradients if gradient.numel()]
        # Rows of parts and columns of parameters; a product of matrices would be no faster, and
        # its order of sums is the library's.
        sums = (self._part_shares * _sums_of_squares(held, self.mesh.device)).sum(1)
        if loss is not None:
            sums = torch.cat([sums, loss.double().reshape(1)])
        dist.all_reduce(sums, group=self.mesh.shard.get_group())
        if loss is not None:
            loss.copy_(sums[-1])
        self._part_sums = sums[: len(self._parts)]
        norm = self._part_sums.sum().sqrt()
        if max_norm is not None and held:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(held, scale)
        return norm.float()

    def part_norms(self) -> dict[str, float]:
        """Gradient norm of each part of the model that trains, of the last `clip_grad_norm`.

        By the parts of models/parts.py, before the clipping; waits for the device.
        """
        return dict(zip(self._parts, self._part_sums.sqrt().tolist(), strict=True))

    @cached_property
    def _parts(self) -> list[str]:
        found = set(parts_of(self.trainable).values())
        return [part for part in PARTS if part in found]

    @cached_property
    def _part_shares(self) -> Tensor:
        """(parts, parameters of which this rank holds something), fp64.

        What this rank's sum of squares counts in the part's: 1 / the ranks that hold the same.
        """
        part_of = parts_of(self.trainable)
        held = {name: p for name, p in self.trainable.items() if local_part(p).numel()}
        shares = torch.zeros(len(self._parts), len(held), dtype=torch.float64)
        for column, (name, parameter) in enumerate(held.items()):
            copies = self.mesh.world_size // parameter.device_mesh.size()
            for placement, size in zip(
                parameter.placements, parameter.device_mesh.shape, strict=True
            ):
                copies *= size if placement.is_replicate() else 1
            shares[self._parts.index(part_of[name]), column] = 1 / copies
        return shares.to(self.mesh.device)


def expert_shard_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim along which `ranks` share experts that none of them splits otherwise.

    Whole experts per rank as long as there are enough of them; else a part of each one. Fewer
    experts than ranks on dim 0 would pad every rank to a whole expert.
    """
    if shape[0] >= ranks:
        return 0
    for dim in (1, 2):
        if shape[dim] % ranks == 0:
            return dim
    raise ValueError(
        f"{ranks} ranks cannot share the experts: they are more than "
        f"model.num_experts={shape[0]} and divide neither model.expert_hidden_size "
        "nor model.hidden_size; change the number of processes, or set "
        "parallel.expert_zero_stage=0"
    )


def _sums_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """One of each tensor, none of which is empty, fp64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu":
        # Row by row: over a million numbers at once torch's fp32 norm is off by 1e-5 on CPUs, and
        # so differs from one mesh to another.
        rows = (torch.linalg.vector_norm(x, dim=-1).double() for x in tensors)
        return torch.stack([norms.square().sum() for norms in rows])
    return torch.stack(torch._foreach_norm(tensors)).double().square()


def local_part(parameter: DTensor) -> Tensor:
    """This rank's part of a parameter, sharing its memory and outside of autograd."""
    with torch.no_grad():
        return parameter.to_local()


def local_rows(parameter: DTensor) -> Iterator[tuple[Tensor, int, int]]:
    """This rank's part of a parameter as (rows, index of the first row, of the first column).

    A row is a slice along the last dim, counted over all leading dims; a parameter of one dim
    has rows of one element. A part that is not contiguous in the whole comes in several pieces.
    """
    local = local_part(parameter)
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if local.dim() < 3:
        yield local, offset[0], 0
        return
    assert local.dim() == 3
    for index in range(local.shape[0]):
        yield local[index], (offset[0] + index) * parameter.shape[1] + offset[1], offset[2]


def _allocate(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    return DTensor.from_local(
        torch.empty_like(tensor.to_local(), device=device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
