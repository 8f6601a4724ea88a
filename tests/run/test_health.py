"""Budgets, agreement, alarms and who is named, without a training run; tests/faults has the real ones."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import ModelConfig, TrainerConfig
from nemo_ssopd.metrics import Mean
from nemo_ssopd.run import signals, stopping, watchdog
from nemo_ssopd.run.alarms import UnhealthyRun, check_health, spike_limit
from nemo_ssopd.run.stopping import TimeBudget
from nemo_ssopd.run.watchdog import Beat, held_up_by
from nemo_ssopd.run.workers import make_run_dir
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


def test_a_spike_is_measured_against_the_largest_recent_norm() -> None:
    assert spike_limit([1.0] * 15, 10.0) == math.inf
    assert spike_limit([1.0] * 15 + [3.0], 10.0) == 30.0
    assert spike_limit([1.0] * 16, 0.0) == math.inf


def test_alarms_name_value_and_remedy() -> None:
    config = Config(model=ModelConfig(dtype="float32"))
    fine = {"rollout/logprob_mismatch": Mean(0.09, 1)}
    check_health(fine, config, step=3, skipped_in_a_row=2)
    check_health({}, config, step=3, skipped_in_a_row=0)  # SFT samples nothing
    bad = {"rollout/logprob_mismatch": Mean(0.22, 2)}
    with pytest.raises(UnhealthyRun, match=r"logprob_mismatch=1.10e-01 at step 3 is over trainer.max_logprob_mismatch"):
        check_health(bad, config, step=3, skipped_in_a_row=0)
    off, half = TrainerConfig(max_logprob_mismatch=0.0), ModelConfig(dtype="bfloat16")
    check_health(bad, replace(config, trainer=off), step=3, skipped_in_a_row=0)
    check_health(bad, replace(config, model=half), step=3, skipped_in_a_row=0)  # rounding alone is nearly that
    with pytest.raises(UnhealthyRun, match="the last 3 steps, up to 7, were skipped"):
        check_health(fine, config, step=7, skipped_in_a_row=3)


BEAT = Beat(0, "n1", 10, 5, 3, "update", 4, 90.0, True, None, "")


def test_the_rank_that_holds_up_the_others_is_named() -> None:
    waits, later = BEAT, replace(BEAT, rank=1, stage="refit", place=5, seconds=1.0)
    works = replace(BEAT, rank=2, waiting=False)
    assert held_up_by([waits, works, later]).startswith("rank 2 (n1, pid 10) in stage 'update' of step 3 for 90 s; 2 ")
    assert held_up_by([later, waits]).startswith("rank 0 (n1")  # behind, though it waits
    many = [replace(works, rank=rank) for rank in range(7)]
    assert held_up_by(many).endswith("and 3 more; 0 other ranks wait")


def watching(folder: Path, **others: object) -> watchdog.Watch:
    """Rank 0 of two, with the other's beat on disk."""
    watch = watchdog.Watch(folder, 0, 2, limit_s=600)
    watchdog.beat_file(folder, 1).write_text(json.dumps(asdict(replace(BEAT, rank=1, **others))))
    return watch


def test_silence_is_counted_in_own_ticks(tmp_path: Path) -> None:
    watch = watching(tmp_path, beat=5)
    assert watch._problem(5.0) is None  # its first beat
    assert watch._problem(watchdog.SILENCE_S) is None
    problem = watch._problem(5.0)
    assert problem is not None and problem.startswith("rank 1 (n1, pid 10) in stage 'update' of step 3 has been silent")
    watching(tmp_path, beat=6)
    assert watch._problem(5.0) is None
    watching(tmp_path, beat=6, stage="done")
    assert watch._problem(2 * watchdog.SILENCE_S) is None
    watchdog.beat_file(tmp_path, 1).write_text("")  # being written
    assert watch._problem(2 * watchdog.SILENCE_S) is None


def test_a_heartbeat_is_never_found_half_written(tmp_path: Path) -> None:
    watch = watchdog.Watch(tmp_path, 0, 1, limit_s=600)
    writing = threading.Thread(target=lambda: [watch._write() for _ in range(2000)])
    writing.start()
    while writing.is_alive():
        assert watchdog.read_beat(tmp_path, 0) is not None
    writing.join()


def test_a_stage_that_takes_too_long_is_a_problem(tmp_path: Path) -> None:
    watch = watching(tmp_path, step=-1, seconds=601.0, waiting=False)
    problem = watch._problem(5.0)
    assert problem is not None
    assert "rank 1 (n1, pid 10)" in problem and "over parallel.timeout_minutes=10" in problem


WORKER = """
import os, signal, sys, time
from nemo_ssopd.run.signals import note_stop_requests, received
note_stop_requests()
os.write(1, b"up\\n")  # in one piece, whatever the other worker writes
rank = int(os.environ["RANK"])
if sys.argv[1] == "dies" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fails" and rank == 1:
    sys.exit(3)
while not received:
    time.sleep(0.02)
time.sleep(rank)
sys.exit(75)
"""
LAUNCHER = """
import sys
from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.run.workers import run_workers
ending = run_workers(ParallelConfig(world_size=2), "worker", sys.argv[1:])
print(ending.code, ending.rank)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return [sys.executable, str(tmp_path / "launcher.py")]


def start(launcher: list[str], how: str) -> subprocess.Popen[str]:
    path = f"{Path(launcher[1]).parent}:{Path(__file__).parents[2]}"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": path}
    return subprocess.Popen([*launcher, how], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("how", "ending"), [("dies", "137 1"), ("fails", "3 1")])
def test_one_worker_that_ends_badly_ends_all(launcher: list[str], how: str, ending: str) -> None:
    process = start(launcher, how)
    assert process.communicate(timeout=120)[0].splitlines()[-1] == ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_reach_the_workers_and_their_code_comes_out(launcher: list[str], number: int) -> None:
    process = start(launcher, "waits")
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.communicate(timeout=120)[0].splitlines()[-1] == "75 0"


def test_an_open_run_folder_is_closed_and_shared_space_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    (run / "metrics.jsonl").touch()
    make_run_dir(str(run))
    assert run.stat().st_mode & 0o777 == 0o700
    make_run_dir(str(tmp_path / "new"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is open to other users and holds files that are not a run's"):
        make_run_dir(str(shared))
    assert shared.stat().st_mode & 0o777 == 0o755
