"""Traces of single steps: where the time goes and, on CUDA, what holds the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nemo_ssopd.config.run import Config
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.run.watchdog import Watch

MEMORY_EVENTS = 200_000
"""Number of latest allocations and frees in a memory snapshot, each with its stack: several KB (ours)."""


@contextmanager
def profiled(config: Config, runtime: Runtime, watch: Watch, *, step: int) -> Iterator[None]:
    """Profile the block on this rank into run_dir/profile/ if `step` is in trainer.profile_steps. Else do nothing.

    The trace names the stages (`metrics.StageTimer`). Open it in ui.perfetto.dev, and the snapshot in
    pytorch.org/memory_viz.
    """
    if step not in config.trainer.profile_steps:
        yield
        return
    folder, name = Path(config.run_dir) / "profile", f"step_{step:06}_rank_{runtime.rank:04}"
    folder.mkdir(exist_ok=True)
    on_cuda = runtime.device.type == "cuda"
    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as profiler:
        yield
    watch.enter("profile")
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
    if on_cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    if runtime.is_main:
        memory = f"memory snapshot {name}.memory.pickle" if on_cuda else "no memory snapshot: there is no CUDA"
        print(f"profile of step {step}, for each rank, in {folder}: trace {name}.json.gz, {memory}", flush=True)
