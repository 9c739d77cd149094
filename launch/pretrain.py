"""Train: `torchrun --nproc-per-node 8 launch/pretrain.py recipe=text01_tiny [key=value ...]`."""

import faulthandler
import os
import sys
from dataclasses import asdict

from hydra.core.hydra_config import HydraConfig

from fulmen.launch.hydra_main import run_hydra
from fulmen.trainer.config import RunConfig
from fulmen.trainer.stages import check_run


def pretrain(config: RunConfig) -> None:
    """Check the configuration, join the other ranks, train."""
    check_run(config, int(os.environ.get("WORLD_SIZE", 1)))
    train(config, HydraConfig.get().runtime.choices["recipe"])


def train(config: RunConfig, recipe: str) -> None:
    """Run a checked configuration on this rank."""
    # torch takes seconds to import; a mistake in the configuration is told before that.
    import torch.distributed as dist

    from fulmen.parallel.progress import CLOSING_S, PATIENCE, ExchangeError, ends_within
    from fulmen.parallel.rendezvous import join_world
    from fulmen.trainer.health import HealthError
    from fulmen.trainer.run import run

    # Until the run is watched: a file system may not answer.
    start_s = config.parallel.rendezvous_timeout_s + PATIENCE * config.parallel.timeout_s
    faulthandler.dump_traceback_later(start_s, exit=True)
    device = join_world(
        asdict(config),
        timeout_s=config.parallel.timeout_s,
        meeting_s=config.parallel.rendezvous_timeout_s,
    )
    try:
        run(config, device, recipe)
    except (ExchangeError, HealthError) as error:
        sys.exit(f"error: {error}")  # the traceback is in the log
    finally:
        with ends_within(CLOSING_S, "to leave the other ranks"):
            dist.destroy_process_group()


def main() -> None:
    """Entry point."""
    run_hydra(pretrain, "config", RunConfig, trace_files=True)


if __name__ == "__main__":
    main()
