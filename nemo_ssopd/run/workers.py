"""Start and watch the worker processes of one node, like torchrun, with the behavior that a cluster needs.

Stop signals are passed on to the workers, which take the time that they need. Their exit code is returned. A worker
that fails ends the others within seconds. No worker outlives this process, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.run.signals import EXIT_STOPPED, STOP_SIGNALS, received

GRACE_S = {"failed": 5.0, "stopped": 60.0}
"""Seconds the other workers get to end by themselves after the first one failed, or stopped on request."""
POLL_S = 0.1
RUN_FILES = ("metrics.jsonl", "checkpoints", "table.json")
"""Names by which a folder is known to hold a run or an evaluation."""
PR_SET_PDEATHSIG = 1

_prctl = ctypes.CDLL(None).prctl  # looked up here: nothing may be loaded between fork and exec


@dataclass(frozen=True)
class Ending:
    """The end of all workers. `code` is 0, the exit code of the first to fail, or 128 + N if signal N killed it."""

    code: int
    rank: int = 0
    """The first rank to fail."""

    @property
    def signal(self) -> signal.Signals | None:
        return signal.Signals(self.code - 128) if self.code > 128 else None


def under_launcher() -> bool:
    """Tell whether our launcher, torchrun, or srun with several tasks started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def make_run_dir(run_dir: str) -> None:
    """Create a folder that only its owner can read, mode 0700; an existing run's folder is closed to others.

    ValueError when the folder cannot be made, or is open to others and holds files that are not a run's.
    """
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.stat().st_mode & 0o077:
            if any(path.iterdir()) and not any((path / name).exists() for name in RUN_FILES):
                raise ValueError(
                    f"run_dir={run_dir!r} is open to other users and holds files that are not a run's: give a folder "
                    f"of its own, or close it with chmod 700"
                )
            path.chmod(0o700)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir!r} cannot be made ({error.strerror}): give a folder to write to") from error


def run_workers(parallel: ParallelConfig, module: str, arguments: Sequence[str]) -> Ending:
    """Run `python -m module arguments` in parallel.world_size processes and wait for them.

    The processes can form one process group.
    """
    from torch.distributed import TCPStore  # noqa: PLC0415 -- a checked config may need no worker

    # This process serves the store, as torchrun does, so the port cannot be taken between choosing and using it.
    # Unlike torchrun, it listens on the loopback interface only, like gloo below: the protocol has no authentication.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    environment = {
        "OMP_NUM_THREADS": str(parallel.threads),
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "WORLD_SIZE": str(parallel.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = [sys.executable, "-m", module, *arguments]
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in passed_on
        passed_on.add(number)
        for worker in workers:
            worker.send_signal(signal.SIGKILL if again else number)

    passed_on: set[int] = set()
    # Workers start with the stop signals blocked, until they have handlers; this process, until all have started.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        for rank in range(parallel.world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In its own session a worker gets Ctrl-C once, from this process, and not from the terminal too.
            workers.append(
                subprocess.Popen(command, env=environment | own, start_new_session=True, preexec_fn=_die_with_parent)
            )
        for number in received:  # arrived before the handlers above were set
            pass_on(number, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return _wait(workers)
    finally:
        _kill(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(workers: list[subprocess.Popen[bytes]]) -> Ending:
    """Wait until all have ended well, or one has failed and the others have had GRACE_S to end."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return Ending(0)
        time.sleep(POLL_S)
    # A worker that was killed left no message, and the others could only say that it is gone: do not wait for them.
    rank, code = next(((rank, code) for rank, code in failed if code < 0), failed[0])
    grace = 0.0 if code < 0 else GRACE_S["stopped" if code == EXIT_STOPPED else "failed"]
    deadline = time.monotonic() + grace
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    _kill(workers)
    return Ending(code if code > 0 else 128 - code, rank)


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.kill()
        worker.wait()
