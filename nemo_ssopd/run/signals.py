"""Requests to stop: noted when they come, acted on after the step. Imported first: other imports take seconds.

SLURM sends SIGUSR1 before the time limit (`--signal` in scripts/slurm), SIGTERM when it preempts; Ctrl-C is SIGINT.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped before its last step, since it was asked to: start it again to go on."""

received: list[signal.Signals] = []
"""What has come since `note_stop_requests`, in order."""


def note_stop_requests() -> None:
    """From now on the stop signals end nothing; they go into `received`. Also lets in what a launcher held back."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_of_stop_requests() -> None:
    """The stop signals end this process, also those that a launcher held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore_stop_requests() -> None:
    """Nothing is left to stop. As it ends, the interpreter would give the signals their deadly default back."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    received.append(signal.Signals(number))
