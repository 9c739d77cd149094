"""Tokenise text into a folder which a training run can read: see docs/data.md.

python launch/prepare_data.py input=GLOB_OR_FOLDER output=DIR tokenizer=train vocab_size=8192
"""

import dataclasses
import difflib
import os
import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from fulmen.data.config import PrepareConfig

ConfigStore.instance().store(name="prepare_data_schema", node=PrepareConfig)


def check_keys(overrides: list[str]) -> None:
    """ValueError with the nearest known key for a key that PrepareConfig does not have."""
    known = [field.name for field in dataclasses.fields(PrepareConfig)]
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        if not equals or key.startswith(("-", "hydra")) or key in known:
            continue
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown key {key}: did you mean {nearest}? Keys: {', '.join(known)}")


@hydra.main(version_base="1.3", config_path="../recipes", config_name="prepare_data")
def run(config: DictConfig) -> None:
    # `datasets` would import torch: a second of start for nothing.
    os.environ.setdefault("USE_TORCH", "0")
    # Imported here, because the tokenising processes import this file too and need neither.
    from rich.console import Console

    from fulmen.data.prepare import prepare

    try:
        settings = OmegaConf.to_object(config)
        assert isinstance(settings, PrepareConfig)
        prepare(settings, console=Console(highlight=False, soft_wrap=True))
    except MissingMandatoryValue as error:
        sys.exit(f"prepare_data: {error.full_key or error}= must be given")
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: interrupted; the same command goes on from the finished shards")


def main() -> None:
    """Entry point of `fulmen-prepare-data`."""
    try:
        check_keys(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
    run()


if __name__ == "__main__":
    main()
