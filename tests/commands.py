"""Run this project's commands as processes forked from a server that has imported everything.

    done = run_command("scripts/train_ssopd.py", "--config-name", "tiny_cpu", f"run_dir={folder}")
    assert done.returncode == 0, done.output

It does what `python scripts/train_ssopd.py ...` does, without 20 seconds of imports in every process. A process that
such a command starts with its own interpreter, like the workers of a launcher, is forked too; it gets the environment,
session, signals and streams that it would have had.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Self

from hydra.core.global_hydra import GlobalHydra

from nemo_ssopd.run import signals
from tests.distributed import server, start_process

ROOT = Path(__file__).parents[1]
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
BOUND_S = 400.0
"""Seconds that a command may take, on a busy machine."""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus the signal that killed it, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Command:
    """`python ARGUMENTS`, started in the repository's root, in a session of its own. Leaving its block kills it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
        self._files = [tempfile.TemporaryFile("w+", errors="replace") for _ in ("stdout", "stderr")]
        streams = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        self._leash, held = server.Pipe(duplex=False)
        self._process = start_process(_become, arguments, inherited | environment, streams, held)
        held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def printed(self) -> str:
        """Return its standard output so far, then its standard error."""
        return "".join(self._texts())

    def wait(self, timeout: float = BOUND_S) -> Done:
        """Return how it ended. TimeoutError, with what it printed, when it is not over by then."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"not over after {timeout:g} s: {self.printed()[-6000:]}")
        return Done(self._process.exitcode, *self._texts())

    def _texts(self) -> list[str]:
        for file in self._files:
            file.seek(0)
        return [file.read() for file in self._files]

    def leaves_nobody(self, timeout: float = 30.0) -> bool:
        """Return whether every process that was forked for this command ends within `timeout` seconds."""
        return self._leash.poll(timeout)  # the end of file: nobody holds the other end


def run_command(*arguments: str, **environment: str) -> Done:
    """Run `python ARGUMENTS` with these variables added to the environment, and return how it ended."""
    with Command(*arguments, **environment) as command:
        return command.wait()


# ---- In the forked processes -----------------------------------------------------------------------------------------


def _become(arguments: Sequence[str], environment: Mapping[str, str], streams: list[str], held: Connection) -> NoReturn:
    """Turn this process into `python ARGUMENTS`. Its forks inherit `held`, which shows that one of them lives."""
    os.setsid()
    os.chdir(ROOT)
    for target, stream in zip((sys.stdout, sys.stderr), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), target.fileno())
    subprocess.Popen = _Popen  # type: ignore[misc]
    _interpret(arguments, environment)


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Forks this process where it would start this interpreter on a module or script of this repository."""

    def _execute_child(  # type: ignore[override]
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *rest: Any
    ) -> None:
        if isinstance(args, str) or args[0] != sys.executable or not _is_ours(args[1:]):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        pipes, (start_new_session, _) = rest[3:9], rest[-2:]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if start_new_session:
                    os.setsid()
                if preexec_fn is not None:
                    preexec_fn()
                for number, descriptor in enumerate((pipes[0], pipes[3], pipes[5])):
                    if descriptor != -1:
                        os.dup2(descriptor, number)
                os.chdir(cwd or ".")
                _interpret(args[1:], os.environ if env is None else env)
            finally:
                os._exit(1)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _is_ours(arguments: Sequence[str]) -> bool:
    if arguments[0] == "-m":
        return arguments[1].split(".")[0] in ("nemo_ssopd", "tests", "benchmarks")
    return (ROOT / arguments[0]).resolve().is_relative_to(ROOT / "scripts")


def _interpret(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do what a new interpreter does with its command line, and end this process with its exit code."""
    os.environ.update(environment)  # on top of what the libraries set when they were imported
    _forget_signal_handlers()
    GlobalHydra.instance().clear()
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.modules.pop(arguments[1], None)
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _forget_signal_handlers() -> None:
    """As exec does: what is handled gets its default back, what is ignored or held back stays so."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.received.clear()
