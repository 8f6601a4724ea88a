"""The decision to stop before the next step, by stop signals and the time budget; all ranks agree on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from nemo_ssopd.run import signals
from nemo_ssopd.run.alarms import UnhealthyRun

BUDGET = 1  # shares a tensor with signal numbers; 1 is SIGHUP, which is not one of STOP_SIGNALS


class TimeBudget:
    """The time that this run may take: trainer.time_budget_minutes, and the end of the SLURM job where it is known.

    Minutes count from the start of the SLURM job, or else from now. The wall clock is read once, here; after that the
    monotonic clock counts.
    """

    def __init__(self, minutes: float, environment: Mapping[str, str] = os.environ) -> None:
        now, ends = time.time(), []
        if minutes:
            ends.append(float(environment.get("SLURM_JOB_START_TIME", now)) + 60 * minutes)
        if "SLURM_JOB_END_TIME" in environment:
            ends.append(float(environment["SLURM_JOB_END_TIME"]))
        self._deadline = time.monotonic() + min(ends) - now if ends else float("inf")
        self._longest_step_s = 0.0
        self._step_started: float | None = None

    def step_begins(self) -> None:
        """Measure the longest step, its save and evaluation included. Call this before every step."""
        now = time.monotonic()
        if self._step_started is not None:
            self._longest_step_s = max(self._longest_step_s, now - self._step_started)
        self._step_started = now

    def is_over(self) -> bool:
        """Tell whether less time is left than twice the longest step so far."""
        return self._deadline - time.monotonic() < 2 * self._longest_step_s


def agree_to_stop(budget: TimeBudget, group: dist.ProcessGroup, *, has_progressed: bool) -> str | None:
    """Return the reason to stop before the next step, or None to go on; the same on every rank of the gloo `group`.

    SIGUSR1 is SLURM's warning of the time limit. When it arrives before the first step, the allocation may be shorter
    than the warning time. One step is taken all the same: a job that is requeued each time would make no progress.
    UnhealthyRun when the time budget is used up before the first step.
    """
    budget.step_begins()
    wanted = [int(number) for number in signals.received if has_progressed or number != signal.SIGUSR1]
    reason = torch.tensor(max([*wanted, BUDGET * budget.is_over()]))
    dist.all_reduce(reason, op=dist.ReduceOp.MAX, group=group)
    if reason == BUDGET and not has_progressed:
        raise UnhealthyRun(
            "the time budget was over before the first step was: give the job more time, or raise "
            "trainer.time_budget_minutes"
        )
    if reason == BUDGET:
        return "the time budget is used up"
    return f"{signal.Signals(int(reason)).name} came" if reason else None
