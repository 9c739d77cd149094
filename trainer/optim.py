"""AdamW over each rank's own part of the parameters."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fulmen.parallel.zero import ZeroEngine, local_part
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.groups import Settings

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """An element-wise optimiser on the local shards of what trains.

    It sees plain tensors that share memory with the sharded parameters, so that any fused
    implementation can be used, and its state is described to checkpoints as sharded like them.

    Each parameter counts its own updates, because one that was frozen begins later: Adam's bias
    correction makes up for the moments' start at zero, whenever that was.
    """

    def __init__(
        self,
        engine: ZeroEngine,
        config: OptimConfig,
        settings: Mapping[str, Settings] | None = None,
    ) -> None:
        """`settings` say how each parameter trains; None = all by the values of `config`."""
        self._sharded = engine.trainable
        self._local = {name: nn.Parameter(local_part(p)) for name, p in self._sharded.items()}
        self._config = config
        self._settings = settings or {}
        self._optimizer: torch.optim.Optimizer
        self._steps: dict[str, int]
        self._moments = {
            name: {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            for name, parameter in self._local.items()
        }
        self.set_steps({})

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """Update the parameters from their gradients, and drop the gradients.

        Where `skip`, a scalar on the device, is true, nothing is updated, which the host need not
        know before: call `uncount` once it does. NVIDIA apex waits for the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        for name, parameter in self._local.items():
            gradient = self._sharded[name].grad
            assert isinstance(gradient, DTensor)
            parameter.grad = gradient.to_local()
        if self._config.name == "adamw":
            # As torch skips what overflowed in fp16: the kernels look at the flag.
            self._optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif skip is None or not bool(skip):
            self._optimizer.step()
        self._steps = {name: steps + 1 for name, steps in self._steps.items()}
        for name, parameter in self._local.items():
            parameter.grad = self._sharded[name].grad = None

    def uncount(self) -> None:
        """The last step was skipped."""
        self._steps = {name: steps - 1 for name, steps in self._steps.items()}

    @property
    def steps(self) -> dict[str, int]:
        """Updates made so far of each parameter that trains."""
        return self._steps

    def set_steps(self, steps: Mapping[str, int]) -> None:
        """Set the updates made of each parameter, 0 of those that are not named."""
        self._steps = {name: steps.get(name, 0) for name in self._local}
        groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
        for name, parameter in self._local.items():
            own = self._settings.get(name, Settings())
            decay = self._config.weight_decay if own.weight_decay is None else own.weight_decay
            if self._sharded[name].dim() == 1:
                decay = 0.0
            groups.setdefault((own.lr_factor, decay, self._steps[name]), []).append(parameter)
        self._optimizer = build_optimizer(
            # apex counts updates by group, torch by parameter.
            [
                {"params": params, "lr_factor": factor, "weight_decay": decay, "step": done}
                for (factor, decay, done), params in groups.items()
            ],
            self._config,
        )
        for name, parameter in self._local.items():
            done = torch.tensor(float(self._steps[name]), device=parameter.device)
            self._optimizer.state[parameter] = self._moments[name] | {"step": done}

    def named_moments(self) -> Iterator[tuple[str, DTensor]]:
        """`exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, sharded like the parameter."""
        for name in self._local:
            like = self._sharded[name]
            for moment in MOMENTS:
                yield (
                    f"{moment}.{name}",
                    DTensor.from_local(
                        self._moments[name][moment],
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
