"""AdamW over each rank's own part of the parameters."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulmen.parallel.zero import ZeroEngine, local_part
from fulmen.trainer.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """An element-wise optimiser on the local shards.

    It sees plain tensors that share memory with the sharded parameters, so that any fused
    implementation can be used, and its state is described to checkpoints as sharded like them.
    """

    def __init__(self, engine: ZeroEngine, config: OptimConfig) -> None:
        self._sharded = engine.parameters
        self._local = {name: nn.Parameter(local_part(p)) for name, p in self._sharded.items()}
        decayed = [p for name, p in self._local.items() if self._sharded[name].dim() > 1]
        rest = [p for name, p in self._local.items() if self._sharded[name].dim() == 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self._optimizer = build_optimizer(groups, config)
        self._steps = 0
        for parameter in self._local.values():
            self._optimizer.state[parameter] = {m: torch.zeros_like(parameter) for m in MOMENTS}
        self.set_steps(0)

    def step(self, learning_rate: float) -> None:
        """Update the parameters from their gradients, and drop the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self._local.items():
            gradient = self._sharded[name].grad
            assert isinstance(gradient, DTensor)
            parameter.grad = gradient.to_local()
        self._optimizer.step()
        self._steps += 1
        for name, parameter in self._local.items():
            parameter.grad = self._sharded[name].grad = None

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return self._steps

    def set_steps(self, steps: int) -> None:
        """Set the number of updates made, which Adam's bias correction uses."""
        self._steps = steps
        for group in self._optimizer.param_groups:
            if "step" in group or not isinstance(self._optimizer, torch.optim.AdamW):
                group["step"] = steps  # apex counts per group, torch per parameter
        if isinstance(self._optimizer, torch.optim.AdamW):
            for parameter in self._local.values():
                step = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
                self._optimizer.state[parameter]["step"] = step

    def named_moments(self) -> Iterator[tuple[str, Tensor]]:
        """`exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, sharded like the parameter."""
        for name, local in self._local.items():
            like = self._sharded[name]
            for moment in MOMENTS:
                yield (
                    f"{moment}.{name}",
                    DTensor.from_local(
                        self._optimizer.state[local][moment],
                        like.device_mesh,
                        like.placements,
                        run_check=False,
                        shape=like.shape,
                        stride=like.stride(),
                    ),
                )


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """The implementation that `optim.name` asks for; `ValueError` if it is not installed."""
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    try:
        # PyPI's `apex` is another project and has no such module.
        from apex.optimizers import FusedAdam
    except ImportError:
        raise ValueError(
            "optim.name=apex_fused_adam: NVIDIA apex is not installed (the apex on PyPI is another "
            "project); build it from NVIDIA's repository with --cuda_ext, or set optim.name=adamw"
        ) from None
    return FusedAdam(groups, lr=config.lr, betas=betas, eps=config.eps, adam_w_mode=True)
