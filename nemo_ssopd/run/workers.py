"""The worker processes of one node, as torchrun would start them, but for what a cluster asks for.

Stop signals reach the workers, which take the time that they need; their exit code comes out; a worker that fails ends
the others within seconds; and none outlives this process, however it ends.
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
"""What the others get, to end by themselves, when the first worker has failed, or has stopped as it was asked to."""
POLL_S = 0.1
RUN_FILES = ("metrics.jsonl", "checkpoints", "table.json")
"""What only a run or an evaluation of ours has in its folder."""
PR_SET_PDEATHSIG = 1

_prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec nothing may be loaded


@dataclass(frozen=True)
class Ending:
    """How the workers ended. `code` is 0, the exit code of the first to fail, or 128 + N when signal N killed it."""

    code: int
    rank: int = 0
    """The first to fail."""

    @property
    def signal(self) -> signal.Signals | None:
        return signal.Signals(self.code - 128) if self.code > 128 else None


def under_launcher() -> bool:
    """Whether a launcher, ours or torchrun, or srun with several tasks, started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def make_run_dir(run_dir: str) -> None:
    """The folder, for its owner's eyes only. One that others may read is closed to them, unless it is shared space."""
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
    """`python -m module arguments` in parallel.world_size processes that can form one process group; waits for them."""
    from torch.distributed import TCPStore  # noqa: PLC0415 -- a checked config may need no worker

    # Served here, as torchrun does, so that no port can be taken between choosing and using it; unlike there, and as
    # for gloo below, on the loopback interface alone: the protocol believes whoever reaches it.
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
    # Workers start with the signals held back, until they listen; so does this process, until it knows all of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        for rank in range(parallel.world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of its own a worker gets Ctrl-C from us, once, and not from the terminal too.
            workers.append(
                subprocess.Popen(command, env=environment | own, start_new_session=True, preexec_fn=_die_with_parent)
            )
        for number in received:  # before this function had its handlers
            pass_on(number, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return _wait(workers)
    finally:
        _kill(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: a worker must not go on where nobody waits for it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(workers: list[subprocess.Popen[bytes]]) -> Ending:
    """Until all have ended well, or one has failed and the others have had their grace."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return Ending(0)
        time.sleep(POLL_S)
    # One that was killed has left no message, and what the others could say is only that it is gone.
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
