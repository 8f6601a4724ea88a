"""Metrics that own their reduction, the stage timer, and the places a step's metrics are written to.

A stage returns `Metrics`: keys `area/name`, and values that know how to join with the same metric of another
micro-batch, stage or rank. Nobody averages averages, because an average stays a sum and a count until it is written.

>>> micro_batches = [{"loss/entropy": Mean(2.0, 4)}, {"loss/entropy": Mean(0.5, 1)}]
>>> merge(*micro_batches)["loss/entropy"].value()
0.5
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import psutil
import torch
import torch.distributed as dist
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

AREAS = ("progress", "rollout", "reward", "group", "loss", "ssopd", "optim", "time", "eval", "memory")


# ---- Values ---------------------------------------------------------------------------------------------------------


Number: TypeAlias = float | torch.Tensor
"""A value on the host, or a scalar tensor that waits on the device until `fetch` brings it over."""


@dataclass(frozen=True)
class Sum:
    """Adds up: counts, tokens."""

    total: Number

    def join(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Mean:
    """A ratio of two sums: `total` over `count` samples, tokens or whatever it is a mean of. Without any it is NaN.

    >>> Mean(3.0, 4).join(Mean(1.0, 1)).value()
    0.8
    """

    total: Number
    count: Number

    def join(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        return float(self.total / self.count) if self.count else math.nan


@dataclass(frozen=True)
class Max:
    """The largest; also for what all ranks hold alike, such as the gradient norm. NaN wins, so that it shows."""

    x: Number

    def join(self, other: Max) -> Max:
        return Max(math.nan if math.isnan(self.x) or math.isnan(other.x) else max(self.x, other.x))

    def value(self) -> float:
        return float(self.x)


@dataclass(frozen=True)
class Min:
    """The smallest. NaN wins, so that it shows."""

    x: Number

    def join(self, other: Min) -> Min:
        return Min(math.nan if math.isnan(self.x) or math.isnan(other.x) else min(self.x, other.x))

    def value(self) -> float:
        return float(self.x)


@dataclass(frozen=True)
class EffectiveShare:
    """(sum w)^2 / (n sum w^2) of n importance weights: the effective sample size as a share of n, 1 for equal weights
    (Kong 1992, "A Note on Importance Sampling using Standardized Weights"). Without any it is NaN.

    >>> EffectiveShare(1.0, 1.0, 1).join(EffectiveShare(2.0, 4.0, 1)).value()  # weights 1 and 2
    0.9
    """

    weights: Number
    squares: Number
    count: Number

    def join(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(self.weights + other.weights, self.squares + other.squares, self.count + other.count)

    def value(self) -> float:
        return float(self.weights**2 / (self.count * self.squares)) if self.count else math.nan


Metric: TypeAlias = Sum | Mean | Max | Min | EffectiveShare
Metrics: TypeAlias = dict[str, Metric]


def merge(*parts: Mapping[str, Metric]) -> Metrics:
    """Joins the metrics of micro-batches, stages or ranks, key by key; not every part needs every key."""
    merged: Metrics = {}
    for part in parts:
        for key, metric in part.items():
            check_key(key)
            if key not in merged:
                merged[key] = metric
            elif type(merged[key]) is type(metric):
                merged[key] = merged[key].join(metric)  # type: ignore[arg-type]
            else:
                raise ValueError(f"{key} is both {merged[key]} and {metric}: give it one reduction everywhere")
    return merged


def fetch(parts: Iterable[Mapping[str, Metric]]) -> list[Metrics]:
    """Bring all values that wait on the device to the host, in one transfer, so that the device is waited for once.

    >>> fetch([{"loss/entropy": Mean(torch.tensor(2.0), 4)}, {"optim/lr": Max(0.1)}])
    [{'loss/entropy': Mean(total=2.0, count=4)}, {'optim/lr': Max(x=0.1)}]
    """
    parts = list(parts)
    numbers = [number for part in parts for metric in part.values() for number in vars(metric).values()]
    waiting = [number.detach().double() for number in numbers if isinstance(number, torch.Tensor)]
    values = iter(torch.stack(waiting).tolist() if waiting else ())

    def on_host(metric: Metric) -> Metric:
        return type(metric)(*(next(values) if isinstance(n, torch.Tensor) else n for n in vars(metric).values()))

    return [{key: on_host(metric) for key, metric in part.items()} for part in parts]


def check_key(key: str) -> None:
    area, _, name = key.partition("/")
    if area not in AREAS or not name:
        raise ValueError(f"metric key {key!r} is not area/name with an area of {', '.join(AREAS)}")


def reduce_across_ranks(metrics: Mapping[str, Metric], group: dist.ProcessGroup | None) -> Metrics:
    """The metrics of all ranks of `group`, joined in rank order, on every rank; None is this process alone.

    Tensor-parallel peers hold the same numbers, which sums would count again: pass the data-parallel group, or empty
    metrics from all peers but one. The objects travel on the CPU, so the group needs a gloo backend.
    """
    if group is None:
        return merge(metrics)
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, dict(metrics), group=group)
    return merge(*parts)


class StageTimer:
    """Wall-clock seconds and memory of one step and of its stages; a stage entered twice adds up. Make one per step.

    Memory: see `memory_gib`. Nothing waits for the GPU: work that a stage leaves queued there is counted in the stage
    that waits for it. Stages have names in a torch profiler's trace and, on CUDA, in Nsight Systems (NVTX).
    `on_enter` is told the name of each stage as it begins.

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
        """Over ranks the slowest and the largest count, since the others wait for it, and it decides what fits."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        times: Metrics = {f"time/{name}": Max(value) for name, value in seconds.items()}
        return times | {f"memory/{name}": Max(value) for name, value in self._gib.items()}


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Both, since a profiler's range is an NVTX range only where torch marks each of its operators as one too."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


def memory_gib() -> dict[str, float]:
    """GiB now, by the end of the metric's name. Without CUDA `gib` is the resident set of this process.

    On CUDA `gib` is what is in use on the device, by whom ever: torch keeps what it has freed, so that a stage's end
    shows its peak, but for what was given back to wake the engine. `torch_peak_gib` is the peak of torch's allocations
    since it was reset, which counts a sleeping engine's as if they were there.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {"gib": (total - free) / 2**30, "torch_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"gib": psutil.Process().memory_info().rss / 2**30}


