"""A Slurm cluster of one node, this machine, while a context lasts: Debian's slurm-wlm and munge, on ports and files of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={home}/munge/socket,cred_expire=10
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
PlugStackConfig={home}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=300
ReturnToService=2
SlurmdTimeout=20
MessageTimeout=10
InactiveLimit=0
SlurmdParameters=config_overrides
GresTypes=gpu,npu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=3000 Gres=gpu:2,npu:2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 DefMemPerCPU=500
PartitionName=high Nodes={host} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF DefMemPerCPU=500
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if absent := [name for name in NEEDED if _where(name) is None]:
        return f"{absent[0]} is not installed: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "submitit is not installed: pip install longcat-lab[slurm]"
    return None


def _where(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Its folder, its environment for commands, and its daemons."""

    def __init__(self, home: Path) -> None:
        self.home, self.host = home, socket.gethostname().split(".")[0]
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout.strip()

    def start(self, name: str, *arguments: str) -> None:
        with open(self.home / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                [_where(name), *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, name: str) -> None:
        daemon = self.daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
        daemon.kill()
        daemon.wait()

    def said(self) -> str:
        """The end of what the daemons said."""
        logs = [self.home / f"{name}.log" for name in ("slurmctld", "slurmd")] + list(self.home.glob("*.out"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())


@contextlib.contextmanager
def running(home: Path) -> Iterator[Cluster]:
    """The cluster, once its node takes jobs."""
    cluster = Cluster(home)
    for name in ("munge", "state", "spool"):
        (home / name).mkdir(parents=True)
    (home / "munge/key").write_bytes(os.urandom(128))
    (home / "munge/key").chmod(0o600)
    with contextlib.ExitStack() as held:  # free ports, told apart while both are open
        first, second = (held.enter_context(socket.socket()) for _ in range(2))
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    (home / "slurm.conf").write_text(CONF.format(home=home, host=cluster.host, port=ports[0], other=ports[1]))
    (home / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\nName=npu Count=2\n")
    (home / "plugstack.conf").write_text("")
    try:
        munge = [f"--{what}={home}/munge/{what.split('-')[0]}" for what in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
        cluster.start("munged", "--foreground", "--force", *munge)
        _until(lambda: (home / "munge/socket").exists(), cluster)
        cluster.start("slurmctld", "-D", "-i", "-f", str(home / "slurm.conf"))
        cluster.start("slurmd", "-D", "-N", cluster.host, "-f", str(home / "slurm.conf"))
        _until(lambda: cluster.call("sinfo", "-h", "-p", "low", "-o", "%T") == "idle", cluster)
        yield cluster
    finally:
        for name in cluster.call("squeue", "--noheader", "--format=%i").split():
            cluster.call("scancel", "--signal=KILL", "--full", name)
            cluster.call("scancel", name)
        with contextlib.suppress(AssertionError):
            _until(lambda: not cluster.call("squeue", "--noheader", "--format=%i"), cluster, 15)
        for name in ("slurmd", "slurmctld", "munged"):
            cluster.stop(name)


def _until(condition: object, cluster: Cluster, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, cluster.said()
        time.sleep(0.1)
