"""The trainer's side of grading workers: a pool of processes that can be killed, one request at a time in each.

A request has a limit on CPU time, which the worker's kernel enforces. It also has a wall-clock deadline, which this
side enforces: it kills the worker's process group and starts another worker. Every request gets a reply.
`grading_worker.py` is the program at the other end.
"""

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_ssopd.rollout.grading_worker import Message, read_message, write_message

START_TIMEOUT_S = 120.0  # importing math-verify takes one second, but far more on a loaded file system
ATTEMPTS = 3  # for a worker that dies while it starts or waits: no request can cause that
CLOSE_TIMEOUT_S = 2.0
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TMPDIR")

# The worker imports this copy of the package, then takes our folder off its path. The trainer's main module and the
# current folder are not on it either. It imports neither torch nor the rest of the package.
_PACKAGE_ROOT = str(Path(__file__).parents[2])
_PROGRAM = """import sys
sys.path.insert(0, sys.argv[1])
from nemo_ssopd.rollout.grading_worker import main
del sys.path[0]
main(*sys.argv[2:])"""


class GradingPool:
    """A pool of `workers` processes that run the task of this name (see `grading_worker.TASKS`). Any thread may ask.

    timeout_s: wall-clock seconds one request may take before its process is killed.
    cpu_s: CPU seconds one request may take. This limit normally ends a hang, since it does not depend on how busy the
        machine is.
    memory_gb: address space of one process.

    The processes start in the background. If they cannot start, the first request raises RuntimeError.
    """

    def __init__(
        self, task: str, *arguments: str, workers: int, timeout_s: float, memory_gb: float, cpu_s: float
    ) -> None:
        _check("workers", workers, isinstance(workers, int) and workers >= 1, "use a whole number, at least 1")
        _check("timeout_s", timeout_s, 0 < timeout_s < float("inf"), "use a positive number of seconds, such as 5.0")
        _check("cpu_s", cpu_s, 0.01 <= cpu_s < float("inf"), "use a number of seconds from 0.01 up, such as 1.0")
        _check("memory_gb", memory_gb, 0.5 <= memory_gb < 1e6, "use at least 0.5: sympy alone needs half of that")
        command = [str(os.getpid()), str(int(memory_gb * 2**30)), str(cpu_s), task, *arguments]
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
        self._workers = [_Worker(command, timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def ask(self, requests: Sequence[Message]) -> list[Message]:
        """Return the replies in order. Each has a "reason", and nothing else if the request was killed."""
        return list(self._threads.map(self._ask, requests))

    def wait_until_ready(self) -> None:
        """Wait until one of the processes has loaded the task. RuntimeError when it cannot."""
        self._workers[0].wait_until_ready()

    def close(self) -> None:
        """End the processes, after the requests of other threads are finished."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.close()

    def _ask(self, request: Message) -> Message:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


def _check(name: str, value: float, is_valid: bool, remedy: str) -> None:
    if not is_valid:
        raise ValueError(f"grading pool: {name} is {value!r}; {remedy}")


# ------------------------------------------------------------------------------------------------ one worker process


class _Worker:
    """One worker process, replaced when it is killed or dies. One thread at a time uses it."""

    def __init__(self, arguments: Sequence[str], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ready = False
        self._command = [sys.executable, "-P", "-c", _PROGRAM, _PACKAGE_ROOT, *arguments]
        self._start()

    def ask(self, request: Message) -> Message:
        for _ in range(ATTEMPTS):
            self.wait_until_ready()
            deadline = time.monotonic() + self._timeout_s
            try:
                self._write(request, deadline)
                reply = self._read(deadline)
            except TimeoutError:
                self._restart()
                return {"reason": "timeout"}
            except OSError:
                reply = None
            if reply is not None:
                return reply
            self._restart()  # the worker itself is gone, not the child that ran the task: ask a new one
        return {"reason": "crash"}

    def hang_up(self) -> None:
        """Close the pipe. The worker then ends its child and after that itself, which leaves no orphan to reap."""
        self._process.stdin.close()  # type: ignore[union-attr]

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._kill()

    def wait_until_ready(self) -> None:
        for _ in range(ATTEMPTS):
            if self._ready:
                return
            hello = None
            with contextlib.suppress(TimeoutError):
                hello = self._read(time.monotonic() + START_TIMEOUT_S)
            if hello is None:
                self._restart()
            elif "error" in hello:
                raise RuntimeError(f"a grading worker cannot start: {hello['error']}")
            else:
                self._ready = True
        if not self._ready:
            raise RuntimeError(
                f"a grading worker died {ATTEMPTS} times while starting, or took over {START_TIMEOUT_S:.0f} s: check "
                f"verifier.memory_gb and free memory"
            )

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # its own process group: Ctrl-C does not reach it, and one kill ends it
        )
        self._requests = self._process.stdin.fileno()  # type: ignore[union-attr]
        self._replies = self._process.stdout.fileno()  # type: ignore[union-attr]
        os.set_blocking(self._requests, False)
        self._ready = False

    def _write(self, message: Message, deadline: float) -> None:
        """Send a message, in parts if the pipe is full. TimeoutError at the deadline."""

        def write(fd: int, data: bytes) -> int:
            _wait_for(fd, select.POLLOUT, deadline)
            return os.write(fd, data)

        write_message(self._requests, message, write)

    def _read(self, deadline: float) -> Message | None:
        """Return the next message, or None if the process is gone. TimeoutError at the deadline."""

        def read(fd: int, size: int) -> bytes:
            _wait_for(fd, select.POLLIN, deadline)
            return os.read(fd, size)

        return read_message(self._replies, read)

    def _restart(self) -> None:
        self._kill()
        self._start()

    def _kill(self) -> None:
        if self._process.returncode is None:  # not yet reaped, so no other process group has its number
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()  # type: ignore[union-attr]


def _wait_for(fd: int, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(fd, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
