"""Sample from a trained model: `python launch/generate.py run=runs/text01_tiny/ID [key=value ...]`.

Keys and their defaults: recipes/generate.yaml.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fulmen.data.shards import MANIFEST, read_manifest
from fulmen.launch.checkpoints import find_checkpoint, find_tokenizer
from fulmen.launch.hydra_main import run_hydra


@dataclass
class GenerateConfig:
    """What to sample from and how."""

    run: str | None = None
    """Run folder: its newest checkpoint is used, and the samples go into its report."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    tokenizer: str | None = None
    """tokenizer.json; null = the one of the run's first source."""
    prompts: list[str] = field(default_factory=list)
    """Texts to continue."""
    max_new_tokens: int = 100
    """Tokens to add to each prompt."""
    temperature: float = 0.8
    """0 = always the most likely token."""
    top_k: int | None = 50
    """Only the k most likely tokens; null = all."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    chunk_tokens: int = 32_768
    """Tokens of a prompt that are read at a time."""


def sample(config: GenerateConfig) -> None:
    """Load, continue each prompt, print; with `run`, also add the samples to the report."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)

    import torch

    from fulmen.data.tokenise import load_tokenizer
    from fulmen.trainer.generate import generate
    from fulmen.trainer.load import load_model
    from fulmen.trainer.manifest import verify
    from fulmen.trainer.report import write_report
    from fulmen.trainer.run_folder import update_summary

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if config.dtype not in dtypes:
        raise ValueError(f"dtype={config.dtype}: must be one of {', '.join(dtypes)}")
    verify(checkpoint)
    tokenizer_file = find_tokenizer(config.tokenizer, checkpoint)
    tokenizer = load_tokenizer(str(tokenizer_file))
    stop_id = end_of_document_id(tokenizer_file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, dtype=dtypes[config.dtype], device=device)
    generator = torch.Generator().manual_seed(config.seed)
    samples = []
    print(f"samples of {checkpoint}:")
    for prompt in config.prompts:
        new_ids = generate(
            model,
            tokenizer.encode(prompt, add_special_tokens=False).ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            generator=generator,
            stop_id=stop_id,
            chunk_tokens=config.chunk_tokens,
        )
        samples.append(prompt + tokenizer.decode(new_ids))
        print(f"--------\n{samples[-1]}")
    if config.run is not None:
        update_summary(Path(config.run), {"samples": samples})
        print(f"--------\nreport: {write_report(Path(config.run))}")


def end_of_document_id(tokenizer_file: Path) -> int | None:
    """The token that ends a document in the prepared folder that the tokenizer lies in, if any."""
    if not (tokenizer_file.parent / MANIFEST).exists():
        return None
    end_id: int = read_manifest(tokenizer_file.parent)["end_of_document"]["id"]
    return end_id


def main() -> None:
    """Entry point."""
    run_hydra(sample, "generate", GenerateConfig)


if __name__ == "__main__":
    main()
