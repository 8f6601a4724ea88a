"""Run a test function in several processes that form a gloo world, and get what each returned.

    def losses(parallel: ParallelConfig, path: str) -> list[float]: ...     # at module level, so that it can be sent

    first, second = run_distributed(losses, 2, ParallelConfig(world_size=2, tensor=2), path)

The processes are forked from a server that has imported the heavy libraries once, so a call costs about a second.
tests/commands.py forks whole commands from the same server.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

TIMEOUT_S = 120.0

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.preloaded"])


def start_process(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Fork a process from the server. The first call starts the server, which takes the time of the imports."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when the libraries load, as the workers of a run do
        forkserver.ensure_running()
    process = server.Process(target=function, args=args)
    process.start()
    return process


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` in `world_size` processes with torchrun's environment variables; its results by rank."""
    # As torchrun does, the parent serves the rendezvous: no port can be taken between choosing and using it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, receivers = [], []
    for rank in range(world_size):
        receiver, sender = server.Pipe(duplex=False)
        process = start_process(_run, function, args, rank, world_size, store.port, sender)
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return _collect(receivers)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()


def _collect(receivers: list[Connection]) -> list[Any]:
    """Stops at the first failure: the other ranks would wait for the one that failed."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(pending, timeout=TIMEOUT_S)
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(set(range(len(receivers))) - set(results))} gave no result in {TIMEOUT_S} s"
            )
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                result, error = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    return [results[rank] for rank in range(len(receivers))]


def _run(function: Callable[..., Any], args: Any, rank: int, world_size: int, port: int, sender: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    try:
        outcome = (function(*args), None)
    except Exception:
        outcome = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))  # plain pickle copies tensors; the pipe's own would share their memory
