"""Tokenise text into a folder which a training run can read: see docs/data.md.

python launch/prepare_data.py input=GLOB_OR_FOLDER output=DIR tokenizer=train vocab_size=8192
"""

from fulmen.data.config import PrepareConfig
from fulmen.launch.hydra_main import run_hydra


def run(config: PrepareConfig) -> None:
    """Prepare the folder; mistakes of the user leave as `ValueError`."""
    # Here, because the tokenising processes import this file too and need neither.
    from rich.console import Console

    from fulmen.data.prepare import prepare

    prepare(config, console=Console(highlight=False, soft_wrap=True))


def main() -> None:
    """Entry point of `fulmen-prepare-data`."""
    run_hydra(run, "prepare_data", PrepareConfig)


if __name__ == "__main__":
    main()
