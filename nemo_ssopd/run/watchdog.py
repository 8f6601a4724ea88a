"""Heartbeats and the watchdog: an error prints one line, and a hang ends within a bounded time.

    with Watch(run_dir, rank, world_size, limit_s=3600) as watch:
        watch.enter("rollout", step=3)                              # the stage that this rank starts

Every rank writes run_dir/heartbeat/rank_00000.json every few seconds, from a thread. Rank 0 watches all ranks, and
all watch rank 0. Time is counted in the thread's own ticks, so neither a clock that jumps nor a suspended job makes a
heartbeat look old.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from traceback import format_exception
from types import FrameType, TracebackType
from typing import Self

from nemo_ssopd.run.alarms import UnhealthyRun

INTERVAL_S = 5.0
"""Seconds between two heartbeats."""
SILENCE_S = 120.0
"""Seconds without a heartbeat after which a rank counts as stopped, or its node as gone."""
IN_COLLECTIVE = os.path.join("torch", "distributed", "distributed_c10d")
AGREE_S = 1.0
"""Seconds a failing rank waits for peers with the same error, so that only one prints it."""
LOST_S = 60.0
"""Seconds a rank that lost a peer waits for the launcher, which knows the cause, to end it."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat file of one rank.

    >>> Beat(rank=1, host="n7", pid=4242, beat=17, step=3, stage="update", place=4, seconds=5.1, waiting=True,
    ...      error=None, time="2026-01-31T12:00:00+00:00")
    """

    rank: int
    host: str
    pid: int
    beat: int
    """Number of writes so far."""
    step: int
    stage: str
    place: int
    """Index of the stage among the stages of this step, in the order in which they were first entered."""
    seconds: float
    """Seconds in this stage so far."""
    waiting: bool
    """True while the main thread is inside a collective, that is, waits for other ranks."""
    error: str | None
    time: str
    """Wall-clock time of the write, UTC, for human readers."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}) in stage '{self.stage}' of step {self.step}"


