"""The trainer's steps, rows and evaluation against a loop written out here."""

import math
from pathlib import Path

import pytest
import torch
from support.folders import write_folder
from support.tiny import tiny_config

from fulmen.data.loader import PackedLoader
from fulmen.data.mixture import Shares
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics

STEPS = 5
LOGGED = {
    *("step", "tokens", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s"),
    *("tflops_per_device", "mfu", "mfu_palm", "drop_rate", "expert_imbalance", "memory_gib"),
    *("data_wait_s", "checkpoint_stall_s", "grad_norm/lightning", "grad_norm/experts"),
}
"""What every logged step promises (docs/metrics.md)."""


def configuration(data: Path) -> RunConfig:
    config = tiny_config(data, max_steps=STEPS)
    config.moe.aux_loss_coef = 0.1
    config.optim.grad_clip = 0.5  # below every norm
    config.evaluation.every_steps = STEPS
    config.evaluation.max_tokens = 10**6
    return config


def forward(model: TextModel, batch: PackedBatch) -> LossOutput:
    output = model(
        batch.input_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        num_tokens=batch.num_tokens,
    )
    assert isinstance(output, LossOutput)
    return output


def expected(config: RunConfig) -> tuple[TextModel, list[dict[str, float]]]:
    """A plain loop over the same batches."""
    model = TextModel(config.model, config.moe)
    init_model(model, config.model, config.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    loader = PackedLoader(
        config.data.sources,
        seq_len=32,
        micro_batch_tokens=64,
        batch_tokens=lambda tokens: 256,
        shares=lambda tokens: Shares(
            {name: source.weight for name, source in config.data.sources.items()}, None
        ),
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        prefetch_steps=0,
    )
    rows, tokens = [], 0
    for step in range(STEPS):
        batches = next(loader).micro_batches
        labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
        # Uneven, or a mean of means would pass for the mean.
        assert len({int((batch.labels >= 0).sum()) for batch in batches}) > 1
        losses = aux_losses = 0.0
        for batch in batches:
            output = forward(model, batch)
            (output.loss_sum / labels + 0.1 * output.aux_loss / 4).backward()
            losses += output.loss_sum.item()
            aux_losses += output.aux_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = 3e-3 * min(1.0, (step + 1) / 4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(batch.num_tokens for batch in batches)
        rows.append(
            {
                "step": step + 1,
                "tokens": tokens,
                "loss": losses / labels,
                "aux_loss": aux_losses / 4,
                "grad_norm": norm.item(),
                "lr": rate,
            }
        )
    return model, rows


@torch.no_grad()
def held_out_loss(model: TextModel, data: Path) -> float:
    """Mean over all predicted tokens of the validation documents, in pieces of a row's length."""
    split = PreparedSplit(data, "valid", name="text", vocab_size=model.config.vocab_size)
    total, labels = 0.0, 0
    for number in range(split.num_documents):
        document = torch.from_numpy(split.document(number).astype("int64"))
        for start in range(0, len(document), 32):
            piece = document[start : start + 32][None]
            following = document[start + 1 : start + 33]
            padded = torch.full_like(piece, -100)
            padded[0, : len(following)] = following
            output = model(piece, labels=padded)
            assert isinstance(output, LossOutput)
            total += output.loss_sum.item()
            labels += len(following)
    return total / labels


def test_the_trainer_does_what_a_plain_loop_does(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data)
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.fit()
    trainer.close()
    model, rows = expected(config)
    *steps, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert len(steps) == STEPS
    for row, reference in zip(steps, rows, strict=True):
        assert row.keys() >= LOGGED
        for key, value in reference.items():
            assert row[key] == pytest.approx(value, rel=1e-5), (row["step"], key)
        assert row["mfu"] is None  # a CPU has no known peak
        assert row["drop_rate"] == 0.0
        assert row["expert_imbalance"] >= 1.0
        parts = [value for key, value in row.items() if key.startswith("grad_norm/")]
        assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-6)
    for name, parameter in model.named_parameters():
        ours = trainer.engine.parameters[name].full_tensor()
        assert (ours - parameter).norm() <= 3e-5 * parameter.norm(), name
    assert (evaluation["step"], evaluation["tokens"]) == (STEPS, rows[-1]["tokens"])
    expected_loss = held_out_loss(model, tiny_data)
    assert evaluation["eval_loss/text"] == pytest.approx(expected_loss, rel=1e-4)


def test_the_run_ends_at_its_tokens(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data)
    config.trainer.max_steps = None
    config.trainer.max_tokens = 600  # three steps of at most 256
    config.log.every_steps = 2
    config.evaluation.every_steps = 2
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.fit()
    trainer.close()
    assert trainer.step == 3
    assert trainer.tokens >= 600
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2]
    assert [row["step"] for row in rows if "eval_loss/text" in row] == [2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_3"]


def test_a_step_without_labels_is_one_like_others(one_rank: torch.device, tmp_path: Path) -> None:
    config = configuration(write_folder(tmp_path / "text", [[5]] * 900, [[5]], vocab_size=301))
    config.trainer.max_steps = 2
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.fit()
    trainer.close()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [(row["loss"], row["skipped"]) for row in rows] == [(0, 0), (0, 0)]
    assert all(row["grad_norm"] > 0 for row in rows)  # experts are balanced all the same


def test_capacity_drops_are_reported(
    one_rank: torch.device, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data)
    config.trainer.max_steps = 2
    config.moe.capacity_factor = 0.5  # at least half of all assignments find no room
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    trainer.fit()
    trainer.close()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert all(0.45 <= row["drop_rate"] < 1 for row in rows)
    # A row of both steps is credited with what both have dropped, not twice with the second's.
    config.log.every_steps = 2
    (tmp_path / "once").mkdir()
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path / "once")
    trainer.fit()
    trainer.close()
    (row,) = [one for one in read_metrics(tmp_path / "once" / "metrics.jsonl") if "loss" in one]
    tokens = [rows[0]["tokens"], rows[1]["tokens"] - rows[0]["tokens"]]
    each = sum(one["flops_per_token"] * n for one, n in zip(rows, tokens, strict=True))
    assert rows[0]["drop_rate"] != rows[1]["drop_rate"]
    assert row["flops_per_token"] * sum(tokens) == pytest.approx(each, rel=1e-9)
