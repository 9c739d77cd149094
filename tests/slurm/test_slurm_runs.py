"""Runs on a SLURM of four nodes that comes up for these tests (make test-slurm).

Each is text01_tiny, cut to tiny shapes, on two nodes of two processes, submitted by
launch/submit.py. Whatever happens to one, its losses are those of the run that nothing happened to.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_cluster import MiniCluster, why_no_slurm
from support.processes import last_step
from support.tiny import ROOT, as_overrides, tiny_config

from fulmen.trainer.metrics import read_metrics

pytestmark = pytest.mark.slurm

STEPS, SAVE_EVERY = 24, 4
NO_PREFLIGHT = "slurm.preflight=false"
"""It takes a third of a start, which other tests look at."""
LIMIT_S = 300
"""For whatever is waited for: the machine may be busy."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    reason = why_no_slurm()
    if reason:
        pytest.skip(f"NO SLURM HERE, SO NONE OF ITS TESTS RUN: {reason}")
    made = MiniCluster(tmp_path_factory.mktemp("slurm"), nodes=4)
    try:
        made.up()
        yield made
    finally:
        made.down()


class Submitted:
    """A run and its jobs."""

    def __init__(self, cluster: MiniCluster, data: Path, root: Path, run_id: str) -> None:
        self.cluster, self.root = cluster, root
        self.folder = root / "text01_tiny" / run_id
        config = tiny_config(data, max_steps=STEPS)
        config.checkpoint.every_steps = SAVE_EVERY
        config.evaluation.every_steps = None
        self.words = [*as_overrides(config), f"run_root={root}", f"run_id={run_id}"]
        self._facts = root / "cluster.yaml"
        self._facts.write_text((ROOT / "recipes" / "clusters" / "cpu.yaml").read_text())
        self.jobs: list[str] = []

    def add_facts(self, facts: str) -> None:
        with self._facts.open("a") as file:
            file.write(facts)

    def submit(self, *words: str) -> str:
        """What launch/submit.py prints."""
        job = ["slurm.nodes=2", "slurm.time=30", "slurm.notice_s=60", f"cluster={self._facts}"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "submit.py"), *self.words, *job, *words],
            env=self.cluster.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.here = max((self.folder / "slurm").iterdir(), key=lambda path: int(path.name))
        self.jobs = (self.here / "jobs").read_text().split()
        return done.stdout

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        self._wait(lambda: last_step(metrics) >= step, f"step {step}")

    def wait_until(self, *states: str, job: str | None = None) -> None:
        job = job or self.jobs[-1]
        self._wait(
            lambda: self.cluster.field(job, "JobState") in states, f"job {' or '.join(states)}"
        )

    def end(self) -> list[dict[str, Any]]:
        """Wait for the normal end of the last job; the rows of the run, without times."""
        self.wait_until("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
        state = self.cluster.field(self.jobs[-1], "JobState")
        assert state == "COMPLETED", f"{state}\n{self.output()}"
        assert (self.folder / "DONE").exists(), self.output()
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        kept = ("step", "tokens", "loss", "grad_norm", "lr", "batch_digest")
        read = read_metrics(self.folder / "metrics.jsonl")
        return [{key: row[key] for key in kept} for row in read]

    def nodes(self) -> list[str]:
        """Of the last job."""
        found = self.cluster.field(self.jobs[-1], "NodeList")
        return self.cluster.call("scontrol", "show", "hostnames", found).split()

    def output(self) -> str:
        """Of all jobs of the run."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("slurm/*/job-*.out")))

    def _wait(self, holds: Any, what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, f"no {what} in {LIMIT_S} s\n{self.output()[-6000:]}"
            time.sleep(0.2)


@pytest.fixture
def run(cluster: MiniCluster, tiny_data: Path, tmp_path: Path) -> Iterator[Submitted]:
    made = Submitted(cluster, tiny_data, tmp_path, "run")
    yield made
    for job in cluster.jobs():
        cluster.call("scancel", "--full", job)
    cluster.wait_for(lambda: not cluster.jobs(), 60, "empty queue")


@pytest.fixture(scope="module")
def undisturbed(
    cluster: MiniCluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Submitted:
    made = Submitted(cluster, tiny_data, tmp_path_factory.mktemp("undisturbed"), "run")
    made.said = made.submit()  # type: ignore[attr-defined]
    made.end()
    return made


def test_a_job_runs_to_its_end(undisturbed: Submitted) -> None:
    rows, output = undisturbed.rows(), undisturbed.output()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    said = undisturbed.said  # type: ignore[attr-defined]
    assert f"job {undisturbed.jobs[0]}" in said
    assert "to start at" in said  # of sbatch --test-only
    assert "preflight: 2 good node(s)" in output
    assert "4 process(es) on cpu" in output
    assert (undisturbed.here / "code" / "trainer" / "loop.py").is_file()
    assert f"max_steps: {STEPS}" in (undisturbed.here / "config.yaml").read_text()


def test_the_code_of_a_job_is_that_of_its_submission(undisturbed: Submitted) -> None:
    facts = json.loads((undisturbed.here / "preflight.json").read_text())["facts"]
    assert set(facts) == {"n1", "n2"}


def test_before_the_time_limit_it_saves_and_is_requeued(
    run: Submitted, undisturbed: Submitted
) -> None:
    run.submit(NO_PREFLIGHT)
    run.wait_for_step(6)
    run.cluster.call("scancel", "--batch", "--signal=USR1", run.jobs[0])
    assert run.end() == undisturbed.rows()
    log = (run.folder / "train.log").read_text()
    assert "asked to stop by" in log
    assert log.count("resumed at step") == 1
    assert run.cluster.field(run.jobs[0], "Restarts") == "1"
    assert not (run.folder / "STOP").exists()


def test_a_lost_node_is_replaced(run: Submitted, undisturbed: Submitted) -> None:
    run.submit()
    run.wait_for_step(SAVE_EVERY * 2 + 1)
    run.cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        assert run.end() == undisturbed.rows()
        assert run.cluster.field(run.jobs[0], "Restarts") == "1"
        assert "n2" not in run.nodes()
    finally:
        run.cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert "resumed at step" in (run.folder / "train.log").read_text()


def test_a_killed_rank_starts_the_job_again(run: Submitted, undisturbed: Submitted) -> None:
    run.submit()
    run.wait_for_step(SAVE_EVERY * 2 + 1)
    os.kill(find_rank(run.folder, 3), signal.SIGKILL)
    assert run.end() == undisturbed.rows()
    output = run.output()
    assert "another start from the newest checkpoint (1 of 3)" in output
    assert run.cluster.field(run.jobs[0], "Restarts") == "0"


def find_rank(folder: Path, rank: int) -> int:
    """Process id of a rank of a run."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = str(folder).encode() in command and b"torch.distributed.run" not in command
        if ours and b"pretrain.py" in command and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no rank {rank} of {folder}")


def test_a_chain_goes_on_in_its_next_job(run: Submitted, undisturbed: Submitted) -> None:
    run.submit("slurm.chain=2", NO_PREFLIGHT)
    assert run.cluster.field(run.jobs[1], "JobState") == "PENDING"
    run.wait_for_step(6)
    run.cluster.call("scancel", "--batch", "--signal=USR1", run.jobs[0])
    assert run.end() == undisturbed.rows()
    assert [run.cluster.field(job, "Restarts") for job in run.jobs] == ["0", "0"]
    assert "the next job of the chain goes on" in run.output()


def test_a_cancelled_run_can_go_on_with_fewer_nodes(run: Submitted, undisturbed: Submitted) -> None:
    run.submit(NO_PREFLIGHT)
    run.wait_for_step(6)
    run.cluster.call("scancel", run.jobs[0])
    run.wait_until("CANCELLED")
    run.cluster.wait_for(lambda: not run.cluster.jobs(), LIMIT_S, "empty queue")
    assert not (run.folder / "DONE").exists()
    log = (run.folder / "train.log").read_text()
    assert re.search("asked to stop by (SIGTERM|another rank)", log)  # whoever heard it first
    run.submit("slurm.nodes=1")
    assert run.here.name == "2"
    found, expected = run.end(), undisturbed.rows()
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in expected]
    for name in ("step", "tokens", "loss", "grad_norm"):
        values = [row[name] for row in found]
        assert values == pytest.approx([row[name] for row in expected], rel=1e-5)
    assert "resumed at step" in (run.folder / "train.log").read_text()


