"""Two workers that train nothing: python -m tests.run.tiny_workers waits|dies|fails

The launcher prints how they ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from nemo_ssopd.config.run import ParallelConfig
from nemo_ssopd.run.signals import note_stop_requests, received
from nemo_ssopd.run.workers import run_workers, under_launcher


def work(how: str, rank: int) -> None:
    """Wait for a stop signal, and end with code 75; rank 1 may end otherwise."""
    note_stop_requests()
    os.write(1, b"up\n")  # in one piece, whatever the other worker writes
    if how == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fails" and rank == 1:
        sys.exit(3)
    while not received:
        time.sleep(0.02)
    time.sleep(rank)
    sys.exit(75)


if __name__ == "__main__":
    if under_launcher():
        work(sys.argv[1], int(os.environ["RANK"]))
    ending = run_workers(ParallelConfig(world_size=2), "tests.run.tiny_workers", sys.argv[1:])
    print(ending.code, ending.rank)
