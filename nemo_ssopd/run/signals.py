"""Stop signals: recorded when they arrive, obeyed after the step. Import this first: other imports take seconds.

SLURM sends SIGUSR1 before the time limit (`--signal` in scripts/slurm) and SIGTERM to preempt. Ctrl-C is SIGINT.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop, saved, and ended before its last step. Start it again to continue."""

received: list[signal.Signals] = []
"""Stop signals since `note_stop_requests`, in order of arrival."""


def note_stop_requests() -> None:
    """Record stop signals in `received` instead of dying, and unblock those that the launcher masked."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_of_stop_requests() -> None:
    """Unblock the stop signals that the launcher masked, so that any of them ends this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore_stop_requests() -> None:
    """Ignore the stop signals for the rest of the process.

    Call this when nothing is left to stop: Python restores the default handlers at exit, and a late signal would kill
    a run that has finished.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    received.append(signal.Signals(number))