def test_each_task_of_a_sweep_is_a_run(run: Submitted, undisturbed: Submitted) -> None:
    run.words.remove("seed=3")
    words = ("slurm.sweep={seed: [4, 3]}", "slurm.nodes=1", NO_PREFLIGHT)
    run.submit(*words)
    (array,) = run.jobs
    first = run.here
    other, run.folder = (run.folder.with_name(f"run-seed_{seed}") for seed in (4, 3))
    run.wait_for_step(6)
    # The task that begins last has the id of the whole array.
    assert run.cluster.field(f"{array}_1", "JobId") == array
    run.cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_1")
    run.folder = other.with_name("run")
    run.submit(*words)  # waits, and finds nothing to do
    assert f"afterany:{array}" in run.cluster.field(f"{run.jobs[0]}_0", "Dependency")
    run.cluster.wait_for(lambda: not run.cluster.jobs(), LIMIT_S, "empty queue")
    run.folder = other.with_name("run-seed_3")
    losses = [row["loss"] for row in run.rows()]
    assert losses == pytest.approx([row["loss"] for row in undisturbed.rows()], rel=1e-5)
    assert "resumed at step" in (run.folder / "train.log").read_text()
    assert "requeued" in (first / f"job-{array}_1.out").read_text()
    for task, folder in enumerate((other, run.folder)):
        assert run.cluster.field(f"{array}_{task}", "Restarts") == f"{task}"
        assert (folder / "DONE").exists()
        assert "is done" in (run.here / f"job-{run.jobs[0]}_{task}.out").read_text()
    run.folder = other
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert run.rows()[0]["loss"] != losses[0]


