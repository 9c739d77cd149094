"""The sources of a run as a stage uses them: what it trains on, and what is held out."""

from typing import Any

from fulmen.data.loader import PackedLoader
from fulmen.data.shards import PreparedSplit
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.inputs import check_images
from fulmen.trainer.stages import drawn_sources, list_shares, list_stages, shares_at
from fulmen.trainer.start import Start


def open_loader(
    run_config: RunConfig, start: Start, mesh: Mesh, state: dict[str, Any] | None
) -> PackedLoader:
    """The loader of a stage; `state` is that of the checkpoint that it starts from.

    ValueError, naming the key, for sources that some stage cannot draw what it is to draw from.
    """
    stage, config = start.stage, start.stage.config
    if state is not None and not start.origin.objective == config.objective == "language_modelling":
        # What still waits for a row may be of a stage whose documents are none for this objective.
        drawn = drawn_sources(run_config, stage.index)
        state = state | {"pending": [rest for rest in state["pending"] if rest[0] in drawn]}
    loader = PackedLoader(
        config.data.sources,
        seq_len=config.data.seq_len,
        micro_batch_tokens=config.trainer.micro_batch_tokens,
        batch_tokens=stage.batch_tokens,
        shares=lambda tokens: shares_at(run_config, stage.inside(tokens)),
        length_bounds=config.data.length_bounds,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        prefetch_steps=config.data.prefetch_steps,
        image_workers=config.data.image_workers,
        tile_part=(mesh.cp_rank, mesh.cp),
        state=state,
    )
    check_images(loader.splits, config.model.vision)
    for name, shares in list_shares(run_config):
        try:
            loader.check_shares(shares)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
    return loader


def open_held_out(run_config: RunConfig, mesh: Mesh) -> dict[str, PreparedSplit]:
    """The held-out splits of all sources by name; none where no stage evaluates."""
    if all(one.config.evaluation.every_steps is None for one in list_stages(run_config)):
        return {}
    return {
        name: PreparedSplit(
            source.path,
            "valid",
            name=name,
            vocab_size=run_config.model.vocab_size,
            part=mesh.dp_rank,
            num_parts=mesh.dp,
        )
        for name, source in run_config.data.sources.items()
    }
