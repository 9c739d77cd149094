"""Write long documents full of retrieval and questions, for those who have none: see docs/data.md.

python launch/make_retrieval.py output=FOLDER haystack=words tokens=100000000
"""

from fulmen.data.config import RetrievalConfig
from fulmen.launch.hydra_main import run_hydra
from fulmen.launch.stdlib_sources import sources


def run(config: RetrievalConfig) -> None:
    """Write the folder; mistakes of the user leave as `ValueError`."""
    # Here, because the worker processes import this file too and need neither.
    from rich.console import Console

    from fulmen.data.generate import generate

    config.input = config.input or sources()
    generate(config, console=Console(highlight=False, soft_wrap=True))


def main() -> None:
    """Entry point of `fulmen-make-retrieval`."""
    run_hydra(run, "make_retrieval", RetrievalConfig)


if __name__ == "__main__":
    main()
