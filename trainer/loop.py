"""The training loop. Read `Trainer.fit`, then `train_step`, `objective.py` and `models/text.py`."""

import resource
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from fulmen.data.loader import StepBatch
from fulmen.models.text import count_active_parameters, count_parameters
from fulmen.models.vl import build_model
from fulmen.parallel.audit import audit
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.progress import phase
from fulmen.trainer.captions import Captioning
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.config import RunConfig
from fulmen.trainer.flops import Throughput, count_passes_by_part, device_peak
from fulmen.trainer.groups import resolve_groups
from fulmen.trainer.health import Health
from fulmen.trainer.long_context.in_loop import LongContext
from fulmen.trainer.manifest import MANIFEST, CheckpointError, checksum
from fulmen.trainer.metrics import ACCOUNT_PREFIX, MetricsLogger, NullMetrics
from fulmen.trainer.objective import LanguageModelling, Objective
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.preference import Preference
from fulmen.trainer.profile import Profiler
from fulmen.trainer.reading.in_loop import Reading
from fulmen.trainer.restore import restore, trained_tensors
from fulmen.trainer.run_folder import DONE, update_summary
from fulmen.trainer.run_log import log
from fulmen.trainer.sources import check_stages, open_held_out, open_loader
from fulmen.trainer.stages import drawn_sources, list_stages, run_tokens
from fulmen.trainer.start import Start, find_start, load_first_weights
from fulmen.trainer.stop import Stop
from fulmen.trainer.weights import PREFIX, changed_keys, check_same_model

OBJECTIVES: dict[str, type[Objective]] = {
    "language_modelling": LanguageModelling,
    "preference": Preference,
    "coca": Captioning,
}


