"""One run from its folder to its report, stage after stage."""

import gc
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from fulmen.data.config import SourceConfig
from fulmen.data.shards import read_manifest
from fulmen.kernels import registry
from fulmen.parallel.mesh import Mesh, build_mesh, release_groups
from fulmen.parallel.progress import (
    CLOSING_S,
    ExchangeError,
    ends_within,
    expect_compilation,
    phase,
    watched,
)
from fulmen.parallel.rendezvous import set_timeout
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.config import RunConfig, check_run_folder
from fulmen.trainer.disk import check_disk
from fulmen.trainer.host_memory import check_host, find_host_memory
from fulmen.trainer.loop import Trainer
from fulmen.trainer.manifest import CONFIG_FILE
from fulmen.trainer.memory import GIB, count_model
from fulmen.trainer.planner import Assumptions, find_gpu, predict_memory, predict_step
from fulmen.trainer.profile_memory import watch_memory
from fulmen.trainer.report import write_report
from fulmen.trainer.run_folder import agree_on_folder, alone_in, update_summary
from fulmen.trainer.run_log import log, start_logging
from fulmen.trainer.stages import Stage, fault_of, list_stages
from fulmen.trainer.start import find_start
from fulmen.trainer.unigram import unigram_loss

LOST_S = 10.0
"""For the end of a run whose ranks do not answer each other."""


def run(config: RunConfig, device: torch.device, recipe: str) -> Path:
    """Train to the end of the run, or of the last stage that these processes can run.

    Begins a run or goes on with one that stopped; the processes have joined a world. Returns its
    folder.
    """
    check_tokenizers(config.data.sources)
    registry.configure(asdict(config.kernels))
    run_dir = agree_on_folder(config, recipe)
    check_run_folder(run_dir)
    with alone_in(run_dir, config.parallel.timeout_s):
        return _run_in(run_dir, config, device)


def _run_in(run_dir: Path, config: RunConfig, device: torch.device) -> Path:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    start_logging(run_dir, rank)
    log.info("run folder %s, %d process(es) on %s", run_dir, world_size, device.type)
    trainer, is_first = None, True
    closing_s, closing = config.checkpoint.timeout_s + CLOSING_S, "to close the run"
    try:
        with watched(
            rank,
            world_size,
            config.parallel.timeout_s,
            run_dir=run_dir,
            patience_s=2 * config.checkpoint.timeout_s,
        ):
            while (trainer := open_stage(config, device, run_dir, is_first=is_first)) is not None:
                if rank == 0 and is_first:
                    describe_run(config, trainer, run_dir)
                trainer.fit()
                # While the end of the stage was saved it may have been asked to stop.
                if trainer.finished or trainer.stop.asked or trainer.stop.asked_since():
                    break
                trainer.close()
                trainer, is_first = None, False
                give_back(device)
    except Exception as error:
        if isinstance(error, ExchangeError):  # for a save under way ranks are missing, too
            closing_s, closing = LOST_S, f"to close the run, which stops for {error},"
        if trainer is not None or isinstance(error, ExchangeError):
            log.exception("the run stops")  # into the log file too, which outlives the terminal
        raise
    finally:
        if trainer is not None:
            with ends_within(closing_s, closing):
                trainer.close()
    if rank == 0:
        try:
            log.info("report: %s", write_report(run_dir))
        except OSError as error:  # such as a full disk: launch/report.py writes it later
            log.warning("the report could not be written: %s", error)
    return run_dir


def open_stage(
    config: RunConfig, device: torch.device, run_dir: Path, *, is_first: bool
) -> Trainer | None:
    """A trainer for the stage that the run is in, from its newest checkpoint.

    Where these processes cannot run the stage, it is an error if it `is_first` in this job; else
    the job has done what it could, and there is no trainer.
    """
    phase("choice of a checkpoint")
    expect_compilation()
    finder = Checkpointer.of_run(run_dir, config.checkpoint)
    start = find_start(config, finder, is_first=is_first)
    finder.close()
    stage = start.stage
    fault = fault_of(stage, dist.get_world_size())
    if fault is None:
        mesh = build_mesh(stage.config.parallel, device)
        fault = announce(stage, mesh, run_dir)
    if fault is None and is_first:
        fault = find_room(config, run_dir)
    if fault is None:
        later = (fault_of(one, dist.get_world_size()) for one in list_stages(config)[stage.index :])
        ends = next((fault for fault in later if fault), None)
        if ends and is_first and mesh.rank == 0:
            log.warning("the job will end before a stage that needs other processes: %s", ends)
        set_timeout(config.parallel.timeout_s)
        return Trainer(config, mesh, run_dir, start=start)
    if is_first:
        raise ValueError(fault)
    log.info(
        "the job ends before stage %s, which needs other processes: %s. The same command with the "
        "same run_id goes on, on any number of processes that fits",
        stage.name,
        fault,
    )
    return None


