"""Turns the finished runs of sweeps into a comparison: raw metrics, tables with intervals, learning curves.

    python benchmarks/recipes.py collect runs/products docs/results/products.jsonl
    python benchmarks/recipes.py compare docs/results/products.jsonl --output docs/results/products

`collect` keeps, of every run with a finished.json, the evaluation curve and what explains it: a few KB. `compare` needs
that file alone, and writes OUTPUT.md and OUTPUT.png. Runs are paired when they differ in `--axis` only: the same warm
start and seed, hence the same prompts in the same order and as many rollouts.

Final: Avg@n after the last step. AUC: the mean of Avg@n over the evaluations after step 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from nemo_ssopd.algo.selection import is_correct
from nemo_ssopd.evaluation.samples import read_samples
from nemo_ssopd.evaluation.statistics import Estimate, paired_bootstrap, t_interval
from nemo_ssopd.observe.report import COLOURS, Row, read_metrics, series

STEP_KEYS = (
    "reward/mean",
    "group/mixed_fraction",
    "rollout/length_mean",
    "loss/entropy",
    "loss/sft",
    "optim/grad_norm",
    "ssopd/kl_unclipped",
    "ssopd/clipped_positions",
    "ssopd/clipped_mass",
    "ssopd/correct_length",
    "ssopd/wrong_length",
    "ssopd/pairs",
)
EVAL_KEYS = ("eval/avg_at_n", "eval/maj_at_n", "eval/length_mean", "eval/teacher_accuracy")


@dataclass(frozen=True)
class FinishedRun:
    """What the comparison knows of one run; one line of the raw metrics.

    >>> FinishedRun(levels={"start": "1", "recipe": "grpo"}, seed=1, ...)
    """

    levels: dict[str, str]
    seed: int
    overrides: list[str]
    seconds: float
    """Wall-clock seconds of the whole run, on a machine that other work may have shared."""
    cpu_seconds: float
    seconds_per_step: float
    """Median of time/step."""
    rollouts: int
    tokens: int
    """Sampled tokens; for SFT the trained ones."""
    final_correct: list[int]
    """Correct samples of each held-out problem after the last step, in the problems' order."""
    evaluations: dict[str, dict[str, float]]
    """Metric -> step -> value."""
    steps: dict[str, list[float | None]]
    """Metric -> value at each step from 1; None where it was not logged."""

    @property
    def curve(self) -> dict[int, float]:
        return {int(step): value for step, value in self.evaluations["eval/avg_at_n"].items()}

    @property
    def final(self) -> float:
        return self.curve[max(self.curve)]

    @property
    def auc(self) -> float:
        return float(np.mean([value for step, value in self.curve.items() if step > 0]))


# ---- Raw metrics -----------------------------------------------------------------------------------------------------


def collect(sweep_dir: Path) -> list[FinishedRun]:
    """Every finished run below the folder, in the order of their paths."""
    return [finished_run(path.parent) for path in sorted(sweep_dir.rglob("finished.json"))]


def finished_run(run_dir: Path) -> FinishedRun:
    record, rows = json.loads((run_dir / "finished.json").read_text()), read_metrics(run_dir)
    config = OmegaConf.load(run_dir / "config.yaml")
    steps = [row for row in rows if row["step"]]
    samples = read_samples(run_dir / "eval" / f"step_{config.trainer.max_steps:06}.jsonl")
    correct: dict[str, int] = defaultdict(int)
    for sample in samples:
        correct[sample.problem] += is_correct(sample.reward)
    per_prompt = 0 if config.algorithm.name == "sft" else config.rollout.group_size
    return FinishedRun(
        levels=record["levels"],
        seed=record["seed"],
        overrides=record["overrides"],
        seconds=record["seconds"],
        cpu_seconds=record["cpu_seconds"],
        seconds_per_step=round(float(np.median([row["time/step"] for row in steps])), 3),
        rollouts=len(steps) * config.trainer.prompts_per_step * per_prompt,
        tokens=int(sum(series(steps, "progress/tokens")[1])),
        final_correct=list(correct.values()),
        evaluations={key: evaluations(rows, key) for key in EVAL_KEYS if any(key in row for row in rows)},
        steps={key: [rounded(row.get(key)) for row in steps] for key in STEP_KEYS if any(key in row for row in steps)},
    )


def evaluations(rows: Sequence[Row], key: str) -> dict[str, float]:
    return {str(int(step)): value for step, value in zip(*series(rows, key), strict=True)}


def rounded(value: float | None) -> float | None:
    """Four digits: enough for a plot, and half the size."""
    return None if value is None else float(f"{value:.4g}")