# ---- Sinks ----------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """One place that a step's values are written to. A value that is not finite has no number to show there."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logger:
    """Writes each step to every sink. Rank 0 has the sinks; the other ranks may hold a Logger without any.

    >>> with Logger([JsonlSink(run_dir / "metrics.jsonl"), ConsoleSink(total_steps=100)]) as logger:
    ...     logger.log(0, reduce_across_ranks(metrics, data_parallel_group))
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        values = {key: metric.value() for key, metric in merge(metrics).items()}
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlSink:
    """One JSON object per step: {"step": 3, "reward/mean": 0.5, ...}, with null for what is not finite.

    `start_step` is the first step that this process will log: lines from there on were written by a run that was cut
    off, and are dropped first, atomically. So 0 starts an empty file.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What follows the last newline is a line that the run did not live to finish.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] < start_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files in `directory`. TensorBoard hides what an earlier, cut-off run logged from `start_step` on."""

    def __init__(self, directory: Path, start_step: int = 0) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, named after its folder; from a `start_step` above 0 the folder's earlier run goes on.

    W&B keeps the first values it gets for a step: steps run again after a resume are in metrics.jsonl only.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any], start_step: int = 0) -> None:
        import wandb  # noqa: PLC0415 -- optional, and slow to import: only for runs that ask

        id_file = run_dir / "wandb_run_id"
        if start_step == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=run_dir,
            config=dict(config),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()


# The console's choice of metrics: label, key, format.
CONSOLE_FIELDS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("mixed", "group/mixed_fraction", "{:.0%}"),
    ("sft", "loss/sft", "{:.4f}"),
    ("grpo", "loss/grpo", "{:+.4f}"),
    ("ssopd", "ssopd/loss", "{:+.4f}"),
    ("clipped", "ssopd/clipped_positions", "{:.1%}"),
    ("length", "rollout/length_mean", "{:,.0f}"),
    ("mismatch", "rollout/logprob_mismatch", "{:.1e}"),
    ("grad norm", "optim/grad_norm", "{:.3g}"),
    ("tokens/s", "progress/tokens_per_second", "{:,.0f}"),
    ("Avg@n", "eval/avg_at_n", "{:.1%}"),
)
BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleSink:
    """A live panel on a terminal, one plain line per step anywhere else.

    A logged step counts completed steps: 0 is the evaluation before the first, `total_steps` the last. `start_step`
    steps were completed before this process started.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total_steps = total_steps
        self._start_step = start_step
        self._start_time = time.perf_counter()
        self._values: dict[str, float] = {}
        self._rewards: list[float] = []
        self._progress = Progress(
            TextColumn("[bold]step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, eta="-")
        self._live = Live(console=self._console, refresh_per_second=1, get_renderable=self._panel)
        if self._console.is_terminal:
            self._live.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._values |= values  # an evaluation stays on the panel until the next one
        if "reward/mean" in values:
            self._rewards.append(values["reward/mean"])
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step, eta=self._eta(step))
            self._live.refresh()
        else:
            self._console.print(self._line(step, values), soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        self._live.stop()

    def _eta(self, step: int) -> str:
        if step == self._start_step:
            return "-"
        per_step = (time.perf_counter() - self._start_time) / (step - self._start_step)
        seconds = int(per_step * (self._total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._total_steps}"]
        parts += [f"{label} {style.format(values[key])}" for label, key, style in CONSOLE_FIELDS if key in values]
        stages = [f"{name} {seconds:.1f}" for name, seconds in _stage_seconds(values).items()]
        if "time/step" in values:
            parts.append(
                f"{values['time/step']:.1f} s ({', '.join(stages)})" if stages else f"{values['time/step']:.1f} s"
            )
        return "  ".join([*parts, f"eta {self._eta(step)}"])

    def _panel(self) -> Panel:
        fields = Table.grid(padding=(0, 2))
        for label, key, style in CONSOLE_FIELDS:
            fields.add_row(f"[dim]{label}", style.format(self._values[key]) if key in self._values else "-")
        stages = Table.grid(padding=(0, 1))
        seconds = _stage_seconds(self._values)
        for name, value in seconds.items():
            bar = "█" * round(20 * value / max(self._values.get("time/step", sum(seconds.values())), 1e-9))
            stages.add_row(f"[dim]{name}", f"{value:.1f} s", f"[cyan]{bar}")
        columns = Table.grid(padding=(0, 4))
        columns.add_row(fields, stages)
        trend = f"[dim]reward[/] [green]{sparkline(self._rewards, width=60)}"
        return Panel(Group(self._progress, "", columns, "", trend), title="SSOPD", padding=(1, 2))


def _stage_seconds(values: Mapping[str, float]) -> dict[str, float]:
    return {key[5:]: value for key, value in values.items() if key.startswith("time/") and key != "time/step"}


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The last `width` values as bars, from the smallest to the largest of them.

    >>> sparkline([0.0, 0.5, 1.0], width=60)
    '▁▅█'
    """
    recent = [value for value in values[-width:] if math.isfinite(value)]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in recent)