def give_back(device: torch.device) -> None:
    """Free what a stage that is over held: the next one has a mesh of its own."""
    # What was compiled holds weights, and counts towards torch's limit of compilations.
    torch.compiler.reset()
    gc.collect()  # modules and hooks refer to each other
    release_groups()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def announce(stage: Stage, mesh: Mesh, run_dir: Path) -> str | None:
    """Log what the stage is and what it will need; why it does not fit into a GPU, or None."""
    config = stage.config
    if mesh.rank == 0:
        if stage.name:
            log.info(
                "stage %s, %d of %d: to %d tokens, rows of %d, RoPE base %g, cp %d",
                stage.name,
                stage.index + 1,
                len(config.stages),
                stage.end,
                config.data.seq_len,
                config.model.rope_theta,
                mesh.cp,
            )
        for line in mesh.table().splitlines():
            log.info("%s", line)
    try:
        announce_plan(config, mesh)
    except ValueError as error:
        return str(error)
    if mesh.device.type == "cuda":
        watch_memory(
            run_dir,
            mesh.device,
            predict_memory(config, mesh.world_size),
            rank=mesh.rank,
            history=config.trainer.profile.memory_history,
        )
    return None


def announce_plan(config: RunConfig, mesh: Mesh) -> None:
    """Log what the run will need; `ValueError` where a GPU's memory is not enough for it."""
    count = count_model(config.model)
    first = mesh.rank == 0
    if first:
        log.info("%s parameters, %s active", f"{count.total:,}", f"{count.active:,}")
    if mesh.device.type != "cuda":
        return
    device = torch.cuda.get_device_properties(mesh.device)
    memory = predict_memory(config, mesh.world_size)
    gpu = find_gpu(device.name)
    if first:
        gib = sum(memory.values()) / GIB
        line = f"predicted: {gib:.1f} of {device.total_memory / GIB:.1f} GiB of a GPU"
        if gpu is not None:
            batch = config.data.global_batch_tokens
            step = predict_step(config, mesh.world_size, gpu, Assumptions(), batch)
            line += f", {step.seconds:.3f} s a step of {batch} tokens"
        log.info("%s", line)
    check_fits(memory, device.total_memory, allowed=config.trainer.allow_misfit)
    check_host(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), find_host_memory())


def find_room(config: RunConfig, run_dir: Path) -> str | None:
    """Why the disk is too small for the run's checkpoints, or None; all ranks hear rank 0."""
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            check_disk(config, run_dir / "checkpoints")
        except ValueError as error:
            box = [f"{error}"]
            if config.trainer.allow_misfit:
                log.warning("%s; it begins because trainer.allow_misfit=true", error)
                box = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_fits(memory: dict[str, int], total: int, *, allowed: bool) -> None:
    """`ValueError` with the numbers if the predicted bytes are more than a GPU's `total`."""
    needed = sum(memory.values())
    if needed <= total:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items() if size)
    message = f"a rank needs {needed / GIB:.1f} GiB ({parts}), its GPU has {total / GIB:.1f}"
    if not allowed:
        raise ValueError(
            f"{message}: launch/plan.py with the same keys and gpus=PROCESSES says what to "
            "change, or set trainer.allow_misfit=true to begin all the same"
        )
    log.warning("%s; it begins because trainer.allow_misfit=true", message)


def describe_run(config: RunConfig, trainer: Trainer, run_dir: Path) -> None:
    """Write what holds for all of a run; once the trainer has agreed to go on with its folder."""
    (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    if trainer.held_out and trainer.config.objective == "language_modelling":
        phase("unigram model")
        weights = {name: source.weight for name, source in config.data.sources.items()}
        loss = unigram_loss(trainer.loader.splits, trainer.held_out, weights)
        log.info("a unigram model of this data has a loss of %.3f", loss)
        update_summary(run_dir, {"unigram_loss": loss})


def check_tokenizers(sources: Mapping[str, SourceConfig]) -> None:
    """`ValueError` if a source has lost the tokenizer that it was prepared with.

    Training would not notice, but what it makes could neither read nor write text.
    """
    for name, source in sources.items():
        try:
            file = Path(source.path) / read_manifest(source.path)["tokenizer"]["file"]
        except ValueError as error:
            raise ValueError(f"data.sources.{name}.path: {error}") from None
        if not file.is_file():
            raise ValueError(
                f"data.sources.{name}: {file} is missing: copy it back, or remove "
                f"{source.path} and run launch/prepare_data.py anew"
            )
