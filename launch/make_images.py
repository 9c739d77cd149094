"""Make pictures of digits and words with captions, questions and pairs: see docs/images.md.

python launch/make_images.py output=FOLDER captions=2000 conversations=2000 pairs=500
"""

from fulmen.data.config import MakeImagesConfig
from fulmen.launch.hydra_main import run_hydra


def run(config: MakeImagesConfig) -> None:
    """Write the folder; mistakes of the user leave as `ValueError`."""
    from fulmen.data.make_images import make_images

    for path, records in make_images(config).items():
        print(f"{path}: {records:,} records")


def main() -> None:
    """Entry point of `fulmen-make-images`."""
    run_hydra(run, "make_images", MakeImagesConfig)


if __name__ == "__main__":
    main()
