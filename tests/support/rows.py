"""Rows of metrics, what logs them, and what was warned of."""

import logging
from pathlib import Path
from typing import Any

import pytest

from fulmen.trainer.metrics import LogConfig, MetricsLogger


def step_row(step: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "tokens": 10_000 * step,
        "loss": 4.312,
        "grad_norm": 0.811,
        "lr": 1e-3,
        "step_time_s": 0.5,
        "tokens_per_s": 12_345.6,
        "tflops_per_device": 0.01,
        "mfu": None,
        "mfu_palm": None,
        "drop_rate": 0.0,
        "expert_imbalance": 1.25,
        "memory_gib": 0.5,
        "batch_digest": "00c0ffee",
    }
    return {**row, **changes}


def open_logger(run_dir: Path, *, resume_step: int = 0, **log: Any) -> MetricsLogger:
    return MetricsLogger(
        run_dir,
        LogConfig(**log),
        run_name="tiny-1",
        run_config={"seed": 1},
        resume_step=resume_step,
        total_tokens=None,
        total_steps=400,
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
