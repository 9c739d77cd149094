"""The `kernels` group from the command line to the ops that a model calls."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny import ROOT, as_overrides, compose_config, tiny_config, tiny_model

from fulmen.kernels import registry
from fulmen.kernels.registry import AUTO, IMPLEMENTATIONS
from fulmen.models.config import MoEConfig
from fulmen.models.text import LossOutput, TextModel
from fulmen.trainer.config import RunConfig
from fulmen.trainer.run import run


@pytest.fixture(autouse=True)
def untouched_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_overrides", {})
    monkeypatch.setattr(registry, "_logged", set())


def kernels_of(*overrides: str) -> dict[str, str]:
    config = compose_config(["recipe=text01_tiny", *overrides])
    assert isinstance(config, RunConfig)
    return asdict(config.kernels)


@pytest.mark.fast
def test_every_op_is_left_to_the_machine_unless_something_is_said() -> None:
    assert kernels_of() == dict.fromkeys(IMPLEMENTATIONS, AUTO)
    assert kernels_of("kernels=auto") == kernels_of()


@pytest.mark.fast
def test_all_references_in_one_word() -> None:
    chosen = kernels_of("kernels=torch")
    assert list(chosen) == list(IMPLEMENTATIONS)
    # The last one listed is what every machine has.
    assert chosen == {op: names[-1] for op, names in IMPLEMENTATIONS.items()}
    assert kernels_of("kernels=torch", "kernels.rope=auto") == chosen | {"rope": AUTO}


@pytest.mark.fast
def test_every_choice_of_the_group_is_known() -> None:
    files = list((ROOT / "recipes" / "kernels").glob("*.yaml"))
    assert {file.stem for file in files} == {"auto", "torch"}
    for file in files:
        registry.configure(yaml.safe_load(file.read_text()))


@pytest.mark.fast
def test_a_model_runs_what_the_group_says() -> None:
    chosen = kernels_of("kernels=torch")
    registry.configure(chosen)
    torch.manual_seed(0)
    model = TextModel(tiny_model(), MoEConfig())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 301, (1, 12))
    output = model(tokens, labels=tokens)
    assert isinstance(output, LossOutput)
    (output.loss_sum + output.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # Each op was asked for, and ran on what was asked for.
    del chosen["attention_block"]  # of rows over several ranks
    assert registry._logged == set(chosen.items())


def run_with(override: str, data: Path, folder: Path, device: torch.device) -> None:
    overrides = [
        *as_overrides(tiny_config(data, max_steps=1)),
        f"run_root={folder}",
        "run_id=fails",
    ]
    config = compose_config([*overrides, override])
    run(config, device, "text01_tiny")


def test_a_misspelt_implementation_ends_a_run_before_it_begins(
    tiny_data: Path, tmp_path: Path, one_rank: torch.device
) -> None:
    message = r"^kernels\.lightning=tritn: must be auto or one of triton, torch$"
    with pytest.raises(ValueError, match=message):
        run_with("kernels.lightning=tritn", tiny_data, tmp_path, one_rank)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("kernels.lightning=triton", "needs a CUDA tensor"),
        ("kernels.grouped_gemm=grouped_mm", "needs a CUDA tensor"),
        ("kernels.attention=cudnn", "needs a CUDA tensor"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has them")
def test_an_implementation_that_the_machine_lacks_ends_the_run(
    override: str, reason: str, tiny_data: Path, tmp_path: Path, one_rank: torch.device
) -> None:
    with pytest.raises(ValueError, match=rf"^{override.replace('.', '[.]')}: {reason}$"):
        run_with(override, tiny_data, tmp_path, one_rank)
    assert f"{override}: {reason}" in (tmp_path / "text01_tiny" / "fails" / "train.log").read_text()