def read_runs(path: Path) -> list[FinishedRun]:
    return [FinishedRun(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- The comparison --------------------------------------------------------------------------------------------------

Pairing = tuple[str, ...]
"""All levels of a run but its arm's, and its seed: what paired runs share."""
SCORES: dict[str, Callable[[FinishedRun], float]] = {"final": lambda run: run.final, "AUC": lambda run: run.auc}


def by_arm(runs: Sequence[FinishedRun], axes: Sequence[str]) -> dict[str, dict[Pairing, FinishedRun]]:
    """The runs of each combination of levels of `axes`, in their order. ValueError for two runs in the same place."""
    arms: dict[str, dict[Pairing, FinishedRun]] = defaultdict(dict)
    for run in runs:
        arm = " ".join(run.levels[name] for name in axes)
        pairing = (*(level for name, level in run.levels.items() if name not in axes), str(run.seed))
        if pairing in arms[arm]:
            raise ValueError(f"two runs of {arm} at {', '.join(pairing)}: compare each run once")
        arms[arm][pairing] = run
    return dict(arms)


def differences(
    ours: Mapping[Pairing, FinishedRun], theirs: Mapping[Pairing, FinishedRun], score: Callable[[FinishedRun], float]
) -> dict[Pairing, float]:
    """Our score minus theirs, for every pair."""
    return {key: score(ours[key]) - score(theirs[key]) for key in sorted(ours.keys() & theirs.keys())}


def table(runs: Sequence[FinishedRun], axes: Sequence[str], baseline: str, confidence: float = 0.95) -> str:
    """Markdown: the scores and costs of each arm, then each arm against the baseline over all pairs and by start."""
    arms, axis = by_arm(runs, axes), " ".join(axes)
    mean = partial(t_interval, confidence=confidence)
    lines = [
        f"| {axis} | runs | final Avg@n | AUC | rollouts | tokens | s / step | CPU s / run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, by_pairing in arms.items():
        own = list(by_pairing.values())
        cells = [arm, str(len(own)), *(percent(mean([score(run) for run in own])) for score in SCORES.values())]
        cells += [f"{np.mean([run.rollouts for run in own]):.0f}", f"{np.mean([run.tokens for run in own]):.0f}"]
        cells += [f"{np.median([run.seconds_per_step for run in own]):.2f}"]
        cells += [f"{np.mean([run.cpu_seconds for run in own]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Against {baseline}, in points of Avg@n, {100 * confidence:g} % intervals over the pairs:", ""]
    lines += [
        f"| {axis} | score | pairs | difference, paired t | paired bootstrap | by {', '.join(others(runs, axes))} |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for arm in arms:
        for name, score in SCORES.items():
            found = differences(arms[arm], arms[baseline], score)
            if arm != baseline and len(found) > 1:
                values = list(found.values())
                resampled = paired_bootstrap(values, np.zeros(len(values)), confidence=confidence)
                cells = [arm, name, str(len(values)), points(mean(values)), points(resampled), by_group(found)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def others(runs: Sequence[FinishedRun], axes: Sequence[str]) -> list[str]:
    return [name for name in runs[0].levels if name not in axes] or ["nothing else"]


def by_group(found: Mapping[Pairing, float]) -> str:
    """The mean difference of each combination of the other levels, seeds averaged."""
    groups: dict[str, list[float]] = defaultdict(list)
    for (*levels, _), value in found.items():
        groups["/".join(levels)].append(value)
    return ", ".join(f"{name}: {np.mean(values) * 100:+.1f}".removeprefix(": ") for name, values in groups.items())


def percent(interval: Estimate) -> str:
    return f"{interval.value * 100:.1f} % [{interval.low * 100:.1f}, {interval.high * 100:.1f}]"


def points(interval: Estimate) -> str:
    return f"{interval.value * 100:+.1f} [{interval.low * 100:+.1f}, {interval.high * 100:+.1f}]"


# ---- The figure ------------------------------------------------------------------------------------------------------

PANELS = (
    ("Held-out Avg@n", None),
    ("Training reward", "reward/mean"),
    ("Tokens of a completion", "rollout/length_mean"),
)
MORE_PANELS = (("Entropy", "loss/entropy"), ("Unclipped KL", "ssopd/kl_unclipped"), ("KL cut", "ssopd/clipped_mass"))


def draw(runs: Sequence[FinishedRun], axes: Sequence[str], title: str) -> Figure:
    """Means over the runs of an arm, with the t interval of the mean as a band."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(title)
    for plot, (name, key) in zip(figure.subplots(2, 3).flat, PANELS + MORE_PANELS, strict=True):
        plot.set_title(name, fontsize=10)
        plot.set_xlabel("step", fontsize=8)
        for colour, (arm, by_pairing) in zip(itertools.cycle(COLOURS), by_arm(runs, axes).items(), strict=False):
            curves = [run.curve if key is None else step_curve(run, key) for run in by_pairing.values()]
            steps = sorted({step for curve in curves for step in curve})
            means = [t_interval([curve[step] for curve in curves if step in curve]) for step in steps]
            plot.plot(steps, [m.value for m in means], color=colour, label=arm, linewidth=1.5)
            plot.fill_between(
                steps, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.2, linewidth=0
            )
    figure.axes[0].legend(fontsize=8)
    return figure


def step_curve(run: FinishedRun, key: str) -> dict[int, float]:
    return {step: value for step, value in enumerate(run.steps.get(key, []), 1) if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="raw metrics of a sweep's finished runs")
    collecting.add_argument("sweep_dir", type=Path)
    collecting.add_argument("output", type=Path, help="a .jsonl file")
    comparing = commands.add_parser("compare", help="tables and curves from raw metrics")
    comparing.add_argument("metrics", type=Path, nargs="+", help=".jsonl files that collect wrote")
    comparing.add_argument(
        "--axis", nargs="+", default=["recipe"], help="axes whose levels are the arms (default recipe)"
    )
    comparing.add_argument(
        "--baseline", default="grpo", help="the arm that the others are compared with (default grpo)"
    )
    comparing.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals in the table (default 0.95)"
    )
    comparing.add_argument("--output", type=Path, required=True, help="without its ending: .md and .png are added")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        lines = [json.dumps(asdict(run)) + "\n" for run in collect(arguments.sweep_dir)]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines)} runs in {arguments.output}")
        return
    runs = [run for path in arguments.metrics for run in read_runs(path)]
    sources = ", ".join(path.name for path in arguments.metrics)
    if arguments.baseline not in by_arm(runs, arguments.axis):
        sys.exit(f"error: no run of {arguments.baseline} in {sources}: name another --baseline")
    text = f"From {sources}.\n\n" + table(runs, arguments.axis, arguments.baseline, arguments.confidence)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(runs, arguments.axis, sources).savefig(arguments.output.with_suffix(".png"), dpi=80)
    print(text)


if __name__ == "__main__":
    main()