# ---- preflight ----


def test_a_node_with_another_version_is_named_and_left_out(
    run: Submitted, undisturbed: Submitted, tmp_path: Path
) -> None:
    fake = tmp_path / "fake" / "numpy-1.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    line = f'[ "${{SLURMD_NODENAME}}" != n2 ] || export PYTHONPATH={fake.parent}:$PYTHONPATH'
    run.add_facts(f"setup:\n  - '{line}'\n")
    run.submit()
    run.wait_until("FAILED")
    output = run.output()
    assert "n2 is bad: numpy is 1.0, elsewhere" in output
    assert "BAD NODES: n2 " in output
    assert run.cluster.field(run.jobs[0], "ExitCode") == "3:0"
    [other] = run.cluster.jobs()
    assert f"job {other} takes over without them" in output
    run.jobs.append(other)
    assert run.end() == undisturbed.rows()
    assert "n2" not in run.nodes()


def test_a_node_that_cannot_write_is_named(run: Submitted, tmp_path: Path) -> None:
    (tmp_path / "n1").touch()  # nobody can write below a file, not even root
    run.add_facts(f"cache_folder: {tmp_path}/$SLURMD_NODENAME/cache\n")
    run.submit("slurm.leave_out_bad=false")
    run.wait_until("FAILED")
    assert "n1 is bad: cache_folder " in run.output()
    assert "BAD NODES: n1 " in run.output()
    assert run.cluster.field(run.jobs[0], "ExitCode") == "3:0"
    assert not run.cluster.jobs()
    assert not (run.folder / "metrics.jsonl").exists()
