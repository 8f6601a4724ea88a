"""The paper's table of finished evaluations: one row per model, one column per set, Avg@n in percent, and the mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nemo_ssopd.evaluation.results import SUMMARY
from nemo_ssopd.evaluation.statistics import Estimate, macro_estimate, paired_bootstrap
from nemo_ssopd.observe.report import COLOURS, FAINT, INK

AVERAGE = "Average"


@dataclass(frozen=True)
class Row:
    """A model and its finished evaluations: set title -> the content of summary.json.

    >>> Row("SSOPD", {"AIME 2024": {"avg_at_n": {"value": 0.79, "low": 0.68, "high": 0.88}, ...}})
    """

    model: str
    sets: dict[str, dict[str, Any]]

    def average_over(self, titles: Sequence[str]) -> Estimate | None:
        """Return the unweighted mean over all sets, or None while one is missing."""
        if any(title not in self.sets for title in titles):
            return None
        return macro_estimate([list(self.sets[title]["scores"].values()) for title in titles])


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Read every finished evaluation in these run_dirs, in order. ValueError if there is none or one is repeated."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in folders:
        for file in sorted(folder.glob(f"*/*/{SUMMARY}"), key=lambda file: file.stat().st_mtime_ns):
            summary, model = json.loads(file.read_text()), file.parents[1].name
            if summary["title"] in rows.setdefault(model, {}):
                raise ValueError(f"{file}: {model} on {summary['title']} is there twice: leave one folder out")
            rows[model][summary["title"]] = summary
    if not rows:
        raise ValueError(f"no finished evaluation (MODEL/SET/{SUMMARY}) in {', '.join(map(str, folders))}")
    return [Row(model, sets) for model, sets in rows.items()]


def write_table(folders: Sequence[Path], output: Path) -> tuple[list[Row], list[str]]:
    """Write table.md, table.json and table.png of all finished evaluations. Return the rows and the sets' titles."""
    rows = read_rows(folders)
    titles = list(dict.fromkeys(title for row in rows for title in row.sets))
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(markdown(rows, titles), encoding="utf-8")
    (output / "table.json").write_text(json.dumps(as_json(rows, titles), indent=2) + "\n")
    draw(rows, titles).savefig(output / "table.png")
    return rows, titles


def column_headings(titles: Sequence[str]) -> list[str]:
    return [*titles, AVERAGE] if len(titles) > 1 else list(titles)


def cells(row: Row, titles: Sequence[str]) -> list[str]:
    """Return a row's estimates with their intervals, in percent, as text."""
    return [_interval(estimate) if estimate else "-" for estimate in _estimates(row, titles)]


def markdown(rows: Sequence[Row], titles: Sequence[str]) -> str:
    """Return table.md: Avg@n as in the paper, the same with intervals, paired differences, and all other numbers."""
    n = " or ".join(str(size) for size in sorted({s["samples"] for row in rows for s in row.sets.values()}))
    columns = column_headings(titles)
    plain = [[row.model, *(f"{100 * e.value:.1f}" if e else "-" for e in _estimates(row, titles))] for row in rows]
    spread = [[row.model, *cells(row, titles)] for row in rows]
    parts = [f"# Avg@{n}, in percent", _grid(["", *columns], plain)]
    parts += ["95 % bootstrap intervals over problems:", _grid(["", *columns], spread)]
    if len(rows) > 1 and (differences := _differences(rows, titles)):
        parts += [f"Difference to {rows[0].model} on the same problems, paired:", _grid(["", *titles], differences)]
    parts += ["## Every figure"]
    for title in titles:
        parts += [f"### {title}", _details([row for row in rows if title in row.sets], title)]
    return "\n\n".join(parts) + "\n"


def as_json(rows: Sequence[Row], titles: Sequence[str]) -> dict[str, Any]:
    """Return the table's numbers, as fractions."""
    averages = {row.model: row.average_over(titles) for row in rows}
    return {
        "sets": list(titles),
        "rows": [
            {
                "model": row.model,
                "sets": {t: {k: v for k, v in s.items() if k != "scores"} for t, s in row.sets.items()},
                "average": None if (mean := averages[row.model]) is None else asdict(mean),
            }
            for row in rows
        ],
    }


def draw(rows: Sequence[Row], titles: Sequence[str]) -> Figure:
    """Draw Avg@n as bars with their intervals, grouped by set."""
    columns = column_headings(titles)
    figure = Figure(figsize=(max(5.0, 1.2 + 1.6 * len(columns)), 3.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(rows)
    lowest, highest = 0.0, 1.0  # a user's function may give rewards outside this range
    for index, row in enumerate(rows):
        for place, estimate in enumerate(_estimates(row, titles)):
            if estimate is None:
                continue
            x = place + (index - (len(rows) - 1) / 2) * width
            error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            axes.bar(x, estimate.value, 0.92 * width, color=COLOURS[index % len(COLOURS)])
            axes.errorbar(x, estimate.value, yerr=np.maximum(error, 0), color=INK, linewidth=1, capsize=2)
            lowest, highest = min(lowest, estimate.low), max(highest, estimate.high)
        axes.bar(0, 0, color=COLOURS[index % len(COLOURS)], label=row.model)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylim(lowest, highest)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("Avg@n, 95 % interval", loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(rows) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _estimates(row: Row, titles: Sequence[str]) -> list[Estimate | None]:
    """Return the estimate of each set (None if missing) and, if there are several sets, their mean."""
    own = [Estimate(**row.sets[title]["avg_at_n"]) if title in row.sets else None for title in titles]
    return [*own, row.average_over(titles)] if len(titles) > 1 else own


def _differences(rows: Sequence[Row], titles: Sequence[str]) -> list[list[str]]:
    """Return the difference of each row to the first, for sets in which both were scored on the same problems."""
    lines = []
    for row in rows[1:]:
        cells = []
        for title in titles:
            ours, first = (r.sets.get(title, {}).get("scores", {}) for r in (row, rows[0]))
            same = bool(ours) and ours.keys() == first.keys()
            cells.append(_interval(paired_bootstrap([*ours.values()], [first[p] for p in ours])) if same else "-")
        lines.append([row.model, *cells])
    return lines if any(cell != "-" for line in lines for cell in line[1:]) else []


def _details(rows: Sequence[Row], title: str) -> str:
    """Return the table of pass@k, maj@k, mean length and truncated share on one set."""
    first = rows[0].sets[title]
    shares = [key for key in first if key.startswith(("avg_at", "pass_at", "maj_at", "truncated"))]
    header = ["", *(_heading(key, first["samples"]) for key in shares), "tokens", "problems"]
    lines = []
    for row in rows:
        summary = row.sets[title]
        figures = [_interval(Estimate(**summary[key])) if key in summary else "-" for key in shares]
        length = summary["length_mean"]
        lines.append([row.model, *figures, f"{length['value']:,.0f}", str(summary["problems"])])
    return _grid(header, lines)


def _heading(key: str, n: int) -> str:
    kind, _, k = key.partition("_at_")
    return f"{kind.capitalize() if kind == 'avg' else kind}@{n if k == 'n' else k}" if k else "truncated"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in [header, align, *lines])
