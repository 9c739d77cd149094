"""The sources of a run as a stage uses them: what it trains on, and what is held out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fulmen.data.loader import PackedLoader
from fulmen.data.micro_batches import check_fits
from fulmen.data.shards import PreparedSplit
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.caption_inputs import check_captions
from fulmen.trainer.config import RunConfig
from fulmen.trainer.inputs import check_images
from fulmen.trainer.long_context.in_loop import open_texts
from fulmen.trainer.reading.in_loop import open_questions
from fulmen.trainer.stages import drawn_sources, list_shares, list_stages, shares_at
from fulmen.trainer.start import Start
from fulmen.trainer.zero_shot import ZeroShot


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
    with _errors_name(stage.name):
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
        with _errors_name(name):
            loader.check_shares(shares)
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


def check_stages(
    run_config: RunConfig, first: int, splits: Sequence[PreparedSplit], mesh: Mesh
) -> None:
    """`ValueError`, naming key and stage, for what `first` or a later one cannot do with its data.

    `splits` are those that train and those that are held out, of all sources. Evaluations and
    captions of the stage `first` are left to those who open them now.
    """
    for stage in list_stages(run_config)[first:]:
        config = stage.config
        with _errors_name(stage.name):
            for split in splits:
                check_fits(split, config.data.seq_len)
            if stage.index == first:
                continue
            if config.evaluation.long_context.every_steps is not None:
                open_texts(config)
            if config.evaluation.reading.every_steps is not None:
                open_questions(config)
            if config.objective == "coca":
                drawn = drawn_sources(run_config, stage.index)
                _check_captions(config, drawn, splits, mesh)


@contextmanager
def _errors_name(stage: str) -> Iterator[None]:
    """A ValueError begins with the stage, if that has a name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stages.{stage}: {error}" if stage else str(error)) from None


def _check_captions(
    config: RunConfig, drawn: set[str], splits: Sequence[PreparedSplit], mesh: Mesh
) -> None:
    evaluates = config.evaluation.every_steps is not None
    for split in splits:
        if split.name in drawn if split.split == "train" else evaluates:
            check_captions(split, config.model)
    for name, folder in config.evaluation.zero_shot.items() if evaluates else ():
        ZeroShot(name, folder, config, mesh)
