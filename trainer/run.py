"""One run from its folder to its report."""

from pathlib import Path

from omegaconf import OmegaConf

from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig, check_run_folder
from fulmen.trainer.loop import Trainer
from fulmen.trainer.manifest import CONFIG_FILE
from fulmen.trainer.report import write_report
from fulmen.trainer.run_folder import agree_on_folder, update_summary
from fulmen.trainer.run_log import log, start_logging
from fulmen.trainer.unigram import unigram_loss


def run(config: RunConfig, mesh: Mesh, recipe: str) -> Path:
    """Train to the end of the schedule, or go on with a run that stopped; returns its folder."""
    run_dir = agree_on_folder(config, recipe)
    check_run_folder(run_dir)
    start_logging(run_dir, mesh.rank)
    if mesh.rank == 0:
        (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    log.info("run folder %s, %d process(es) on %s", run_dir, mesh.world_size, mesh.device.type)
    trainer = Trainer(config, mesh, run_dir)
    try:
        if mesh.rank == 0:
            loss = unigram_loss(config.data.sources, config.model.vocab_size)
            log.info("a unigram model of this data has a loss of %.3f", loss)
            update_summary(run_dir, {"unigram_loss": loss})
        trainer.fit()
    except Exception:
        log.exception("the run stops")  # into the log file too, which outlives the terminal
        raise
    finally:
        trainer.close()
    if mesh.rank == 0:
        log.info("report: %s", write_report(run_dir))
    return run_dir
