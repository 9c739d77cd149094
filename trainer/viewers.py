"""wandb and TensorBoard: sinks of a run's metrics that may fail without harm to the run."""

import hashlib
import json
import logging
import queue
import re
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulmen.trainer.alerts import Alert
from fulmen.trainer.charts import (
    ALL_GROUPS,
    chart_evaluation,
    chart_name,
    chart_values,
    draw_load,
)
from fulmen.trainer.console import Row, Value

if TYPE_CHECKING:
    from fulmen.trainer.metrics import LogConfig

WANDB_RUN = "wandb_run.json"
"""In a run's folder: the id under which wandb has the run."""

LOAD_CELL = 8
"""Pixels of a side of the field for one expert in one layer."""

logger = logging.getLogger(__name__)


def warn_lost(name: str, error: BaseException) -> None:
    """Say that a sink is lost."""
    logger.warning(
        "%s failed (%s: %s) and gets no more rows; metrics.jsonl has them all.",
        name,
        type(error).__name__,
        error,
    )


def keep_wandb_id(
    run_dir: Path, run_name: str, run_config: Mapping[str, Any], *, resume_step: int
) -> str:
    """The id under which wandb has the run of this folder; made at its start, kept in the folder.

    The same over requeues, those before the first checkpoint included. A run that begins anew in
    the folder with another configuration is another one to wandb, which takes no step twice.
    """
    path = run_dir / WANDB_RUN
    shown = json.dumps(run_config, sort_keys=True, default=str)
    config = hashlib.sha256(shown.encode()).hexdigest()
    try:
        kept = json.loads(path.read_text())
        if resume_step or kept["config"] == config:
            return str(kept["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or torn
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name)
    # Random: wandb would merge runs of one name, of two folders or of two people.
    kept = {"id": f"{name[:55]}-{secrets.token_hex(4)}", "config": config}
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(kept) + "\n")
    draft.replace(path)
    return str(kept["id"])


class WandbSink:
    """Feeds wandb from a thread of its own, so that nothing in wandb can hold up or end a run.

    Rows wait in a bounded queue; when wandb is too slow for it they are left out and counted.
    """

    # wandb-core retries for as long as this when the server cannot be reached, even while the
    # process wants to exit.
    INIT_TIMEOUT_S = 60.0

    def __init__(
        self,
        run_dir: Path,
        config: "LogConfig",
        *,
        run_name: str,
        run_config: dict[str, Any],
        resume_step: int = 0,
        queue_rows: int = 10_000,
        close_timeout_s: float = 30.0,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._run_name = run_name
        self._run_config = run_config
        # Here and not in the thread, so that a run killed at once has it too.
        self._id = keep_wandb_id(run_dir, run_name, run_config, resume_step=resume_step)
        self._close_timeout_s = close_timeout_s
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | Alert] = queue.Queue(queue_rows)
        self._left_out = 0
        self._failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        self._thread.start()

    def log_step(self, row: Row) -> None:
        tokens = row["tokens"]
        assert isinstance(row["step"], int)
        assert isinstance(tokens, int)
        values: dict[str, Any] = {"tokens": tokens, **chart_values(row)}
        if isinstance(load := row.get("expert_load"), list):
            values[chart_name("expert_load")] = draw_load(load, cell=LOAD_CELL)
        self._put((row["step"], values))

    def send_alert(self, alert: Alert) -> None:
        """Send it, after the rows that are waiting."""
        self._put(alert)

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._put((step, {"tokens": tokens, **chart_evaluation(values)}))

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        self._put((step, {"tokens": tokens, **chart_evaluation(scores)}))

    def close(self, *, failed: bool) -> None:
        self._failed = failed
        was_alive = self._thread.is_alive()
        self._closing.set()
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "wandb did not finish within %.0f s: left behind; metrics.jsonl has every row.",
                self._close_timeout_s,
            )
        elif was_alive and self._left_out:
            logger.warning(
                "wandb was too slow for %d rows; metrics.jsonl has them.", self._left_out
            )

    def _put(self, item: tuple[int, dict[str, Any]] | Alert) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._left_out += 1

    def _work(self) -> None:
        try:
            run = self._start()
            # Online, a requeued run finds its earlier rows on the server, and wandb refuses to
            # go back: what is done again, from an older checkpoint, keeps its first rows there.
            newest = run.step
            while True:
                try:
                    item = self._queue.get(timeout=0.2)
                except queue.Empty:
                    if self._closing.is_set():
                        break
                    continue
                if isinstance(item, Alert):
                    run.alert(title=item.title, text=item.text, level="WARN")
                elif item[0] >= newest:
                    newest, values = item
                    run.log({name: _media(value) for name, value in values.items()}, step=newest)
            run.finish(exit_code=int(self._failed))
        except ImportError as error:
            logger.warning(
                "log.wandb=%s, but wandb cannot be imported (%s): pip install wandb, or set "
                "log.wandb=off. The run goes on without it.",
                self._config.wandb,
                error,
            )
        except BaseException as error:
            warn_lost(f"log.wandb={self._config.wandb}", error)

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(
            # wandb's capture of stdout and stderr would fight with the live progress line.
            console="off",
            silent=True,
            init_timeout=self.INIT_TIMEOUT_S,
            finish_timeout=max(1.0, 0.75 * self._close_timeout_s),
        )
        wandb.setup(settings)
        online = self._config.wandb == "online"
        # On a terminal, wandb.init would ask for the key in the midst of the run.
        if online and not wandb.login(prompt=False):
            raise RuntimeError(
                "no login: run `wandb login`, set WANDB_API_KEY or log.wandb=offline"
            )
        run = wandb.init(
            project=self._config.wandb_project,
            id=self._id,
            name=self._run_name,
            config=self._run_config,
            dir=str(self._run_dir),
            mode="online" if online else "offline",
            resume="allow",
            settings=settings,
        )
        run.define_metric("tokens")
        for group in ALL_GROUPS:
            run.define_metric(f"{group}/*", step_metric="tokens")
        if online:
            logger.info("wandb: %s", run.url)
        return run


def _media(value: Any) -> Any:
    """What wandb takes for a value: pixels as an image."""
    if not isinstance(value, np.ndarray):
        return value
    import wandb

    return wandb.Image(value)


class TensorboardSink:
    """Event files in the run's folder `tensorboard/`; what a resumed run does again is purged."""

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0
        )

    def log_step(self, row: Row) -> None:
        self._put(row["step"], {"train/tokens": row["tokens"], **chart_values(row)})
        if isinstance(load := row.get("expert_load"), list):
            pixels = draw_load(load, cell=LOAD_CELL)
            self._writer.add_image(
                chart_name("expert_load"), pixels, row["step"], dataformats="HWC"
            )

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._put(step, chart_evaluation(values))

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        self._put(step, chart_evaluation(scores))

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _put(self, step: Value, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
