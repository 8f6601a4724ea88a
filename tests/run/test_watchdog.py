"""Heartbeats, and who is named, without a training run; tests/faults has the real ones."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

from nemo_ssopd.run import watchdog
from nemo_ssopd.run.watchdog import Beat, held_up_by

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
    writing = threading.Thread(target=lambda: [watch._write() for _ in range(500)])
    writing.start()
    while writing.is_alive():
        assert watchdog.read_beat(tmp_path, 0) is not None
    writing.join()


def test_a_stage_that_takes_too_long_is_a_problem(tmp_path: Path) -> None:
    watch = watching(tmp_path, step=-1, seconds=601.0, waiting=False)
    problem = watch._problem(5.0)
    assert problem is not None
    assert "rank 1 (n1, pid 10)" in problem and "over parallel.timeout_minutes=10" in problem
