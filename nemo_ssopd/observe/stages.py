"""Time and memory of the stages of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import psutil
import torch

from nemo_ssopd.metrics import Max, Metrics


class StageTimer:
    """A timer of one step and of its stages: wall-clock seconds and memory in GiB. Make one per step.

    The times of a stage that is entered twice add up. For memory see `memory_gib`. The timer does not wait for the GPU:
    work that a stage leaves queued there counts in the stage that waits for it. Stages have names in a torch profiler's
    trace and, on CUDA, in Nsight Systems (NVTX). `on_enter` gets the name of each stage as it begins.

    >>> timer = StageTimer()
    >>> with timer.stage("rollout"):
    ...     rollouts = generate()
    >>> timer.metrics()
    {'time/rollout': Max(x=3.2), 'time/step': Max(x=3.3), 'memory/rollout_gib': Max(x=1.2)}
    """

    def __init__(self, on_enter: Callable[[str], None] = lambda name: None) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._gib: dict[str, float] = {}
        self._on_enter = on_enter

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_enter(name)
        start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with named_range(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            for kind, gib in memory_gib().items():
                self._gib[f"{name}_{kind}"] = max(self._gib.get(f"{name}_{kind}", 0.0), gib)

    def metrics(self) -> Metrics:
        """Return time and memory of each stage, and the time of the step. Across ranks, keep the maximum.

        The others wait for the slowest rank, and the rank with the most memory decides what fits.
        """
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        times: Metrics = {f"time/{name}": Max(value) for name, value in seconds.items()}
        return times | {f"memory/{name}": Max(value) for name, value in self._gib.items()}


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name the block in a torch profiler's trace and, on CUDA, in NVTX.

    It takes both: a profiler's range is an NVTX range only if torch also marks each of its operators as one.
    """
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


def memory_gib() -> dict[str, float]:
    """Return the memory in use now, in GiB, by the end of the metric's name.

    Without CUDA, `gib` is the resident set of this process. On CUDA, `gib` is the use of the whole device, by all
    processes. torch keeps memory that it has freed, so the value at a stage's end shows the stage's peak, except for
    memory that was given back to wake the engine. `torch_peak_gib` is the peak of torch's allocations since its last
    reset. It counts a sleeping engine's allocations as if they were still there.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {"gib": (total - free) / 2**30, "torch_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"gib": psutil.Process().memory_info().rss / 2**30}
