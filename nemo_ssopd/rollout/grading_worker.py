"""The worker side of a grading pool: load one task, and run it in forked children with limits on CPU time and memory.

The worker imports what the task needs once, and never runs it. A forked child runs it, one request after the other. The
kernel kills a child that is out of CPU time (SIGPROF), even inside one long C call. A child that segfaults dies alone.
The next child is forked in milliseconds from the same warm image, while a new process would import for a second. A
child is also replaced after `REQUESTS_PER_CHILD`, which bounds its caches.

    trainer <-- length-prefixed JSON over pipes --> worker <-- the same over a socket pair --> child

The reply to a request is the task's, or {"reason": "timeout" | "memory" | "crash"} if the child died before it could
reply. `grading_pool.py` is the trainer's side.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from nemo_ssopd.rollout.answers import math_verify_task
from nemo_ssopd.rollout.user_function import user_function_task

Message: TypeAlias = dict[str, Any]
Task: TypeAlias = Callable[[Message], Message]
"""A function that answers a request. It may hang, crash and leak. It must let MemoryError propagate."""

TASKS: dict[str, Callable[..., Task]] = {"math_verify": math_verify_task, "user_function": user_function_task}
"""Functions by name that load a task with all its imports. The user sees the errors that they raise."""

REQUESTS_PER_CHILD = 256
OUT_OF_MEMORY = 12  # exit code of a child
KILLED = "killed"  # by a SIGKILL from outside: no limit of ours sends it to a child
ATTEMPTS = 3  # for a request whose child was killed from outside
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a cluster sends them to all processes of a job


# ------------------------------------------------------------------------------------------------ messages


def write_message(fd: int, message: Message, write: Callable[[int, bytes], int] = os.write) -> None:
    payload = json.dumps(message).encode("ascii")  # ASCII escapes carry any string, lone surrogates included
    data = struct.pack("!I", len(payload)) + payload
    while data:
        data = data[write(fd, data) :]


def read_message(fd: int, read: Callable[[int, int], bytes] = os.read) -> Message | None:
    """Return the next message, or None at end of file."""
    header = _read_exactly(fd, 4, read)
    payload = header and _read_exactly(fd, struct.unpack("!I", header)[0], read)
    return json.loads(payload) if payload else None


def _read_exactly(fd: int, size: int, read: Callable[[int, int], bytes]) -> bytes | None:
    chunks, missing = [], size
    while missing:
        chunk = read(fd, missing)
        if not chunk:
            return None
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)


# ------------------------------------------------------------------------------------------------ one child


class Child:
    """A forked process that runs the task until it is killed or closed."""

    def __init__(self, task: Task, cpu_s: float) -> None:
        ours, theirs = socket.socketpair()
        self.requests = 0
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            try:
                _run_until_closed(theirs.fileno(), task, cpu_s)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours

    def ask(self, request: Message) -> tuple[Message, bool]:
        """Return the reply, and whether the child is still alive."""
        self.requests += 1
        reply = None
        with contextlib.suppress(OSError):  # killed before it could read, or while it wrote
            write_message(self._socket.fileno(), request)
            reply = read_message(self._socket.fileno())
        return (reply, True) if reply is not None else ({"reason": _reason(self.close())}, False)

    def close(self) -> int:
        """End the child, which must be idle or dead. Return its wait status."""
        self._socket.close()
        return os.waitpid(self._pid, 0)[1]


def _run_until_closed(fd: int, task: Task, cpu_s: float) -> None:
    while (request := read_message(fd)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF has no handler here: the kernel ends the process
        reply = task(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(fd, reply)


def _reason(status: int) -> str:
    """Return the reason why a child ended before it replied, from its wait status."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return "timeout"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return KILLED
    return "memory" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_MEMORY else "crash"


# ------------------------------------------------------------------------------------------------ the worker


def main(trainer_pid: str, memory_bytes: str, cpu_s: str, task: str, *arguments: str) -> None:
    """Load the task of this name under the limits, and serve it. If it cannot be loaded, send the error."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    requests, replies = os.dup(0), os.dup(1)
    # The protocol must not see what a task prints, and a program that the task starts must not read it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        loaded = TASKS[task](*arguments)
    except Exception as error:
        unnamed = f"{error!r}; check the installed packages and verifier.memory_gb"
        write_message(replies, {"error": str(error) if type(error) is ValueError else unnamed})
    else:
        serve(requests, replies, int(trainer_pid), loaded, float(cpu_s))
    finally:
        os.killpg(0, signal.SIGKILL)  # the pool gave us a process group: this also ends what a task left running


def serve(requests: int, replies: int, trainer_pid: int, task: Task, cpu_s: float) -> None:
    """Answer requests until the trainer closes the pipe or is gone."""

    def read_while_trainer_lives(fd: int, size: int) -> bytes:
        # A process forked from the trainer may hold the pipe open after the trainer's death: also check the parent.
        while not select.select([fd], [], [], 1.0)[0]:
            if os.getppid() != trainer_pid:
                return b""
        return os.read(fd, size)

    gc.collect()
    gc.freeze()  # the children's collector then does not touch, and so copy, the shared pages
    write_message(replies, {"ready": True})
    child: Child | None = None

    def ask(request: Message) -> Message:
        nonlocal child
        for _ in range(ATTEMPTS):
            if child is not None and child.requests >= REQUESTS_PER_CHILD:
                child.close()
                child = None
            child = child or Child(task, cpu_s)
            reply, lives = child.ask(request)
            if lives:
                return reply
            child = None
            if reply["reason"] != KILLED:
                return reply
        return {"reason": "crash"}

    while (request := read_message(requests, read_while_trainer_lives)) is not None:
        write_message(replies, ask(request))
    if child is not None:
        child.close()