def beat_file(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / "heartbeat" / f"rank_{rank:05}.json"


def read_beat(run_dir: str | Path, rank: int) -> Beat | None:
    """Read the heartbeat file of a rank; None when it is missing or unreadable."""
    try:
        return Beat(**json.loads(beat_file(run_dir, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def last_seen(run_dir: str | Path, rank: int) -> str:
    """Return a rank's last stage and step as text for a message; empty without a heartbeat file."""
    beat = read_beat(run_dir, rank)
    return f" in stage '{beat.stage}' of step {beat.step}" if beat else ""


class Watch:
    """Write this rank's heartbeat and watch other ranks; end the process when one hangs or when the block fails.

    limit_s: seconds a stage may take. expected: errors whose message needs no traceback.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        world_size: int,
        *,
        limit_s: float,
        expected: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._run_dir, self._rank, self._limit_s, self._expected = run_dir, rank, limit_s, expected
        self._watched = [r for r in (range(world_size) if rank == 0 else (0,)) if r != rank]
        self._seen: dict[int, tuple[int, float]] = {r: (-1, 0.0) for r in self._watched}
        self._lock = threading.Lock()
        self._main_thread = threading.get_ident()
        self._beat, self._step, self._stage, self._seconds = 0, 0, "start", 0.0
        self._entered = time.monotonic()
        self._stages = ["start"]
        self._error: str | None = None
        self._warned: tuple[int, str] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        beat_file(run_dir, rank).parent.mkdir(exist_ok=True)
        self._write()

    def enter(self, stage: str, step: int | None = None) -> None:
        """Note that the main thread starts a stage; `step` stays the same when it is not given."""
        with self._lock:
            if step is not None:
                self._step, self._stages = step, []
            if stage not in self._stages:
                self._stages.append(stage)
            self._stage, self._seconds, self._entered = stage, 0.0, time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._fail(error)
        self.leave()

    def leave(self) -> None:
        """Stop the heartbeat and mark this rank as done, so that no other rank misses it."""
        self._closed.set()
        self._thread.join()
        self.enter("done")
        self._write()

    def here(self) -> Beat:
        """Return this rank's present heartbeat."""
        with self._lock:
            return Beat(
                rank=self._rank,
                host=socket.gethostname(),
                pid=os.getpid(),
                beat=self._beat,
                step=self._step,
                stage=self._stage,
                place=self._stages.index(self._stage),
                seconds=round(self._seconds, 1),
                waiting=_in_collective(sys._current_frames().get(self._main_thread)),
                error=self._error,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )

    def _write(self) -> None:
        self._beat += 1
        with contextlib.suppress(OSError):  # a full disk: the training code will meet it too, and report it
            file = beat_file(self._run_dir, self._rank)
            whole = file.with_suffix(".new")  # others read at any time and must never find half a file
            whole.write_text(json.dumps(vars(self.here())) + "\n")
            os.replace(whole, file)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(INTERVAL_S):
            now = time.monotonic()
            elapsed = min(now - last, 2 * INTERVAL_S)
            with self._lock:
                self._seconds += min(elapsed, now - self._entered)
            last = now
            self._write()
            if self._seconds > self._limit_s:
                self._leave_stack()
            if problem := self._problem(elapsed):
                self._end(problem)

    def _problem(self, elapsed: float) -> str | None:
        """Return what is wrong with the watched ranks or this one, or None; rank 0 also warns of slow stages.

        `elapsed` are the seconds since the last call.
        """
        own = self.here()
        beats = [own]
        for rank, (count, silent) in self._seen.items():
            beat = read_beat(self._run_dir, rank)
            silent = 0.0 if beat is None or beat.beat != count or beat.stage == "done" else silent + elapsed
            self._seen[rank] = (beat.beat if beat else count, silent)
            if beat and silent > SILENCE_S:
                return f"{beat} has been silent for {silent:.0f} s: it is stopped, or its node is gone"
            if beat and beat.stage != "done":
                beats.append(beat)
        oldest = max(beats, key=lambda beat: beat.seconds).seconds
        if oldest > self._limit_s and self._rank == 0:
            return f"{held_up_by(beats)}, over parallel.timeout_minutes={self._limit_s / 60:g}"
        if oldest > self._limit_s / 2 and self._warned != (own.step, own.stage) and self._rank == 0:
            self._warned = own.step, own.stage
            _say(f"warning: slow: {held_up_by(beats)}")
        return None

    def _end(self, problem: str) -> None:
        """Print the problem and end this process, after the others had time to write their stacks.

        The launcher then ends the others.
        """
        self._leave_stack()
        time.sleep(2 * INTERVAL_S)
        folder = beat_file(self._run_dir, self._rank).parent
        _say(f"error: {problem}. Stacks are in {folder}. Checkpoints are whole: go on with trainer.resume=true")
        os._exit(1)

    def _leave_stack(self) -> None:
        with (
            contextlib.suppress(OSError),
            open(beat_file(self._run_dir, self._rank).with_suffix(".stack"), "w") as file,
        ):
            faulthandler.dump_traceback(file)

    def _fail(self, error: Exception) -> None:
        """Report an error and end this process.

        Of the ranks with the same error, only the lowest prints it. An error that only says that a peer is gone waits,
        so that the peer's own message comes first.
        """
        is_expected, is_loss = isinstance(error, self._expected), lost_a_rank(error)
        self._error = None if is_loss else failure_text(error)
        with contextlib.suppress(OSError):
            beat_file(self._run_dir, self._rank).with_suffix(".traceback").write_text("".join(format_exception(error)))
        self._write()
        time.sleep(LOST_S if is_loss else AGREE_S)
        others = [read_beat(self._run_dir, rank) for rank in range(self._rank)]
        if self._error is None or not any(beat and beat.error == self._error for beat in others):
            if not is_expected:
                traceback.print_exception(error)
            place = "" if is_expected else f"rank {self._rank} in stage '{self._stage}' of step {self._step}: "
            _say(f"error: {place}{failure_text(error)}")
        os._exit(1)


def failure_text(error: Exception) -> str:
    """Return the error as text, the same on all ranks with the same error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room, and go on with trainer.resume=true: what was saved is whole"
    return str(error) if isinstance(error, ValueError | UnhealthyRun) else f"{type(error).__name__}: {error}"


def held_up_by(beats: Sequence[Beat]) -> str:
    """Name the ranks that the others wait for: the furthest behind, and of those the ones outside a collective."""
    last = min((beat.step, beat.place) for beat in beats)
    behind = [beat for beat in beats if (beat.step, beat.place) == last]
    culprits = [beat for beat in behind if not beat.waiting] or behind
    names = "; ".join(f"{beat} for {beat.seconds:.0f} s" for beat in culprits[:4])
    more = f" and {len(culprits) - 4} more" if len(culprits) > 4 else ""
    return f"{names}{more}; {len(beats) - len(culprits)} other ranks wait"


def lost_a_rank(error: BaseException) -> bool:
    """Tell whether an error only says that another rank is gone: it was raised inside a collective."""
    modules = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(IN_COLLECTIVE in module for module in modules) or "gloo/transport" in str(error)


def _in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if IN_COLLECTIVE in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
