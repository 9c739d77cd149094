"""Train: `torchrun --nproc-per-node 8 launch/pretrain.py recipe=text01_tiny [key=value ...]`."""

import os
from typing import Any

from hydra.core.hydra_config import HydraConfig

from fulmen.launch.hydra_main import run_hydra
from fulmen.trainer.config import RunConfig, check_config, nearest_keys, register, to_run_config


def pretrain(composed: Any) -> None:
    """Check the configuration, join the other ranks, train."""
    config = to_run_config(composed)
    check_config(config, int(os.environ.get("WORLD_SIZE", 1)))
    train(config, HydraConfig.get().runtime.choices["recipe"])


def train(config: RunConfig, recipe: str) -> None:
    """Run a checked configuration on this rank."""
    # torch takes seconds to import; a mistake in the configuration is told before that.
    import torch.distributed as dist

    from fulmen.parallel.mesh import build_mesh, join_world
    from fulmen.trainer.run import run

    device = join_world()
    try:
        run(config, build_mesh(config.parallel, device), recipe)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Entry point."""
    register()
    run_hydra(pretrain, "config", suggest=nearest_keys)


if __name__ == "__main__":
    main()
