"""The report of a run: its curves in report.png, and one self-contained page, report.html.

The page loads nothing: the figure is embedded. All text that a run wrote, also a model's completions, is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from nemo_ssopd.algo.selection import is_correct

Row: TypeAlias = dict[str, float | None]
"""One logged step: {"step": 3, "reward/mean": 0.5, ...}. None stands for a value that was not finite."""


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_metrics(run_dir: Path) -> list[Row]:
    """Read the lines of metrics.jsonl in order. An incomplete last line is left out. ValueError if there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the run_dir of a training run")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): remove the line and run again") from None
    if not rows:
        raise ValueError(f"{path} is empty: the run has not logged a step yet")
    return rows


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of one metric, for steps where it was logged and finite.

    >>> series([{"step": 0, "loss/total": None}, {"step": 1, "loss/total": 0.2}], "loss/total")
    ([1], [0.2])
    """
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]  # type: ignore[misc]


# ---- The figure ------------------------------------------------------------------------------------------------------

# Okabe and Ito's colors, which color-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
INK, FAINT = "#333333", "#DDDDDD"


@dataclass(frozen=True)
class Panel:
    """One small plot. `lines` are (label, metric key). Metrics KEY_low and KEY_high are drawn as its interval.

    >>> Panel("Gradient norm", "before clipping", (("", "optim/grad_norm"),))
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    percent: bool = False
    log: bool = False


PANELS = (
    Panel("Training reward", "mean", (("", "reward/mean"),), percent=True),
    Panel(
        "Held-out problems, 95 % interval",
        "share correct",
        (("Avg@n", "eval/avg_at_n"), ("maj@n", "eval/maj_at_n"), ("pass@n", "eval/pass_at_n")),
        percent=True,
    ),
    Panel(
        "Groups",
        "share of prompts",
        (
            ("mixed", "group/mixed_fraction"),
            ("all wrong", "group/all_wrong_fraction"),
            ("all correct", "group/all_correct_fraction"),
        ),
        percent=True,
    ),
    Panel("GRPO loss", "per token", (("", "loss/grpo"),)),
    Panel("Cross-entropy", "nats per token", (("", "loss/sft"),)),
    Panel(
        "SSOPD loss, and KL before clipping",
        "nats per position",
        (("clipped loss", "ssopd/loss"), ("unclipped KL", "ssopd/kl_unclipped")),
    ),
    Panel(
        "Cut by the clip",
        "share",
        (("of the positions", "ssopd/clipped_positions"), ("of the KL", "ssopd/clipped_mass")),
        percent=True,
    ),
    Panel(
        "Completion length",
        "tokens",
        (
            ("all rollouts", "rollout/length_mean"),
            ("longest wrong", "group/wrong_length"),
            ("shortest correct", "group/correct_length"),
        ),
    ),
    Panel(
        "Entropy",
        "nats per token",
        (("rollouts", "loss/entropy"), ("student", "ssopd/student_entropy"), ("teacher", "ssopd/teacher_entropy")),
    ),
    Panel("Gradient norm", "before clipping", (("", "optim/grad_norm"),)),
    Panel("Trainer against engine", "nats per token", (("", "rollout/logprob_mismatch"),), log=True),
    Panel("Speed", "tokens per second", (("", "progress/tokens_per_second"),)),
)


