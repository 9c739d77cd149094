"""Known laws are found again in made-up runs; the paper's formulas; what is said of unfit runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from support.tiny import ROOT, compose_config

from fulmen.launch.fit_scaling import FitConfig, fit
from fulmen.models.config import ModelConfig
from fulmen.trainer.config import PhaseConfig, RunConfig, to_dataclass
from fulmen.trainer.memory import count_model
from fulmen.trainer.scaling import (
    PAPER,
    PFLOP_S_DAY,
    curves,
    fit_kind,
    fit_law,
    fit_laws,
    frontier,
    paper_flops_per_token,
    paper_parameters,
    read_run,
    read_runs,
)
from fulmen.trainer.scaling_joint import fit_joint, predict

# L = A N^-ALPHA + B D^-BETA. With C = 6 N D its optima are power laws of C, all three.
A, ALPHA, B, BETA = 60.0, 0.25, 150.0, 0.3
NUM_ROWS = 120
HIDDEN = (32, 48, 64, 96, 128, 192)


def config_of(hidden: int, every: int = 8, **changes: Any) -> RunConfig:
    """A dense miniature of that width."""
    config = compose_config(["recipe=scaling", "scaling/size=nano3"])
    config.model.hidden_size = hidden
    config.model.expert_hidden_size = 3 * hidden
    config.model.softmax_every = every
    config.schedule.warmup_steps = 0
    for name, value in changes.items():
        setattr(config.model, name, value)
    return config


def write_run(
    folder: Path,
    config: RunConfig,
    *,
    noise: float = 0.0,
    last: float = 3e9,
    shift: float = 0.0,
    seed: int = 0,
) -> Path:
    """The folder of a finished run that follows the law above, with 6 N operations a token."""
    parameters = count_model(config.model).active
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (folder / "DONE").touch()
    rows = []
    for step, tokens in enumerate(np.geomspace(1e5, last, NUM_ROWS), start=1):
        loss = shift + A * parameters**-ALPHA + B * tokens**-BETA
        loss *= math.exp(noise * chance.normal())
        rows.append(
            {"step": step, "tokens": int(tokens), "loss": loss, "flops_per_token": 6.0 * parameters}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sweep(folder: Path, every: int = 8, noise: float = 0.0) -> list[Path]:
    return [
        write_run(folder / f"{every}_{hidden}", config_of(hidden, every), noise=noise, seed=hidden)
        for hidden in HIDDEN
    ]


def known_laws() -> dict[str, tuple[float, float]]:
    """Coefficient and exponent of each law, C in PFLOP/s-days."""
    unit = PFLOP_S_DAY / 6
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n, d = BETA / (ALPHA + BETA), ALPHA / (ALPHA + BETA)
    loss = A * (g * unit**n) ** -ALPHA + B * (unit**d / g) ** -BETA
    return {
        "loss": (loss, -ALPHA * BETA / (ALPHA + BETA)),
        "parameters": (g * unit**n, n),
        "tokens": (unit**d / g, d),
    }


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.015), (0.005, 0.04)])
def test_known_laws_are_found(noise: float, tolerance: float, tmp_path: Path) -> None:
    runs = read_runs(write_sweep(tmp_path, noise=noise), "loss")["hybrid"]
    optima = frontier(curves(runs), "ours")
    assert len(optima.compute) > 20
    laws = fit_laws(optima)
    middle = np.exp(np.log(optima.compute).mean(keepdims=True))
    for name, (coefficient, exponent) in known_laws().items():
        assert laws[name].exponent == pytest.approx(exponent, abs=tolerance), name
        # Far from C = 1 the coefficient follows the exponent: the values that it was fitted to.
        value = coefficient * middle**exponent
        assert laws[name].at(middle) == pytest.approx(value, rel=5 * tolerance), name
    assert laws["loss"].exponent == pytest.approx(known_laws()["loss"][1], abs=0.003)


def test_a_line_in_log_space_is_exact() -> None:
    compute = np.geomspace(1e-8, 1e2, 7)
    law = fit_law(compute, 3.4797 * compute**-0.0763)
    assert law.coefficient == pytest.approx(3.4797, rel=1e-12)
    assert law.exponent == pytest.approx(-0.0763, rel=1e-12)


def test_intervals_hold_the_fit_and_widen_with_noise(tmp_path: Path) -> None:
    widths = []
    for noise in (0.002, 0.05):
        runs = read_runs(write_sweep(tmp_path / str(noise), noise=noise), "loss")["hybrid"]
        fitted = fit_kind("hybrid", runs, samples=40, seed=1)["fits"]["ours"]
        assert fitted["bootstrap"]["draws"] == 40
        assert 20 <= fitted["bootstrap"]["fitted"] <= 40
        low, high = fitted["intervals_90"]["parameters"]["exponent"]
        assert low <= fitted["laws"]["parameters"]["exponent"] <= high
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_several_lengths_of_a_decayed_schedule(tmp_path: Path) -> None:
    """Where the learning rate changes, only ends of runs count, and they make one curve a size."""
    paths = []
    for hidden in HIDDEN:
        config = config_of(hidden)
        config.schedule.phases.append(PhaseConfig(tokens=9, lr_factor=0.1, decay="exponential"))
        for index, last in enumerate(np.geomspace(2e5, 1e9, 12)):
            paths.append(write_run(tmp_path / f"{hidden}_{index}", config, last=float(last)))
    runs = read_runs(paths, "loss")["hybrid"]
    assert all(len(run.tokens) == 1 for run in runs)
    sizes = curves(runs)
    assert [len(size.tokens) for size in sizes] == [12] * len(HIDDEN)
    laws = fit_laws(frontier(sizes, "ours"))
    for name, (_, exponent) in known_laws().items():
        assert laws[name].exponent == pytest.approx(exponent, abs=0.03), name


def test_the_joint_form_is_found() -> None:
    parameters, tokens = np.meshgrid(np.geomspace(4e7, 1e9, 6), np.geomspace(1e9, 5e11, 12))
    known = {"d": 1.7, "a": 400.0, "alpha": -0.34, "b": 410.0, "beta": -0.28, "c": 40.0}
    known |= {"gamma": -0.15}
    noise = np.exp(0.001 * np.random.default_rng(0).normal(size=parameters.shape))
    losses = predict(known, parameters, tokens) * noise
    losses[6, 3] *= 1.3  # what a robust fit does not follow
    found = fit_joint(parameters.ravel(), tokens.ravel(), losses.ravel())
    assert found is not None
    assert found["points"] == 72
    # Seven numbers trade against one another; what they say of a loss is what must hold, also
    # beyond the points.
    inside = predict(found, parameters, tokens)
    assert inside == pytest.approx(predict(known, parameters, tokens), rel=3e-3)
    beyond = np.array([3e9]), np.array([1e12])
    assert predict(found, *beyond) == pytest.approx(predict(known, *beyond), rel=2e-2)


def test_the_joint_form_needs_points() -> None:
    parameters = np.repeat([1e6, 2e6, 4e6], 4)
    assert fit_joint(parameters, np.tile(np.geomspace(1e6, 1e7, 4), 3), parameters**-0.1) is None


def test_table_1_by_hand() -> None:
    model = ModelConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    square = 2048**2  # 4,194,304
    flops = 72 * 16 * square
    cases = {
        # every: parameters, operations a token over 72 l d^2 in rows of 8192 (n / 6d = 2 / 3)
        1: (12 * 16 * square, 1 + 2 / 3 + 5 / 36_864),
        0: (12 * 16 * square + 2 * 16 * square / 16, 1 + 1 / 32 + 5 / 36_864),
        8: (12 * 16 * square + 7 * 16 * square / 64, 1 + 1 / 12 + 7 / 256 + 5 / 36_864),
    }
    for every, (parameters, factor) in cases.items():
        model.softmax_every = every
        assert paper_parameters(model) == pytest.approx(parameters, rel=1e-12)
        assert paper_flops_per_token(model, 8192) == pytest.approx(flops * factor, rel=1e-12)


def test_both_counts_of_the_compute(tmp_path: Path) -> None:
    config = config_of(64, every=1)
    run = read_run(write_run(tmp_path / "dense", config), "loss")
    assert run.flops_per_token["ours"] == pytest.approx(6 * run.parameters)
    assert run.flops_per_token["paper"] == paper_flops_per_token(config.model, 256)
    mixed = write_run(tmp_path / "moe", config_of(64, num_experts=4))
    assert set(read_run(mixed, "loss").flops_per_token) == {"ours"}


def test_rows_without_a_count_are_taken_as_whole_rows(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", config_of(64, every=1))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["flops_per_token"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 8 layers: 4 x 64 x 32 of attention, 3 x 64 x 192 of the expert, a router of 64; the head
    # 64 x 4096; 6 operations each; the core 3 x 4 x 32 x 256 / 2 a layer.
    hand = 8 * 6 * (8192 + 36_864 + 64) + 6 * 262_144 + 8 * 49_152
    assert read_run(path, "loss").flops_per_token["ours"] == pytest.approx(hand)


def test_unfit_runs_are_named_together(tmp_path: Path) -> None:
    paths = write_sweep(tmp_path)
    (paths[0] / "DONE").unlink()
    with (paths[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "tokens": 9, "loss": null, "nonfinite": {"loss": "nan"}}\n')
    with pytest.raises(ValueError, match=r"8_32: no DONE.*\n.*8_48: loss of step 121 is nan"):
        read_runs(paths, "loss")


@pytest.mark.parametrize(
    ("changes", "metric", "message"),
    [
        ({"vocab_size": 512}, "loss", "vocab_size is 4096 in .* and 512 in .* cannot be compared"),
        ({"softmax_every": 1}, "loss", r"1 size\(s\) of kind softmax .* needs 3"),
        ({}, "eval_loss/web", "no eval_loss/web .* its rows have loss"),
    ],
)
def test_runs_that_do_not_go_together(
    changes: dict[str, int], metric: str, message: str, tmp_path: Path
) -> None:
    paths = [*write_sweep(tmp_path), write_run(tmp_path / "odd", config_of(256, **changes))]
    with pytest.raises(ValueError, match=message):
        read_runs(paths, metric)


def test_an_optimum_outside_the_sizes_is_no_optimum(tmp_path: Path) -> None:
    # So short that the smallest model is always the best.
    paths = [write_run(tmp_path / str(h), config_of(h), last=1.2e5) for h in HIDDEN]
    runs = read_runs(paths, "loss")["hybrid"]
    with pytest.raises(ValueError, match=r"kind hybrid.*train smaller sizes for longer"):
        fit_kind("hybrid", runs, samples=1, seed=0)


def test_a_count_without_a_fit_leaves_the_other(tmp_path: Path) -> None:
    for hidden in HIDDEN:
        write_run(tmp_path / "runs" / str(hidden), config_of(hidden, num_experts=4), last=3e8)
    words = [f"runs=[{tmp_path}/runs/*]", f"output={tmp_path}/fit", "samples=1"]
    with pytest.raises(ValueError, match=r"compute=paper: runs of kind hybrid: .* dense models"):
        fit(configured(*words, "compute=paper"))
    fit(configured(*words))
    made = json.loads((tmp_path / "fit" / "fit.json").read_text())["kinds"]["hybrid"]
    assert set(made["fits"]) == {"ours"}
    assert set(made["unfitted"]) == {"paper"}


def configured(*overrides: str) -> FitConfig:
    ConfigStore.instance().store(name="fit_scaling_schema", node=FitConfig)
    with initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return to_dataclass(compose("fit_scaling", list(overrides)), FitConfig)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for every in (0, 1, 8):
        write_sweep(tmp_path / "runs", every, noise=0.005)
    words = [f"runs=[{tmp_path}/runs/*]", f"output={tmp_path}/fit", "samples=10"]
    fit(configured(*words))
    made = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert set(made["kinds"]) == set(PAPER)
    hybrid = made["kinds"]["hybrid"]
    assert len(hybrid["runs"]) == len(HIDDEN)
    assert hybrid["paper"]["loss"] == {"coefficient": 3.4797, "exponent": -0.0763}
    assert set(hybrid["fits"]) == {"ours", "paper"}
    assert hybrid["joint"]["rms_log_error"] < 0.01
    assert (tmp_path / "fit" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "hybrid" in said
    assert "fit.json" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[nowhere/*]"], "there is no such folder"),
        (["runs=[]"], "runs is empty"),
        (["runs=[]", "compute=theirs"], "compute=theirs"),
        (["runs=[]", "samples=0"], "samples=0"),
    ],
)
def test_bad_values(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(configured(f"output={tmp_path}", *words))
