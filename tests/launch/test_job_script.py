"""What the job's script does next, with programs that stand for SLURM's."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import HANG_S
from support.tiny import ROOT

from fulmen.launch.cluster import ClusterConfig
from fulmen.launch.submit import Run, SlurmConfig, SubmitConfig, render_environment, render_job
from fulmen.launch.sweep import Point

pytestmark = pytest.mark.fast

# Each call of srun does the next line of the scenario, which may end with an exit.
SRUN = """#!/bin/bash
words="srun $*"; echo "${words//[$'\\n']/ }" >>calls
line=$(head -n1 scenario); sed -i 1d scenario
eval "$line"
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "-o show node"*) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
  "show hostnames"*) printf 'n1\\nn2\\n' ;;
  requeue*) echo "$*" >>calls; kill -TERM $PPID ;;
esac
"""
SBATCH = """#!/bin/bash
echo "sbatch $* FULMEN_REPLACED=$FULMEN_REPLACED" >>calls
echo 8
"""
GOOD = "true"


@dataclass
class Outcome:
    code: int
    output: str
    calls: list[str]

    @property
    def starts(self) -> int:
        """Of training."""
        return sum("torch.distributed.run" in call for call in self.calls)


class Job:
    """A script in a folder of its own; the run's folder is `run` in it."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.here = self.run / "slurm" / "1"
        (self.run / "checkpoints").mkdir(parents=True)
        self.here.mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        slurm = SlurmConfig(**({"nodes": 2, "time": "1:00:00"} | changes))  # type: ignore[arg-type]
        cluster = ClusterConfig(gpus_per_node=0)
        (self.here / "environment.sh").write_text(render_environment(cluster, self.here))
        (self.here / "job.sh").write_text(
            render_job(slurm, cluster, self.runs(), self.here, ["a=b c"])
        )

    def runs(self) -> list[Run]:
        """Of the submission."""
        return [Run("run", self.run, SubmitConfig(), None, "", None)]

    def start(self, *scenario: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "scenario").write_text("".join(f"{line}\n" for line in scenario))
        variables = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n[1-2]"}
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(self.here / "job.sh")],
            cwd=self.folder,
            env=os.environ | variables | {"PATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        output, _ = process.communicate(timeout=HANG_S)
        calls = self.folder / "calls"
        said = calls.read_text().splitlines() if calls.exists() else []
        return Outcome(process.returncode, output, said)

    def go(self, *scenario: str, **environment: str) -> Outcome:
        return self.finish(self.start(*scenario, **environment))

    def wait_for_training(self) -> None:
        """Until its `touch begun` is done."""
        deadline = time.monotonic() + HANG_S
        while not (self.folder / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_while(self, process: subprocess.Popen[str], number: int) -> None:
        self.wait_for_training()
        process.send_signal(number)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_run_to_its_end(job: Job) -> None:
    done = job.go(GOOD, "touch run/DONE")
    assert done.code == 0
    assert len(done.calls) == 2
    assert "nodes=[n1,n2] address=10.0.0.1" in done.calls[0]
    # Longer than a preflight takes to find out that a node hangs.
    assert f"--wait={180 + 2 * 180 + 120} --kill-on-bad-exit=0" in done.calls[0]
    assert "--wait=60" in done.calls[1]
    assert done.calls[1].endswith("_ a=b c")
    again = job.go("touch never")
    assert again.code == 0
    assert "is done" in again.output
    assert again.calls == done.calls


WAIT = "touch begun; while [ ! -e run/STOP ]; do sleep 0.05; done; sleep 0.2"


def test_before_the_time_limit_it_stops_and_is_requeued(job: Job) -> None:
    process = job.start(GOOD, WAIT)
    job.signal_while(process, signal.SIGUSR1)
    done = job.finish(process)
    assert done.calls[-1] == "requeue 7"
    assert "USR1: the run saves and stops" in done.output
    assert not (job.run / "STOP").exists()


def test_requeues_are_limited(job: Job) -> None:
    process = job.start(GOOD, WAIT, SLURM_RESTART_COUNT="20")
    job.signal_while(process, signal.SIGUSR1)
    done = job.finish(process)
    assert done.code == 0
    assert "requeue 7" not in done.calls
    assert "slurm.requeues=20: submit again to go on" in done.output


def test_a_chain_hands_over(tmp_path: Path) -> None:
    job = Job(tmp_path, chain=2)
    process = job.start(GOOD, WAIT)
    job.signal_while(process, signal.SIGUSR1)
    done = job.finish(process)
    assert done.code == 0
    assert "requeue 7" not in done.calls
    assert not (job.run / "STOP").exists()


def test_a_stop_by_hand_holds_for_the_jobs_after_it(job: Job) -> None:
    process = job.start(GOOD, WAIT)
    job.wait_for_training()  # before it, the script may take the file away
    (job.run / "STOP").touch()
    done = job.finish(process)
    assert done.code == 0
    again = job.go("touch never")
    assert "somebody made" in again.output
    assert again.calls == done.calls
    # One that a job made, and could not take away, does not.
    (job.run / "STOP").write_text("job 6: time limit\n")
    assert job.go(GOOD, "touch run/DONE").code == 0


def test_cancelled_is_not_begun_again(job: Job) -> None:
    process = job.start(GOOD, "touch begun; sleep 0.3; false")
    job.signal_while(process, signal.SIGTERM)
    done = job.finish(process)
    assert done.code == 143
    assert done.starts == 1
    assert "ended by TERM" in done.output


def test_failures_start_again_until_nothing_is_saved_between_them(job: Job) -> None:
    saves = [f"ln -sfn step_{n} run/checkpoints/latest; false" for n in range(3)]
    scenario = [line for save in [*saves, *["exit 1"] * 4] for line in (GOOD, save)]
    done = job.go(*scenario)
    assert done.code == 1
    # Three that saved, of which the last counts as one, and three more.
    assert done.starts == 6
    assert "FAILED 4 times with nothing saved in between" in done.output


def test_a_run_that_ends_before_its_end_is_left_alone(job: Job) -> None:
    done = job.go(GOOD, GOOD)
    assert (done.code, done.starts) == (0, 1)
    assert "its train.log says why" in done.output


BAD = "echo n2 >run/slurm/1/bad_nodes; exit 3"


def test_a_job_without_the_bad_nodes_takes_over(tmp_path: Path) -> None:
    job = Job(tmp_path, exclude="n9")
    done = job.go(BAD, FULMEN_EXCLUDED="n5", FULMEN_REPLACED="1")
    assert done.code == 3
    assert "BAD NODES: n2" in done.output
    assert done.calls[-1] == (
        f"sbatch --parsable --export=ALL --exclude=n9,n5,n2 {job.here}/job.sh FULMEN_REPLACED=2"
    )


def test_the_clusters_lines_may_read_what_is_not_set(job: Job) -> None:
    cluster = ClusterConfig(gpus_per_node=0, setup=["export NEW_PATH=/opt/lib:$NEVER_SET"])
    (job.here / "environment.sh").write_text(render_environment(cluster, job.here))
    done = job.go("echo $NEW_PATH >run/seen", "touch run/DONE")
    assert done.code == 0, done.output
    assert (job.run / "seen").read_text() == "/opt/lib:\n"


@pytest.mark.parametrize("why", ["told", "all", "often"])
def test_no_job_takes_over(why: str, tmp_path: Path) -> None:
    job = Job(tmp_path, leave_out_bad=why != "told")
    bad = "echo n1 >run/slurm/1/bad_nodes; " + BAD.replace(">", ">>") if why == "all" else BAD
    done = job.go(bad, FULMEN_REPLACED="20" if why == "often" else "0")
    assert done.code == 3
    assert len(done.calls) == 1


SQUEUE = '#!/bin/bash\necho "squeue $*" >>calls; cat queue\n'
TASK = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NAME": "sweep"}


class Task(Job):
    """Task 1 of an array of two."""

    def runs(self) -> list[Run]:
        (self.folder / "squeue").write_text(SQUEUE)
        (self.folder / "squeue").chmod(0o755)
        (self.here / "seed_1").mkdir()
        points = [Point(f"seed_{n}", (f"seed={n}",)) for n in (0, 1)]
        folders = [self.folder / "other", self.run]
        return [
            Run(f"x-{point.name}", folder, SubmitConfig(), point, "", None)
            for point, folder in zip(points, folders, strict=True)
        ]


def test_a_task_of_an_array_is_a_run_of_its_own(tmp_path: Path) -> None:
    task = Task(tmp_path, sweep={"seed": [0, 1]}, sweep_at_once=1)
    script = (task.here / "job.sh").read_text()
    assert "#SBATCH --array=0-1%1\n" in script
    assert "singleton" not in script.partition("\n\n")[0]
    process = task.start(GOOD, WAIT, **TASK)
    task.signal_while(process, signal.SIGUSR1)
    done = task.finish(process)
    assert f"output={task.here}/seed_1 " in done.calls[0]
    assert done.calls[1].endswith("_ a=b c run_id=x-seed_1 seed=1")
    # By the array's id and the task's number: the former alone is all of them.
    assert done.calls[2] == "requeue 6_1"


@pytest.mark.parametrize("queued", ["6 0\n6 1\n9 0\n", "6 1\n9 1\n"])
def test_a_task_without_the_bad_nodes_takes_over_unless_one_waits(
    queued: str, tmp_path: Path
) -> None:
    task = Task(tmp_path, sweep={"seed": [0, 1]})
    (tmp_path / "queue").write_text(queued)
    done = task.go(BAD.replace("slurm/1/", "slurm/1/seed_1/"), **TASK)
    assert done.code == 3
    assert done.calls[1] == f"squeue -h -r --user={os.geteuid()} -n sweep -o %F %K"
    if "9 1" in queued:
        assert "the next job of this run goes on" in done.output
        assert len(done.calls) == 2
    else:
        words = "--parsable --export=ALL --array=1 --dependency=afterany:6_1 --exclude=n2"
        assert done.calls[2] == f"sbatch {words} {task.here}/job.sh FULMEN_REPLACED=1"


def test_the_templates_shell_has_no_mistakes() -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / "job.sh"], check=True)