def draw(rows: Sequence[Row], *, title: str) -> Figure:
    """Draw a grid of plots over the steps: one for each of PANELS that the run has numbers for, and one for times."""
    panels: list[tuple[str, str, Callable[[Axes], None]]] = [
        (panel.title, panel.unit, lambda axes, panel=panel: _draw_lines(axes, rows, panel))  # type: ignore[misc]
        for panel in PANELS
        if any(series(rows, key)[0] for _, key in panel.lines)
    ]
    if series(rows, "time/step")[0]:
        panels.append(("Time of a step", "seconds", lambda axes: _draw_times(axes, rows)))
    columns = min(3, max(len(panels), 1))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * height + 0.6), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK, parse_math=False)
    last_step = max(float(row["step"] or 0) for row in rows)
    for index, (heading, unit, draw_panel) in enumerate(panels):
        axes = figure.add_subplot(height, columns, index + 1)
        axes.set_title(heading, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_ylabel(unit, fontsize=8.5, color=INK)
        axes.set_xlim(0, max(last_step, 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(which="both", labelsize=8, colors=INK, length=3)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        if index + columns >= len(panels):
            axes.set_xlabel("step", fontsize=8.5, color=INK)
        draw_panel(axes)
    return figure


def _draw_lines(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    """Draw each metric as a line. Many points are drawn faint, with a bold running mean. Evaluations get intervals."""
    smallest, largest = math.inf, -math.inf
    for (label, key), colour in zip(panel.lines, COLOURS, strict=False):
        steps, values = series(rows, key)
        if not steps:
            continue
        smallest, largest = min(smallest, *values), max(largest, *values)
        low, high = series(rows, f"{key}_low")[1], series(rows, f"{key}_high")[1]
        if len(low) == len(high) == len(values):
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=1, clip_on=False)
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4, clip_on=False, label=label)
        elif len(values) < 20:
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, clip_on=False, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, len(values) // 15), color=colour, linewidth=1.8, label=label)
    if panel.percent:
        # The clipped loss can be negative. Then more than the whole KL was cut off. Rewards may be any numbers.
        axes.set_ylim(min(0, 1.05 * smallest), max(1.02, 1.05 * largest))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif panel.log and smallest > 0:
        axes.set_yscale("log")
        axes.set_ylim(smallest / 5, largest * 5)  # a wide scale: rounding noise then looks like noise
    elif smallest < 0:
        axes.axhline(0, color="#999999", linewidth=0.8)
    else:
        axes.set_ylim(bottom=0)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=1.2)


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the stages stacked up to the time of the step, without evaluations, which take far longer than a step."""
    timed = [row for row in rows if row.get("time/step") is not None]
    keys = {key for row in timed for key in row if key.startswith("time/")} - {"time/step", "time/eval"}
    seconds = {key: np.array([row.get(key) or 0.0 for row in timed]) for key in sorted(keys)}
    largest_first = sorted(seconds, key=lambda key: -seconds[key].sum())
    whole = np.array([row["time/step"] for row in timed], dtype=np.float64)
    other = np.maximum(whole - sum(seconds.values()), 0.0)
    # Step s fills the axis from s - 1 to s.
    edges = np.array([[float(row["step"] or 0) - 1, float(row["step"] or 0)] for row in timed]).ravel()
    axes.stackplot(
        edges,
        *(np.repeat(values, 2) for values in [*(seconds[key] for key in largest_first), other]),
        labels=[*(key.removeprefix("time/").replace("_", " ") for key in largest_first), "other"],
        colors=[*(COLOURS[i % 6] for i in range(len(largest_first))), "#BBBBBB"],
        alpha=0.85,
        linewidth=0,
    )
    # The first steps warm caches up. They may go off the top, so that a usual step stays readable.
    axes.set_ylim(0, 1.3 * float(np.quantile(whole, 0.98)) or 1.0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, labelcolor=INK, handlelength=1.0, ncols=3)


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Return for each value the mean of it and up to `half` neighbors on either side, fewer at the ends.

    >>> running_mean([0.0, 3.0, 6.0], 1)
    [1.5, 3.0, 4.5]
    """
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


# ---- The page --------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ddd; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 0.15em 1.2em 0.15em 0; border-bottom: 1px solid #eee; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f6f6f6; padding: 0.8em; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(
    rows: Sequence[Row], *, title: str, png: bytes, config: str | None, samples: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page as text. All text from the run goes through `html.escape`."""
    image = base64.b64encode(png).decode("ascii")
    body = [f"<h1>{html.escape(title)}</h1>", "<h2>Result</h2>", _table(("", "start", "end"), headline(rows))]
    body.append(f'<h2>Curves</h2><img alt="curves of the run" src="data:image/png;base64,{image}">')
    if samples:
        body.append("<h2>Samples of the last evaluation</h2>")
        for sample in samples:
            name = f"{sample['problem']} · {sample['reason']} · {sample['tokens']} tokens"
            text = f"<pre>{html.escape(str(sample['text']))}</pre>"
            body.append(f"<details><summary>{html.escape(name)}</summary>{text}</details>")
    if config is not None:
        body.append(
            f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{html.escape(config)}</pre></details>"
        )
    body += ["<h2>All metrics</h2>", _table(("metric", "first", "last", "lowest", "highest"), _all_metrics(rows))]
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def headline(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the main results: (name, value at the start, value at the end).

    Evaluations have their 95 % intervals. Training metrics are means over the first and the last tenth of the steps.
    """
    lines: list[tuple[str, ...]] = []
    for name, key in (("Avg@n", "eval/avg_at_n"), ("maj@n", "eval/maj_at_n"), ("pass@n", "eval/pass_at_n")):
        values, low, high = (series(rows, f"{key}{end}")[1] for end in ("", "_low", "_high"))
        if len(values) == len(low) == len(high) > 0:
            lines.append((name, *(f"{values[i]:.1%} [{low[i]:.1%}, {high[i]:.1%}]" for i in (0, -1))))
        elif values:
            lines.append((name, f"{values[0]:.1%}", f"{values[-1]:.1%}"))
    training = (
        ("Training reward", "reward/mean", "{:.1%}"),
        ("Mixed groups", "group/mixed_fraction", "{:.1%}"),
        ("Completion length, tokens", "rollout/length_mean", "{:,.0f}"),
        ("Seconds per step", "time/step", "{:.1f}"),
    )
    for name, key, style in training:
        values = series(rows, key)[1]
        tenth = max(1, len(values) // 10)
        if values:
            lines.append((name, style.format(np.mean(values[:tenth])), style.format(np.mean(values[-tenth:]))))
    return lines


def _all_metrics(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    keys = sorted({key for row in rows for key in row} - {"step"})
    values = {key: series(rows, key)[1] for key in keys}
    return [
        (key, *(f"{x:.6g}" for x in (v[0], v[-1], min(v), max(v))))
        if (v := values[key])
        else (key, *["not finite"] * 4)
        for key in keys
    ]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", row(header, "th"), *(row(line, "td") for line in lines), "</table>"])


def last_samples(
    run_dir: Path, *, threshold: float = 0.5, per_outcome: int = 3, characters: int = 4000
) -> list[dict[str, Any]]:
    """Return some correct and some wrong completions of the newest file in run_dir/eval/, cut to a readable length."""
    files = sorted((run_dir / "eval").glob("*.jsonl"))
    if not files:
        return []
    chosen: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    with files[-1].open(encoding="utf-8") as lines:
        for sample in map(json.loads, lines):
            some = chosen[is_correct(sample["reward"], threshold)]
            if len(some) < per_outcome:
                cut = " [...]" if len(sample["text"]) > characters else ""
                some.append({**sample, "text": sample["text"][:characters] + cut})
    return chosen[True] + chosen[False]


def write_report(run_dir: Path) -> None:
    """Write run_dir/report.png and report.html from run_dir/metrics.jsonl, config.yaml and eval/."""
    rows = read_metrics(run_dir)
    title = f"Run {run_dir.resolve().name}"
    file = run_dir / "config.yaml"
    config = file.read_text(encoding="utf-8") if file.exists() else ""
    threshold = OmegaConf.select(OmegaConf.create(config), "reward.threshold", default=0.5)
    draw(rows, title=title).savefig(run_dir / "report.png")
    page = render(
        rows,
        title=title,
        png=(run_dir / "report.png").read_bytes(),
        config=config or None,
        samples=last_samples(run_dir, threshold=threshold),
    )
    # Completions may hold lone surrogates, which UTF-8 cannot express.
    (run_dir / "report.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def print_summary(run_dir: Path) -> None:
    """Print the run in a few lines: metrics at the start and the end, memory, and where its files are."""
    rows = read_metrics(run_dir)
    table = Table(title="SSOPD run", show_header=True, header_style="bold")
    for column in ("", "first", "last"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, style in (
        ("Avg@n on held-out problems", "eval/avg_at_n", "{:.1%}"),
        ("  95% interval, low", "eval/avg_at_n_low", "{:.1%}"),
        ("  95% interval, high", "eval/avg_at_n_high", "{:.1%}"),
        ("maj@n", "eval/maj_at_n", "{:.1%}"),
        ("training reward", "reward/mean", "{:.3f}"),
        ("mixed groups", "group/mixed_fraction", "{:.0%}"),
        ("log-prob mismatch", "rollout/logprob_mismatch", "{:.1e}"),
        ("step", "progress/step", "{:.0f}"),
    ):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            table.add_row(label, style.format(values[0]), style.format(values[-1]))
    console = Console()
    console.print(table)
    stages = {key: value for key, value in (rows[-1] if rows else {}).items() if key.startswith("memory/")}
    sizes = [f"{key[len('memory/') : -len('_gib')]} {value:.2f}" for key, value in stages.items() if value is not None]
    console.print(f"GiB of the largest rank: {', '.join(sizes)}", highlight=False, soft_wrap=True)
    for name in ("report.html", "report.png", "metrics.jsonl", "hf", "checkpoints"):
        if (run_dir / name).exists():
            console.print(f"{name:>14}  {run_dir / name}", highlight=False, soft_wrap=True)
