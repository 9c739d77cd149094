"""Points of a sweep, and what launch/submit.py makes of them; without SLURM."""

import subprocess
from pathlib import Path

import pytest
import yaml
from support import HANG_S, warm
from support.tiny import ROOT

from fulmen.launch.submit import _OWN_KEYS, SlurmConfig, check_slurm
from fulmen.launch.sweep import list_points


@pytest.mark.fast
def test_every_combination_is_a_point_with_a_name() -> None:
    sweep = {"optim.lr": [1e-3, 3e-4], "model.rope_theta": [1e4], "kernels": ["torch", "a b"]}
    points = list_points(sweep, ["seed=1"], _OWN_KEYS)
    assert [point.name for point in points] == [
        "lr_0.001-rope_theta_10000.0-kernels_torch",
        "lr_0.001-rope_theta_10000.0-kernels_a_b",
        "lr_0.0003-rope_theta_10000.0-kernels_torch",
        "lr_0.0003-rope_theta_10000.0-kernels_a_b",
    ]
    assert points[1].words == ("optim.lr=0.001", "model.rope_theta=10000.0", 'kernels="a b"')
    points = list_points({"a": [None, True, "x/y", "1"]}, [], _OWN_KEYS)
    assert [point.words[0] for point in points] == ["a=null", "a=true", "a=x/y", 'a="1"']


@pytest.mark.fast
def test_names_tell_keys_with_the_same_end_apart() -> None:
    sweep = {"data.sources.a.weight": [1], "data.sources.b.weight": [2]}
    (point,) = list_points(sweep, [], _OWN_KEYS)
    assert point.name == "data.sources.a.weight_1-data.sources.b.weight_2"
    assert point.words[0] == "++data.sources.a.weight=1"  # may not be in the recipe


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sweep", "given", "message"),
    [
        ({"optim.lr": 3}, [], r"slurm\.sweep\.optim\.lr=3: must be a list"),
        ({"optim.lr": []}, [], r"slurm\.sweep\.optim\.lr=\[\]: must be a list"),
        ({"seed": [[1]]}, [], r"slurm\.sweep\.seed: \[1\] is no number"),
        ({"seed": [1, 2, 1]}, [], "2 runs would be called seed_1"),
        ({"seed": [1]}, ["seed=2"], r"seed is given as well as slurm\.sweep\.seed"),
        ({"run_id": ["a"]}, [], "run_id is not a key of the run"),
        ({"slurm.nodes": [1, 2]}, [], r"slurm\.nodes is not a key of the run"),
        ({"data.sources.a.path": ["x" * 200]}, [], "too long"),
    ],
)
def test_wrong_sweeps_are_named(sweep: dict, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_points(sweep, given, _OWN_KEYS)


@pytest.mark.fast
def test_a_limit_without_a_sweep_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"slurm\.sweep_at_once=2: there is no"):
        check_slurm(SlurmConfig(nodes=1, time="1:00:00", sweep_at_once=2))


def submit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(*warm.shared_python(), str(ROOT / "launch" / "submit.py"), "recipe=text01_tiny"),
        *("cluster=recipes/clusters/cpu.yaml", "slurm.nodes=2", "slurm.time=1:00:00"),
        *("trainer.micro_batch_tokens=1024", f"run_root={folder}", "run_id=first", "dry_run=true"),
    ]
    return subprocess.run(
        [*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )


@pytest.mark.slow
def test_one_submission_for_all_points(tmp_path: Path) -> None:
    said = submit(tmp_path, "slurm.sweep={optim.lr: [1e-3, 3e-4], seed: [7]}")
    assert said.returncode == 0, said.stderr
    folder = tmp_path / "text01_tiny"
    here = folder / "first" / "slurm" / "1"
    script = (here / "job.sh").read_text()
    subprocess.run(["bash", "-n", here / "job.sh"], check=True)
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --job-name=text01_tiny-first\n" in script
    assert f"#SBATCH --output={here}/job-%A_%a.out\n" in script
    names = ["lr_0.001-seed_7", "lr_0.0003-seed_7"]
    for number, name in enumerate(names):
        line = f"  {number}) RUN={folder}/first-{name} SEEN={here}/{name} "
        assert f"{line}ARGUMENTS+=(run_id=first-{name} optim.lr=" in script
    config = yaml.safe_load((here / names[1] / "config.yaml").read_text())
    assert (config["run_id"], config["optim"]["lr"]) == ("first-lr_0.0003-seed_7", 3e-4)
    assert config["trainer"]["micro_batch_tokens"] == 1024


@pytest.mark.slow
def test_a_point_that_cannot_run_is_one_error_before_anything_is_written(tmp_path: Path) -> None:
    said = submit(tmp_path, "slurm.sweep={data.seq_len: [512, 500]}")
    assert said.returncode == 1
    assert said.stderr.startswith("error: data.seq_len=500: ")
    said = submit(tmp_path, "slurm.sweep={optim.lrr: [1, 2]}")
    assert said.stderr.splitlines() == [
        "error: slurm.sweep: unknown key optim.lrr; did you mean optim.lr or optim or optim.groups?"
    ]
    assert not list(tmp_path.iterdir())
