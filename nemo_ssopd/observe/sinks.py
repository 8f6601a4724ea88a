"""The sinks of a step's metrics: JSONL, console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from nemo_ssopd.metrics import Metric, merge


class Sink(Protocol):
    """One place that a step's values are written to. A value that is not finite is not shown as a number."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Logger:
    """A logger that writes each step to every sink. Rank 0 has the sinks. Other ranks may hold a Logger without any.

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
    """A file with one JSON object per step: {"step": 3, "reward/mean": 0.5, ...}, with null for non-finite values.

    `start_step` is the first step that this process will log. Lines from that step on, which an interrupted run wrote,
    are dropped first, atomically. So 0 starts an empty file.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What follows the last newline is an incomplete line of an interrupted run.
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
    """Event files in `directory`. TensorBoard hides what an earlier, interrupted run logged from `start_step` on."""

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
    """A Weights & Biases run, named after its folder. A `start_step` above 0 continues the folder's earlier run.

    W&B keeps the first values it gets for a step. Values of steps that a resumed run repeats are in metrics.jsonl only.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any], start_step: int = 0) -> None:
        import wandb  # noqa: PLC0415 -- optional, and slow to import: only for runs that use it

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


# Metrics that the console shows: label, key, format.
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
    """A live panel on a terminal, or one plain line per step elsewhere.

    A logged step is the number of completed steps: 0 is the evaluation before the first step, `total_steps` is the last
    step. `start_step` steps were completed before this process started.
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
    """Return the last `width` values as bars, scaled from the smallest to the largest of them.

    >>> sparkline([0.0, 0.5, 1.0], width=60)
    '▁▅█'
    """
    recent = [value for value in values[-width:] if math.isfinite(value)]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in recent)
