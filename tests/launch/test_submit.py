"""What launch/submit.py writes, and what it refuses; without SLURM."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import HANG_S, warm
from support.tiny import ROOT, compose_config

from fulmen.launch.cluster import ClusterConfig, read_cluster
from fulmen.launch.hydra_main import open_mappings
from fulmen.launch.snapshot import ROOMS, snapshot
from fulmen.launch.submit import (
    Run,
    SlurmConfig,
    SubmitConfig,
    check_slurm,
    plan,
    render_environment,
    render_job,
    seconds_of,
)

EXAMPLE = ROOT / "recipes" / "clusters" / "example.yaml"


@pytest.mark.slow
def test_a_dry_run_writes_a_job_that_runs_the_copied_code(tmp_path: Path) -> None:
    own = tmp_path / "own" / "recipe"
    own.mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "recipe" / "text01_tiny.yaml", own / "mine.yaml")
    words = [
        f"hydra.searchpath=[file://{own.parent}]",
        "recipe=mine",
        "kernels=torch",
        "trainer.micro_batch_tokens=1024",
        "cluster=recipes/clusters/cpu.yaml",
        "slurm.nodes=2",
        "slurm.time=1:00:00",
        f"run_root={tmp_path}",
        "run_id=first",
        "dry_run=true",
    ]
    command = [*warm.shared_python(), str(ROOT / "launch" / "submit.py"), *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert said.returncode == 0, said.stderr
    assert "nothing is submitted" in said.stdout
    here = tmp_path / "mine" / "first" / "slurm" / "1"
    config = yaml.safe_load((here / "config.yaml").read_text())
    assert config["run_id"] == "first"
    assert config["trainer"]["micro_batch_tokens"] == 1024
    script = (here / "job.sh").read_text()
    subprocess.run(["bash", "-n", here / "job.sh"], check=True)
    for line in ("--nodes=2", "--time=1:00:00", "--signal=B:USR1@300", "--dependency=singleton"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script.partition("\n\n")[0]
    lines = script.splitlines()
    given = lines[lines.index("ARGUMENTS=(") + 1 : lines.index(")", lines.index("ARGUMENTS=("))]
    words = [word.strip() for word in given]
    assert words[:3] == ["recipe=mine", "run_id=first", f"run_root={tmp_path}"]
    assert sorted(words[3:]) == ["kernels=torch", "trainer.micro_batch_tokens=1024"]
    # The job's own command, from the copy alone.
    printed = subprocess.run(
        [sys.executable, str(here / "code" / "launch" / "pretrain.py"), *words, "--cfg", "job"],
        env={"PYTHONPATH": str(here / "code" / ".rooms"), "PATH": "/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert printed.returncode == 0, printed.stderr
    assert "micro_batch_tokens: 1024" in printed.stdout


def test_edits_do_not_reach_a_job(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for room in ROOMS:
        (source / room).mkdir(parents=True)
        (source / room / "file.py").write_text("committed\n")

    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *who, *words], cwd=source, check=True, capture_output=True)

    git("init")
    (source / ".gitignore").write_text("*.pyc\n")
    git("add", ".")
    git("commit", "-m", "all")
    (source / "trainer" / "file.py").write_text("edited\n")
    (source / "models" / "new.py").write_text("new\n")
    (source / "data" / "file.pyc").write_text("ignored\n")
    (source / "kernels" / "file.py").unlink()
    said = snapshot(source, tmp_path / "copy", [])
    assert said.endswith("and 3 uncommitted file(s)")
    (source / "trainer" / "file.py").write_text("edited later\n")
    copied = tmp_path / "copy"
    assert (copied / "trainer" / "file.py").read_text() == "edited\n"
    assert (copied / ".rooms" / "fulmen" / "models" / "new.py").read_text() == "new\n"
    assert not (copied / "data" / "file.pyc").exists()
    assert not (copied / "kernels" / "file.py").exists()
    assert "+edited" in (copied / "uncommitted.patch").read_text()
    shutil.rmtree(source / ".git")
    assert snapshot(source, tmp_path / "other", []) == "code that is no git checkout"
    assert (tmp_path / "other" / "trainer" / "file.py").read_text() == "edited later\n"


def test_what_the_clusters_file_says_is_in_the_job(tmp_path: Path) -> None:
    cluster = read_cluster(str(EXAMPLE))
    slurm = SlurmConfig(nodes=256, time="48:00:00", chain=3, dependency="afterok:7", exclude="n9")
    folder = tmp_path / "text01" / "a"
    run = Run("a", folder, SubmitConfig(), None, "", None)
    script = render_job(slurm, cluster, [run], folder / "slurm" / "1", ["recipe=text01"])
    head = script.partition("\n\n")[0]
    for line in (
        "--job-name=text01-a",
        "--partition=gpu",
        "--account=my_account",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--dependency=singleton,afterok:7",
        "--exclude=n9",
        "--exclusive",
        "--requeue",
    ):
        assert f"#SBATCH {line}" in head.splitlines()
    assert "\nCHAIN=3\n" in script
    assert "INTERFACE=ib0" in script
    environment = render_environment(cluster, tmp_path)
    assert "export NCCL_SOCKET_IFNAME=ib0" in environment
    assert "export NCCL_IB_HCA=mlx5" in environment
    assert 'export TRITON_CACHE_DIR="/tmp/$USER/fulmen/triton"' in environment
    assert environment.endswith("module load cuda/12.8\n")


def planned(*words: str, notice_s: int = 300) -> tuple[str, dict | None]:
    run = compose_config(["recipe=text01_3b", "data.sources.corpus.path=x", *words])
    slurm = SlurmConfig(nodes=1, time="1:00:00", notice_s=notice_s)
    config = SubmitConfig(**vars(run), slurm=slurm, cluster=str(EXAMPLE))
    return plan(config, read_cluster(config.cluster), 8)


def test_the_plan_is_told() -> None:
    line, facts = planned()
    assert "of 79.1 GiB" in line
    assert facts is not None
    assert facts["gpus"] == 8


def test_a_run_that_cannot_fit_is_refused() -> None:
    large = ["data.seq_len=1048576", "trainer.micro_batch_tokens=1048576"]
    large += ["data.global_batch_tokens=8388608", "schedule.batch_ramp=[]"]
    with pytest.raises(
        ValueError, match=r"needs \d+\.\d GiB on a rank, a h100 has 79.1: launch/plan"
    ):
        planned(*large)
    planned(*large, "trainer.allow_misfit=true", notice_s=1_000_000)


def test_a_job_may_end_before_a_stage_that_needs_others() -> None:
    words = ["recipe=text01_1b_1m", "data.sources.corpus.path=x", "data.sources.long_qa.path=x"]
    words += ["trainer.micro_batch_tokens=8192"]
    cluster = ClusterConfig(gpus_per_node=2, gpu="h100")
    slurm = SlurmConfig(nodes=1, time="10:00:00")
    for word, told in [
        ("stages.to_1m.parallel.cp=4", "stages.to_1m: parallel.cp=4 does not divide the 2"),
        ("seed=1", "stage to_512k needs 84"),
    ]:
        run = compose_config([*words, open_mappings(word)])
        config = SubmitConfig(**vars(run), slurm=slurm, cluster="mine.yaml")
        line, facts = plan(config, cluster, 2)
        assert "the job will end before it comes to any of these: stage to_512k needs 84" in line
        assert told in line
        assert facts is not None
        names = [stage["name"] for stage in facts["stages"]]
        assert ("to_1m" in names) == (word == "seed=1")
        assert names[:3] == ["pretrain", "to_128k", "to_512k"]


def test_a_notice_shorter_than_two_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slurm\.notice_s=10: a step takes"):
        planned(notice_s=10)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("10:30", 630), ("48:00:00", 172_800), ("2-00", 172_800), ("1-1:1:1", 90_061)],
)
def test_time_limits_are_read_as_slurm_does(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "two days"}, r"slurm\.time=two days"),
        ({"time": "5:00"}, r"slurm\.notice_s=300"),
        ({"nodes": 0}, r"slurm\.nodes=0"),
        ({"chain": 0}, r"slurm\.chain=0"),
    ],
)
def test_wrong_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_slurm(SlurmConfig(**({"nodes": 2, "time": "1:00:00"} | changes)))


@pytest.mark.slow
def test_a_job_that_could_not_be_begun_again_is_refused(tmp_path: Path) -> None:
    words = ["recipe=text01_tiny", "cluster=recipes/clusters/cpu.yaml", "slurm.nodes=1"]
    words += ["slurm.time=1:00:00", f"run_root={tmp_path}", "checkpoint.resume=never"]
    command = [*warm.shared_python(), str(ROOT / "launch" / "submit.py"), *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert said.returncode == 1
    assert said.stderr.startswith("error: checkpoint.resume=never: a job that is begun again")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "partitoin: unknown key; did you mean partition"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("preflight: {min_write: 3}", r"preflight\.min_write: unknown key"),
        ("preflight: {nodes: [a]}", r"preflight\.nodes: unknown key"),
        ("- a", "must be a mapping"),
        ("a: [", "no YAML"),
    ],
)
def test_a_wrong_clusters_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_cluster(str(file))
    assert f"cluster={file}" in str(caught.value)


def test_a_clusters_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="cluster=nowhere: cannot be read"):
        read_cluster("nowhere")


def test_the_shells_variables_stay_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("setup: ['cd ${HOME}/a']\nenvironment: {A: '${B}'}\n")
    cluster = read_cluster(str(file))
    assert cluster.setup == ["cd ${HOME}/a"]
    assert cluster.environment == {"A": "${B}"}


def test_processes_follow_the_gpus() -> None:
    assert ClusterConfig(gpus_per_node=4).processes == 4
    assert ClusterConfig(gpus_per_node=0, processes_per_node=2).processes == 2
