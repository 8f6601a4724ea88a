"""Rewards: completions against gold answers, by math-verify in processes that can be killed.

String code decides most answers here. What is left goes to worker processes (`grading.py`), one answer at a time, each
under a CPU limit that the worker's kernel enforces and a wall-clock deadline that this side enforces. Whatever happens
to an answer, it gets a `Verdict`, and the pool is whole again for the next one. See `docs/verifier.md`.
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
from dataclasses import dataclass

from nemo_ssopd.rollout import grading

REASONS = {
    "correct": "equal to the gold answer: the only reason with reward 1",
    "wrong": "not equal to the gold answer, or not mathematics",
    "no_box": r"no balanced, non-empty \boxed{...}",
    "too_long": "every box holds more than 512 characters",
    "refused": "control characters, a dangerous form (huge powers, deep nesting), or a restated sum or integral",
    "timeout": "ran past the CPU limit or the wall-clock deadline; the process was killed",
    "memory": "ran out of the address space it may use",
    "crash": "the process died on this answer",
}

START_TIMEOUT_S = 120.0  # importing math-verify takes one second, on a loaded file system far more
ATTEMPTS = 3  # for a process that dies while it starts or waits, which no answer can cause
CLOSE_TIMEOUT_S = 2.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TMPDIR")


@dataclass(frozen=True)
class Verdict:
    r"""The reward of one completion.

    Example: the completion `so \boxed{\frac{2}{4}}` against the gold `0.5` gives
    `Verdict(reward=1.0, reason="correct", answer="\\frac{2}{4}")`.
    """

    reward: float
    reason: str  # a key of REASONS
    answer: str | None  # the text of the last balanced box, None when there is none


class MathVerifier:
    """A pool of `workers` grading processes. `grade` may be called from any thread.

    timeout_s: wall-clock seconds one answer may take before its process is killed.
    cpu_s: CPU seconds one answer may take; this is the limit that normally ends a hang, since it does not depend on
        how busy the machine is.
    memory_gb: address space of one process.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_gb: float = 3.0, cpu_s: float = 1.5) -> None:
        _check("workers", workers, isinstance(workers, int) and workers >= 1, "use a whole number, at least 1")
        _check("timeout_s", timeout_s, 0 < timeout_s < float("inf"), "use a positive number of seconds, such as 5.0")
        _check("cpu_s", cpu_s, 0.01 <= cpu_s < float("inf"), "use a number of seconds from 0.01 up, such as 1.0")
        _check("memory_gb", memory_gb, 0.5 <= memory_gb < 1e6, "use at least 0.5: sympy alone needs half of that")
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._all = [_Worker(timeout_s, int(memory_gb * 2**30), cpu_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    def grade(self, completions: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict per completion. Equal answers to equal golds are graded once."""
        _check_texts(completions, golds)
        extracted = [grading.last_box(completion) for completion in completions]
        canonical_golds = {gold: grading.canonical(gold_text(gold)) for gold in set(golds)}
        sides = [
            grading.aligned(grading.canonical(answer), canonical_golds[gold])
            for (answer, _), gold in zip(extracted, golds, strict=True)
            if answer is not None
        ]
        reasons = {pair: grading.decide(*pair) for pair in dict.fromkeys(sides)}
        undecided = [pair for pair, reason in reasons.items() if not reason]
        reasons.update(zip(undecided, self._threads.map(self._ask, undecided), strict=True))
        remaining = iter(sides)
        return [
            _verdict(reason if answer is None else reasons[next(remaining)], answer) for answer, reason in extracted
        ]

    def check_golds(self, golds: Sequence[str]) -> list[int]:
        """Indices of the golds that sympy cannot use: only an answer spelled the same will ever be correct."""
        _check_texts(golds, golds)
        sides = [grading.canonical(gold_text(gold)) for gold in golds]
        to_parse = [side for side in dict.fromkeys(sides) if side and not grading.is_dangerous(side)]
        reasons = self._threads.map(self._ask, [(side, side) for side in to_parse])
        usable = {side for side, reason in zip(to_parse, reasons, strict=True) if reason == "correct"}
        return [index for index, side in enumerate(sides) if side not in usable]

    def close(self) -> None:
        """End the processes; answers being graded in other threads are finished first."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.hang_up()
        for worker in self._all:
            worker.close()

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, sides: tuple[str, str]) -> str:
        worker = self._idle.get()
        try:
            return worker.grade(*sides)
        finally:
            self._idle.put(worker)


def gold_text(gold: str) -> str:
    r"""The gold without a surrounding `\boxed{}`, where the dataset kept one."""
    return grading.last_box(gold)[0] or gold


def _verdict(reason: str, answer: str | None) -> Verdict:
    return Verdict(reward=1.0 if reason == "correct" else 0.0, reason=reason, answer=answer)


def _check(name: str, value: float, is_valid: bool, remedy: str) -> None:
    if not is_valid:
        raise ValueError(f"MathVerifier: {name} is {value!r}; {remedy}")


def _check_texts(completions: Sequence[str], golds: Sequence[str]) -> None:
    for name, texts in (("completions", completions), ("golds", golds)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one string, {texts[:40]!r}; pass a list of strings")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{index}] is {text!r}, a {type(text).__name__}; pass strings")
    if len(completions) != len(golds):
        raise ValueError(f"completions has {len(completions)} items and golds has {len(golds)}; pass one gold each")
    for index, gold in enumerate(golds):
        if not gold.strip():
            raise ValueError(f"golds[{index}] is {gold!r}; drop the problems that have no answer")


# ------------------------------------------------------------------------------------------------ one worker process


class _Worker:
    """One grading process, replaced when it is killed or dies. Used by one thread at a time."""

    def __init__(self, timeout_s: float, memory_bytes: int, cpu_s: float) -> None:
        self._timeout_s = timeout_s
        self._arguments = [str(os.getpid()), str(memory_bytes), str(cpu_s)]
        self._start()

    def grade(self, answer: str, gold: str) -> str:
        for _ in range(ATTEMPTS):
            self._wait_until_ready()
            try:
                grading.write_message(self._requests, {"answer": answer, "gold": gold})
                reply = self._read(time.monotonic() + self._timeout_s)
            except TimeoutError:
                self._restart()
                return "timeout"
            except OSError:
                reply = None
            if reply is not None:
                return str(reply["reason"])
            self._restart()  # the worker itself is gone, not the child that grades: ask a new one
        return "crash"

    def hang_up(self) -> None:
        """Close the pipe: the worker ends its child, then itself, which leaves nobody an orphan to reap."""
        self._process.stdin.close()  # type: ignore[union-attr]

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._kill()

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        # By path, not by module name: the worker must not import this package, and -P keeps our folder off its path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", grading.__file__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # a process group of its own, which Ctrl-C spares and one kill ends
        )
        self._requests = self._process.stdin.fileno()  # type: ignore[union-attr]
        self._replies = self._process.stdout.fileno()  # type: ignore[union-attr]
        self._ready = False

    def _wait_until_ready(self) -> None:
        for _ in range(ATTEMPTS):
            if self._ready:
                return
            hello = None
            with contextlib.suppress(TimeoutError):
                hello = self._read(time.monotonic() + START_TIMEOUT_S)
            if hello is None:
                self._restart()
            elif "error" in hello:
                raise RuntimeError(f"verifier worker cannot start: {hello['error']}; check math-verify and memory_gb")
            else:
                self._ready = True
        if not self._ready:
            raise RuntimeError(f"verifier worker died {ATTEMPTS} times while starting; check memory_gb and free memory")

    def _read(self, deadline: float) -> dict[str, object] | None:
        """The next message, None if the process is gone; TimeoutError at the deadline."""

        def read(fd: int, size: int) -> bytes:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            return os.read(fd, size)

        return grading.read_message(self._replies, read)

    def _restart(self) -> None:
        self._kill()
        self._start()

    def _kill(self) -> None:
        if self._process.returncode is None:  # not yet reaped, so the group's number is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()  # type: ignore[union-attr]
