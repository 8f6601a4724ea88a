"""The training command with a fault: FAULT="KIND RANK STEP STAGE" strikes rank RANK in that stage of that step.

    FAULT="hang 1 2 update" python -m tests.faults.injected --config-name tiny_cpu ...

A worker is this module too. Heartbeats are quick here, so that a test does not wait for minutes.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import psutil

from nemo_ssopd.run import launch, watchdog, workers
from nemo_ssopd.run.workers import under_launcher

KIND, RANK, STEP, STAGE = os.environ["FAULT"].split()

watchdog.INTERVAL_S, watchdog.SILENCE_S = 0.5, 10.0
HANG_LIMIT_S = 8.0

enter = watchdog.Watch.enter


def enter_and_suffer(watch: watchdog.Watch, stage: str, step: int | None = None) -> None:
    enter(watch, stage, step)
    here = watch.here()
    if KIND == "hang" and here.step == int(STEP):
        watch._limit_s = HANG_LIMIT_S  # only now: building the model may take longer on a busy machine
    if (here.stage, here.step) == (STAGE, int(STEP)) and here.rank == int(RANK):
        FAULTS[KIND]()


def hang() -> None:
    time.sleep(3600)


def fail() -> None:
    raise RuntimeError("injected")


def jump_clock() -> None:
    """The wall clock goes a day ahead, then two days back."""
    now, begin = time.time, time.monotonic()
    time.time = lambda: now() + (86400 if time.monotonic() - begin < 1 else -86400)


def break_engine() -> None:
    """From now on it generates nothing."""
    from nemo_ssopd.rollout.engine import LLM  # noqa: PLC0415 -- vLLM

    def gone(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the engine is gone")

    LLM.generate = gone


def kill_verifiers() -> None:
    """Every grading process of this rank, again and again for a while."""

    def strike() -> None:
        for _ in range(3):
            for child in psutil.Process().children(recursive=True):
                if any("grading" in word for word in child.cmdline()):
                    child.kill()
            time.sleep(0.5)

    threading.Thread(target=strike).start()


def kill_verifiers_and_jump_clock() -> None:
    kill_verifiers()
    jump_clock()


FAULTS = {
    "none": lambda: None,
    "hang": hang,
    "fail": fail,
    "clock_and_verifiers": kill_verifiers_and_jump_clock,
    "engine": break_engine,
}


if __name__ == "__main__":
    if under_launcher():
        watchdog.Watch.enter = enter_and_suffer
    launch.run_workers = lambda parallel, module, arguments: workers.run_workers(
        parallel, "tests.faults.injected", arguments
    )
    launch.main()
