"""A SLURM of one node in a folder: real munged, slurmctld and slurmd, on free ports, gone at the end.

    with Cluster(folder) as cluster:
        job = cluster.submit("scripts/slurm/train.sbatch", "tiny_cpu", "run_dir=...")
        cluster.wait(job, "COMPLETED", timeout_s=300)

Two partitions share the node: jobs in `urgent` preempt those in `usual`, which then have a minute.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

PROCESSORS = 4  # as SLURM sees it: a job with the whole node then has a CPU for each of its two processes

SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={processors} State=UNKNOWN
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 DefaultTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF DefaultTime=5 MaxTime=60
"""


class Cluster:
    """Needs root, as munged and slurmd do, and Debian's slurm-wlm and munge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        host = socket.gethostname().partition(".")[0]
        for name, mode in (("munge", 0o700), ("state", 0o700), ("spool", 0o755)):
            (self.folder / name).mkdir(mode=mode)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        controller_port, node_port = _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            SETTINGS.format(
                host=host,
                folder=self.folder,
                controller_port=controller_port,
                node_port=node_port,
                processors=PROCESSORS,
            )
        )
        munge = self.folder / "munge"
        try:
            # A folder below a world-writable one, such as /tmp, is what --force is for.
            self._daemon(
                *("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}"),
                *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
            )
            until(lambda: (munge / "socket").exists(), 30, "munged did not start")
            self._daemon("slurmctld", "-D")
            self._daemon("slurmd", "-D")
            until(lambda: "idle" in self.run("sinfo", "--noheader", check=False), 60, "the node did not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all jobs, then the daemons, which run in the foreground and so leave nothing behind."""
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "--user=root", check=False)
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            deadline = time.monotonic() + 60
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(self, script: str, *arguments: str, **options: Any) -> int:
        """The job's number. Options as sbatch knows them, `partition="urgent"`."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return int(self.run("sbatch", "--parsable", *flags, script, *arguments))

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Its fields: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", str(number))))

    def wait(self, number: int, state: str, *, timeout_s: float) -> None:
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def is_there() -> bool:
            now = self.job(number)["JobState"]
            assert now == state or now not in final, f"job {number} is {now}, not {state}"
            return now == state

        until(is_there, timeout_s, f"job {number} did not become {state}")

    def _daemon(self, *command: str) -> None:
        log = open(self.folder / f"{command[0]}.out", "wb")
        # A session of its own: Ctrl-C in the terminal is for the test, which then ends them in order.
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )


def until(condition: Any, timeout_s: float, problem: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{problem} in {timeout_s} s"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
