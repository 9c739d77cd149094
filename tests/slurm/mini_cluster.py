"""A throw-away SLURM cluster: one controller and several slurmd "nodes" on 127.0.0.1."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
UP_S = 60.0
"""Time limit for all nodes to be idle."""

_CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=20
MinJobAge=600
JobRequeue=1
SlurmdTimeout=300
InactiveLimit=0
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
_NODE = (
    "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000"
)


def why_no_slurm() -> str:
    """Why there is no SLURM on this machine, after a try to install it; empty if there is."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return ""
    lacks = f"{', '.join(missing)} are missing, and cannot be installed: "
    if shutil.which("apt-get") is None:
        return f"{lacks}there is no apt-get"
    if os.geteuid() != 0:
        return f"{lacks}that needs root (apt-get install {' '.join(PACKAGES)})"
    print("installing SLURM's Debian packages", file=sys.stderr)
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    said = ""
    for command in (["apt-get", "update", "-q"], install):
        try:
            done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"{lacks}{' '.join(command[:2])} took more than 300 s"
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
    if any(shutil.which(name) is None for name in PROGRAMS):
        return f"{lacks}apt-get install says {said!r}"
    return ""


class MiniCluster:
    """Daemons in the foreground as children of this process, all below one folder."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        for name in ("state", "spool", "log", "run"):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(nodes + 1)
        lines = [_NODE.format(i=i + 1, host=host, port=own) for i, own in enumerate(ports)]
        (folder / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                user="root" if os.geteuid() == 0 else os.environ.get("USER", "nobody"),
                port=port,
                folder=folder,
                nodes="\n".join(lines),
                count=nodes,
            )
        )
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in list(self.environment):  # pytest may itself run in a job
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
                del self.environment[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        self.wait_for(lambda: self.states() == ["idle"] * len(self.nodes), UP_S, "idle nodes")

    def down(self) -> None:
        """End every job and every daemon."""
        subprocess.run(["scancel", "--full", "--user=" + _user()], env=self.environment, timeout=30)
        deadline = time.monotonic() + 30
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, timeout_s: float = 60) -> str:
        """The output of a command of SLURM's."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        """State of each node."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.split()

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.call("squeue", "-h", "-o", "%A").split()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_for(self, holds: Callable[[], bool], limit_s: float, what: str) -> None:
        """Wait until something holds; an `AssertionError` with the logs' ends if it never does."""
        deadline = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline:
                logs = sorted((self.folder / "log").iterdir())
                said = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in logs)
                raise AssertionError(f"no {what} within {limit_s:.0f} s\n{said}")
            time.sleep(0.3)

    def _start(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                )
            )


def _free_ports(count: int) -> list[int]:
    """Different TCP ports that nobody listens on."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _user() -> str:
    return str(os.geteuid())
