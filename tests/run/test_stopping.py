"""Budgets and stop signals, as all ranks agree on them."""

from __future__ import annotations

import signal
import time

import pytest
import torch.distributed as dist

from nemo_ssopd.run import signals, stopping
from nemo_ssopd.run.alarms import UnhealthyRun
from nemo_ssopd.run.stopping import TimeBudget
from tests.distributed import run_distributed


class Clock:
    """Both clocks of a machine, to be set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.monotonic = 1_000_000.0, 500.0
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "monotonic", lambda: self.monotonic)

    def advance(self, seconds: float) -> None:
        self.wall, self.monotonic = self.wall + seconds, self.monotonic + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def steps_within(budget: TimeBudget, clock: Clock, seconds: float) -> int:
    for step in range(1000):
        budget.step_begins()
        if budget.is_over():
            return step
        clock.advance(seconds)
    return 1000


def test_a_budget_counts_from_the_start_of_the_allocation_and_leaves_room_for_two_steps(clock: Clock) -> None:
    job = {"SLURM_JOB_START_TIME": str(clock.wall - 120)}
    assert steps_within(TimeBudget(10, job), clock, 60) == 7  # 8 minutes are left; at 7, one step is, which may not do
    clock.advance(3600)
    assert steps_within(TimeBudget(10, {}), clock, 60) == 9
    assert steps_within(TimeBudget(0, {}), clock, 60) == 1000
    assert steps_within(TimeBudget(0, {"SLURM_JOB_END_TIME": str(clock.wall + 600)}), clock, 60) == 9
    assert steps_within(TimeBudget(5, {"SLURM_JOB_END_TIME": str(clock.wall + 600)}), clock, 60) == 4


def test_a_clock_that_jumps_does_not_change_the_budget(clock: Clock) -> None:
    budget = TimeBudget(10, {})
    clock.wall += 86400
    assert steps_within(budget, clock, 60) == 9


def agreed(first: list[int], second: list[int], has_progressed: bool, over: bool) -> str | None:
    dist.init_process_group("gloo")
    signals.received[:] = [signal.Signals(number) for number in (first, second)[dist.get_rank()]]
    try:
        budget = TimeBudget(0, {"SLURM_JOB_END_TIME": str(time.time() - 1)} if over and dist.get_rank() == 0 else {})
        return stopping.agree_to_stop(budget, dist.group.WORLD, has_progressed=has_progressed)
    except UnhealthyRun as error:
        return f"error: {error}"
    finally:
        dist.destroy_process_group()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("first", "second", "has_progressed", "over", "expected"),
    [
        ([], [], True, False, None),
        ([], [signal.SIGTERM], True, False, "SIGTERM came"),
        ([signal.SIGUSR1], [], True, False, "SIGUSR1 came"),
        ([signal.SIGUSR1], [signal.SIGUSR1], False, False, None),  # one step first
        ([signal.SIGINT], [], False, False, "SIGINT came"),
        ([], [], True, True, "the time budget is used up"),
        ([], [], False, True, "error: the time budget was over before the first step was"),
    ],
)
def test_what_one_rank_knows_all_do(
    first: list[int], second: list[int], has_progressed: bool, over: bool, expected: str | None
) -> None:
    one, other = run_distributed(agreed, 2, first, second, has_progressed, over)
    assert one == other
    assert one == expected if expected is None else one.startswith(expected)