class Trainer:
    """One stage of a run on one rank: model, data, optimiser and bookkeeping.

    `config` is the run's; `start`, where it goes on, is looked for if it is not given, and `mesh`
    has to be that of its stage.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, run_dir: Path, *, start: Start | None = None
    ) -> None:
        self.run_config = config
        self.checkpointer = Checkpointer.of_run(run_dir, config.checkpoint)
        self.start = start or find_start(config, self.checkpointer)
        self.stage = self.start.stage
        self.config = config = self.stage.config
        self.mesh = mesh
        self.run_dir = run_dir
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.trainer.dtype]
        self.step = 0
        self.tokens = 0
        self._stall_s = 0.0  # of saving, since the row before
        torch.manual_seed(config.seed)  # torch itself begins with another seed in every process
        with torch.device("meta"):
            self.model = cast(Any, build_model(config.model, config.moe))
        names = [name for name, _ in self.model.named_parameters()]
        settings = resolve_groups(config.optim, names)
        self.engine = parallelize(
            self.model,
            mesh,
            config.parallel,
            dtype=dtype,
            activation_checkpointing=config.trainer.activation_checkpointing,
            compile_blocks=config.trainer.compile,
            seed=config.seed,
            chunk_tokens=config.trainer.chunk_tokens,
            offload_checkpoints=config.trainer.offload_checkpoints,
            frozen=[name for name, one in settings.items() if one.frozen],
        )
        for line in audit(self.model, self.engine, config.parallel).splitlines():
            if mesh.rank == 0:
                log.info(line)
        self.optimizer = Optimizer(self.engine, config.optim, settings)
        state = self._resume()
        self.health = Health(
            config.health,
            self.engine,
            self.optimizer,
            self.checkpointer,
            step=self.step,
            first_step=self.start.first_step,
            state=state.get("health", {}),
        )
        self.loader = open_loader(self.run_config, self.start, mesh, state.get("loader"))
        self.held_out = open_held_out(self.run_config, mesh)
        splits = [*self.loader.splits, *self.held_out.values()]
        check_stages(self.run_config, self.stage.index, splits, mesh)
        self.objective = self._open_objective(state.get("objective", {}))
        self.long_context = LongContext.open(config, self.model, mesh)
        self.reading = Reading.open(config, self.model, mesh, run_dir)
        self.profiler = Profiler(config.trainer.profile, mesh, run_dir)
        self._throughput = Throughput(
            config.model,
            seq_len=config.data.seq_len,
            world_size=mesh.world_size,
            peak=device_peak(mesh.device, dtype),
            passes=count_passes_by_part(
                [(name, p.shape) for name, p in self.engine.parameters.items()],
                self.engine.parameters.keys() - self.engine.trainable.keys(),
            ),
        )
        self.stop = Stop(run_dir, config.parallel.timeout_s)

    def fit(self) -> None:
        """Train to the end of the stage, evaluating, logging and saving on the way."""
        config = self.config
        if self.finished:
            log.info("nothing to do: %d steps, %d tokens are trained", self.step, self.tokens)
            self._mark_done()  # it may have been killed just before
            return
        with self._open_metrics() as metrics:
            self.checkpointer.on_failure = partial(metrics.alert, "a checkpoint failed")
            (self.run_dir / DONE).unlink(missing_ok=True)  # of a run that now goes on for longer
            self.objective.prepare(
                self.run_dir / self.config.objective / self.stage.name, self._weights
            )
            self._throughput.restart()
            while not self.stage_finished and not self.stop.asked:
                may_ask = self._is_due(config.log.every_steps)
                if self.profiler.begin_step(self.step + 1, may_ask=may_ask):
                    self._throughput.restart()
                phase("data", self.step)
                self.stop.poll(failed=self.checkpointer.has_failed())
                started = time.perf_counter()
                batch = next(self.loader)
                data_wait_s = time.perf_counter() - started
                grad_norm, lr = self.train_step(batch)
                self.step += 1
                self.tokens += batch.num_tokens
                self.health.judge(self.step, batch.digest)
                self._throughput.add_step(
                    num_tokens=batch.num_tokens,
                    sum_squared_lengths=batch.sum_squared_lengths,
                    num_tiles=batch.num_tiles,
                    num_image_tokens=batch.num_image_tokens,
                    num_dropped=self.objective.num_dropped,
                )
                saves = self.stop.agreed() or self._is_due(config.checkpoint.every_steps)
                if self.stop.failed:
                    self.checkpointer.wait()  # it raises
                if saves or self.stage_finished or self._is_due(config.health.replicas_every_steps):
                    self.health.compare_replicas(self.step, self._state(batch.state))
                if self.health.goes_back:
                    self._rewind()
                if self._is_due(config.log.every_steps) or self.health.has_news:
                    row = self._row(batch, grad_norm) | {
                        "lr": lr,
                        "data_wait_s": data_wait_s,
                        "checkpoint_stall_s": self._stall_s,
                    }
                    self._stall_s = 0.0
                    metrics.log_step(row)
                is_due = self._is_due(config.evaluation.every_steps)
                if self._evaluates and (is_due or self.stage_finished):
                    phase("evaluation")
                    values = self.objective.evaluate()
                    metrics.log_eval(self.step, self.tokens, values)
                    if is_due:
                        self.objective.watch(self.step, values)
                    self._throughput.restart()
                ends = self.stage_finished
                if self.long_context and (self._is_due(self.long_context.every) or ends):
                    phase("long texts")
                    metrics.log_scores(self.step, self.tokens, self.long_context.scores())
                    self._throughput.restart()
                if self.reading and (self._is_due(self.reading.every) or ends):
                    phase("reading")
                    metrics.log_scores(self.step, self.tokens, self.reading.scores(self.step))
                    self._throughput.restart()
                if saves or ends:
                    phase("checkpoint")
                    self.save(batch.state, grad_norm)
                    self._throughput.restart()
            phase("last checkpoint")
            self.checkpointer.wait()
        if self.finished:
            self._mark_done()

    def train_step(self, batch: StepBatch) -> tuple[torch.Tensor, float]:
        """One optimiser step; returns gradient norm, on the device, and learning rate."""
        self.objective.begin_step(batch)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for index, micro_batch in enumerate(batch.micro_batches):
            self.engine.begin_micro_batch(is_last=index == len(batch.micro_batches) - 1)
            phase("forward")
            loss = self.objective.loss(micro_batch)
            total += loss.detach()
            phase("backward")
            loss.backward()
        phase("gradient norm")
        grad_norm = self.engine.clip_grad_norm(self.config.optim.grad_clip, total)
        phase("optimiser")
        lr = self.stage.learning_rate(
            step=self.step, tokens=self.tokens, first_step=self.start.first_step
        )
        self.optimizer.step(lr, skip=self.health.flag(grad_norm, total))
        return grad_norm, lr

    @property
    def finished(self) -> bool:
        """Whether the run's step or token limit is reached, or its objective sees no gain."""
        max_steps = self.config.trainer.max_steps
        return (
            self.tokens >= run_tokens(self.run_config)
            or (max_steps is not None and self.step >= max_steps)
            or self.objective.finished
        )

    @property
    def _evaluates(self) -> bool:
        return self.config.evaluation.every_steps is not None

    @property
    def stage_finished(self) -> bool:
        """Whether the stage's tokens are trained, or the run is at its end."""
        return self.finished or self.tokens >= self.stage.end

    def save(self, loader_state: dict[str, Any], grad_norm: torch.Tensor) -> None:
        """Start writing a checkpoint of this step; refuses a broken state."""
        # Waits for the device, for which saving is not to blame.
        self.health.check_finite(self.step, grad_norm)
        self.health.compare_replicas(self.step, self._state(loader_state))
        if self.health.goes_back:
            self._rewind()
        started = time.perf_counter()
        config = OmegaConf.to_yaml(OmegaConf.structured(self.config))
        state, kept = self._state(loader_state), self.health.kept
        self.checkpointer.save(self.step, self._tensors(), state, config, kept)
        self._stall_s += time.perf_counter() - started

    def _state(self, loader_state: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "optimizer_steps": self.optimizer.steps,
            "loader": loader_state,
            "objective": {"name": self.config.objective, **self.objective.state()},
            "health": self.health.state(),
            "stage": {
                "name": self.stage.name,
                "first_step": self.start.first_step,
                "ended": bool(self.stage.name)
                and (self.tokens >= self.stage.end or self.objective.finished),
            },
        }

    def _rewind(self) -> None:
        started = time.perf_counter()
        self.health.rewind(self.step)
        self._throughput.leave_out(time.perf_counter() - started)

    def close(self) -> None:
        """Stop the loader's and the checkpointer's threads, a trace, and listening to signals."""
        self.stop.close()
        self.profiler.close()
        self.loader.close()
        self.checkpointer.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        random = {f"rng.{self.mesh.rank}": torch.get_rng_state()}
        return {**trained_tensors(self.engine, self.optimizer), **random}

    def _resume(self) -> dict[str, Any]:
        """Load the checkpoint to start from; returns its trainer's state, if it has one."""
        phase("resume")
        if self.start.anew:
            tensors = self._tensors()
            weights = {name: one for name, one in tensors.items() if name.startswith(PREFIX)}
            load_first_weights(self.start, self.checkpointer, weights)
            return {}
        path = self.start.checkpoint
        assert path is not None
        check_same_model(path, self.start.origin.model)
        for change in changed_keys(path, self.start.origin):
            log.warning("differs from %s: %s", path.name, change)
        random = torch.get_rng_state()
        others = {f"rng.{self.mesh.rank}": random}
        state = restore(self.checkpointer, path, self.engine, self.optimizer, others)
        torch.set_rng_state(random)
        self.step, self.tokens = state["step"], state["tokens"]
        log.info("resumed at step %d, %d tokens, from %s", self.step, self.tokens, path)
        return state

    def _open_objective(self, state: dict[str, Any]) -> Objective:
        """The stage's; sources that some stage's cannot use are an error now."""
        for stage in list_stages(self.run_config):
            drawn = drawn_sources(self.run_config, stage.index)
            train = [split for split in self.loader.splits if split.name in drawn]
            held_out = {} if stage.config.evaluation.every_steps is None else self.held_out
            kind = OBJECTIVES[stage.config.objective]
            try:
                kind.check_sources(train, held_out)
            except ValueError as error:
                raise ValueError(f"stages.{stage.name}: {error}" if stage.name else error) from None
            if stage.index == self.stage.index:
                objective = kind(self.config, self.model, self.mesh, train, held_out)
        if self.step > self.start.first_step:  # else the state is that of the stage before
            before = state.get("name", "language_modelling")
            if before != self.config.objective:
                raise CheckpointError(
                    f"objective={self.config.objective}, but {self.start.checkpoint} is from "
                    f"within objective={before}: begin a new run from its weights, or a stage"
                )
            objective.load_state(state)
        return objective

    def _open_metrics(self) -> MetricsLogger | NullMetrics:
        if self.mesh.rank != 0:
            return NullMetrics()
        run_config = OmegaConf.to_container(OmegaConf.structured(self.run_config))
        assert isinstance(run_config, dict)
        update_summary(
            self.run_dir,
            {
                "parameters": count_parameters(self.model),
                "active_parameters": count_active_parameters(self.model),
            },
        )
        return MetricsLogger(
            self.run_dir,
            self.config.log,
            run_name=f"{self.run_dir.parent.name}-{self.run_dir.name}",
            run_config={str(key): value for key, value in run_config.items()},
            resume_step=self.step,
            total_tokens=run_tokens(self.run_config),
            total_steps=self.config.trainer.max_steps,
        )

    def _mark_done(self) -> None:
        if self.mesh.rank == 0:
            (self.run_dir / DONE).touch()

    @property
    def _weights(self) -> str:
        """What tells the weights that the trainer began with from others."""
        paths = [path for path in (self.start.checkpoint, self.start.tower) if path is not None]
        return "+".join(checksum(path / MANIFEST) for path in paths) or f"seed {self.config.seed}"

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    def _row(self, batch: StepBatch, grad_norm: torch.Tensor) -> dict[str, Any]:
        phase("statistics")
        self.health.check_finite(self.step, grad_norm)
        read = self.objective.read_step()  # waits for the device: the time below is of all work
        stage = {"stage": self.stage.name} if self.stage.name else {}
        load = read.pop("expert_load", None)
        if load is not None and self._is_due(self.config.log.expert_load_every_steps):
            read["expert_load"] = load.round(decimals=3).tolist()
        parts = self.engine.part_norms()
        dropped = torch.as_tensor(self._throughput.dropped, device=self.mesh.device)
        dist.all_reduce(dropped)
        return {
            "step": self.step,
            "tokens": self.tokens,
            **stage,
            "seq_len": self.config.data.seq_len,
            **read,
            "grad_norm": grad_norm.item(),
            **{f"grad_norm/{part}": norm for part, norm in parts.items()},
            **self.health.row(),
            "memory_gib": self._memory_gib(),
            "batch_digest": batch.digest,
            **self._throughput.read(num_dropped=int(dropped)),
            **{
                f"{ACCOUNT_PREFIX}{source}/{bucket}": tokens
                for source, buckets in batch.state["account"].items()
                for bucket, tokens in buckets.items()
            },
        }

    def _memory_gib(self) -> float:
        if self.mesh.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.mesh.device)
            torch.cuda.reset_peak_memory_stats(self.mesh.device)
            return peak / 2**30
        # Peak resident set of this process; Linux counts it in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
