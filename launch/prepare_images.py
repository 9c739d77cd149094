"""Prepare documents with images for training: see docs/images.md.

python launch/prepare_images.py input=TARS_PARQUET_OR_JSONL output=DIR tokenizer=TOKENIZER
"""

from fulmen.data.config import PrepareImagesConfig
from fulmen.launch.hydra_main import run_hydra


def run(config: PrepareImagesConfig) -> None:
    """Prepare the folder; mistakes of the user leave as `ValueError`."""
    # Here, because the worker processes import this file too and need neither.
    from rich.console import Console

    from fulmen.data.prepare_images import prepare_images

    prepare_images(config, console=Console(highlight=False, soft_wrap=True))


def main() -> None:
    """Entry point of `fulmen-prepare-images`."""
    run_hydra(run, "prepare_images", PrepareImagesConfig)


if __name__ == "__main__":
    main()
