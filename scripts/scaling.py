"""Predict the step time on 8 to 1024 GPUs: python scripts/scaling.py      # writes docs/scaling.md and its plot

    python scripts/scaling.py --set length_median=4000 update_efficiency=0.42 decode_fixed_s=0.009     # measured rates

Simulates the shipped GPU configs (or --config-name NAME ...) with `tools.scaling`. With --set or --config-name it
prints and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from tools.memory_plan import load  # noqa: E402
from tools.scaling import Rates, Step, simulate  # noqa: E402

PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.png"
CONFIGS = ("qwen3_1p7b_tp1", "qwen3_4b_tp1", "qwen3_8b_tp2")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG_PROMPTS = 1024
IN_TABLES = (8, 64, 256, 1024)
WHAT_IF = {  # for the last config, on 64 GPUs
    "as shipped": [],
    "engines of one GPU, twice as many": ["engine.tensor=1"],
    "more cache for the engine": ["engine.gpu_memory_utilization=0.75"],
    "completions cut at 8000 tokens": ["rollout.max_new_tokens=8000"],
    "no recomputation": ["model.recompute=false", "trainer.token_budget=18048"],
    "four times the prompts": ["trainer.prompts_per_step=128"],
}
COLORS = {
    "rollout": "#4477aa",
    "verify": "#ccbb44",
    "teacher": "#aa3377",
    "update": "#228833",
    "gradients": "#ee6677",
    "refit": "#66ccee",
}


@dataclass(frozen=True)
class Curve:
    """Steps of one config over GPUS: with the shipped prompts per GPU (weak), and with a fixed batch (strong)."""

    name: str
    weak: list[Step]
    strong: list[Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", nargs="+", metavar="NAME", help=f"instead of {', '.join(CONFIGS)}")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="rates: fields of scaling.Rates")
    arguments = parser.parse_args()
    try:
        rates = rates_with(arguments.set)
        curves = [curve(name, rates) for name in arguments.config_name or CONFIGS]
    except ValueError as error:
        sys.exit(f"error: {error}")
    weak = "Prompts grow with the GPUs (4 for each)", [c.weak for c in curves]
    strong = f"A fixed batch of {STRONG_PROMPTS} prompts", [c.strong for c in curves]
    tables = [stage_table(title, curves, steps) for title, steps in (weak, strong)]
    text = "\n".join([*tables, what_if_table(rates), lengths_table(rates)])
    if arguments.set or arguments.config_name:
        print(text)
        return
    start, end = "<!-- scaling:start -->", "<!-- scaling:end -->"
    before, _, rest = PAGE.read_text().partition(start)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")
    draw(curves)
    print(f"{PAGE.relative_to(ROOT)}\n{PLOT.relative_to(ROOT)}")


def rates_with(settings: list[str]) -> Rates:
    """Return the assumed rates with NAME=VALUE replaced; ValueError for an unknown name."""
    known = {field.name for field in fields(Rates)}
    changes: dict[str, float] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known:
            raise ValueError(f"--set {setting}: {name!r} is no rate; use one of {', '.join(sorted(known))}")
        changes[name] = float(value)
    return replace(Rates(), **changes)  # type: ignore[arg-type]  # every field is a float


def curve(name: str, rates: Rates) -> Curve:
    config, hf = load(name, [])
    per_gpu = config.trainer.prompts_per_step / config.parallel.world_size

    def steps(prompts_of: dict[int, int]) -> list[Step]:
        rng = np.random.default_rng(1)
        return [
            mean([simulate(config, hf, gpus=gpus, prompts=prompts, rates=rates, rng=rng) for _ in range(trials(gpus))])
            for gpus, prompts in prompts_of.items()
        ]

    return Curve(
        name,
        weak=steps({gpus: round(gpus * per_gpu) for gpus in GPUS}),
        strong=steps({gpus: STRONG_PROMPTS for gpus in GPUS}),
    )


def trials(gpus: int) -> int:
    """Return how many draws of the lengths to average: more on few ranks, where the maximum varies more."""
    return max(4, 256 // gpus)


def mean(draws: list[Step]) -> Step:
    """Return the mean of several draws of the lengths."""

    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    return Step(
        stages={stage: average([draw.stages[stage] for draw in draws]) for stage in draws[0].stages},
        tokens=round(average([draw.tokens for draw in draws])),
        asynchronous=average([draw.asynchronous for draw in draws]),
        balanced_rollout=average([draw.balanced_rollout for draw in draws]),
        adapter_refit=average([draw.adapter_refit for draw in draws]),
    )


# ---- Tables ----------------------------------------------------------------------------------------------------------


def stage_table(title: str, curves: list[Curve], steps: list[list[Step]]) -> str:
    lines = [
        f"\n### {title}\n",
        "| config | GPUs | step, s | rollout | teacher | update | gradients | refit | tokens/s/GPU | asynchronous, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c, of_config in zip(curves, steps, strict=True):
        for gpus, step in zip(GPUS, of_config, strict=True):
            if gpus in IN_TABLES:
                lines.append(f"| `{c.name}` | {gpus} | {_cells(step, gpus)} |")
    return "\n".join(lines)


def _cells(step: Step, gpus: int) -> str:
    shares = [f"{step.stages[stage] / step.seconds:.1%}" for stage in ("rollout", "teacher", "update")]
    small = [f"{step.stages[stage] / step.seconds:.2%}" for stage in ("gradients", "refit")]
    rate = f"{step.tokens / step.seconds / gpus:,.0f}"
    return " | ".join([f"{step.seconds:.0f}", *shares, *small, rate, f"{step.asynchronous:.0f}"])


def what_if_table(rates: Rates) -> str:
    """Return a table of the effect of config changes and of two design changes."""
    name, gpus = CONFIGS[-1], 64
    lines = [
        f"\n### What would change it (`{name}`, {gpus} GPUs)\n",
        "| change | step, s | rollout, s | update, s | refit, s | tokens/s/GPU |",
        "|---|---|---|---|---|---|",
    ]

    def line(change: str, step: Step, seconds: float, *stages: str) -> str:
        return f"| {change} | {seconds:.0f} | {' | '.join(stages)} | {step.tokens / seconds / gpus:,.0f} |"

    steps = {change: _drawn(name, overrides, gpus, rates) for change, overrides in WHAT_IF.items()}
    for change, step in steps.items():
        overrides = f": `{' '.join(WHAT_IF[change])}`" if WHAT_IF[change] else ""
        stages = (f"{step.stages['rollout']:.0f}", f"{step.stages['update']:.0f}", f"{step.stages['refit']:.2f}")
        lines.append(line(change + overrides, step, step.seconds, *stages))
    shipped = steps["as shipped"]
    without = shipped.seconds - shipped.stages["refit"] + shipped.adapter_refit
    stages = (f"{shipped.stages['rollout']:.0f}", f"{shipped.stages['update']:.0f}", f"{shipped.adapter_refit:.3f}")
    lines.append(line("refit with adapters alone (`rollout.refit=adapter`)", shipped, without, *stages))
    lines.append(line("asynchronous rollouts, separate engines (not built)", shipped, shipped.asynchronous, "", "", ""))
    return "\n".join(lines)


def lengths_table(rates: Rates) -> str:
    """Return a table of the rollout stage for several spreads of the lengths, at the same median."""
    name, gpus = CONFIGS[-1], 64
    lines = [
        f"\n### The longest completion (`{name}`, {gpus} GPUs)\n",
        "| sigma of log length | mean length | rollout, s | shared evenly, s | waiting |",
        "|---|---|---|---|---|",
    ]
    for sigma in (0.0, 0.3, 0.6, 0.9):
        step = _drawn(name, [], gpus, replace(rates, length_sigma=sigma))
        rollout = step.stages["rollout"]
        mean_length = step.tokens / _sequences(name, [], gpus)
        waiting = 1 - step.balanced_rollout / rollout
        lines.append(f"| {sigma} | {mean_length:,.0f} | {rollout:.0f} | {step.balanced_rollout:.0f} | {waiting:.0%} |")
    return "\n".join(lines)


def _drawn(name: str, overrides: list[str], gpus: int, rates: Rates) -> Step:
    """Return the mean step, with as many prompts for each GPU as the config has."""
    config, hf = load(name, overrides)
    prompts, rng = _sequences(name, overrides, gpus) // config.rollout.group_size, np.random.default_rng(1)
    return mean([simulate(config, hf, gpus=gpus, prompts=prompts, rates=rates, rng=rng) for _ in range(trials(gpus))])


def _sequences(name: str, overrides: list[str], gpus: int) -> int:
    config, _ = load(name, overrides)
    return gpus * config.trainer.prompts_per_step // config.parallel.world_size * config.rollout.group_size


# ---- Plot ------------------------------------------------------------------------------------------------------------


def draw(curves: list[Curve]) -> None:
    figure, axes = plt.subplots(2, len(curves), figsize=(4.4 * len(curves) + 1.5, 7.4), layout="constrained")
    for (top, bottom), c in zip(axes.T, curves, strict=True):
        _draw_stages(top, c)
        _draw_strong(bottom, c)
    axes[0, 0].set_ylabel("seconds of a step, 4 prompts per GPU")
    axes[1, 0].set_ylabel(f"seconds of a step, {STRONG_PROMPTS} prompts")
    for row in axes:
        row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("A model, not a measurement: step time on H100s from public specifications and assumed rates")
    figure.savefig(PLOT, dpi=100)
    plt.close(figure)


def _draw_stages(axes: plt.Axes, c: Curve) -> None:
    positions, bottom = np.arange(len(GPUS)), np.zeros(len(GPUS))
    for stage, color in COLORS.items():
        heights = np.array([step.stages[stage] for step in c.weak])
        axes.bar(positions, heights, 0.7, bottom=bottom, color=color, label=stage)
        bottom += heights
    axes.plot(positions, [step.asynchronous for step in c.weak], "k_", markersize=16, label="asynchronous rollouts")
    axes.set_xticks(positions, [str(gpus) for gpus in GPUS], fontsize=8)
    axes.set_title(c.name)
    axes.set_xlabel("GPUs")


def _draw_strong(axes: plt.Axes, c: Curve) -> None:
    seconds = [step.seconds for step in c.strong]
    axes.loglog(GPUS, seconds, "o-", color="black", label="step")
    for stage in ("rollout", "update", "gradients", "refit"):
        axes.loglog(GPUS, [step.stages[stage] for step in c.strong], color=COLORS[stage], label=stage)
    axes.loglog(GPUS, [step.asynchronous for step in c.strong], "k--", label="asynchronous rollouts")
    axes.loglog(GPUS, [seconds[0] * GPUS[0] / gpus for gpus in GPUS], ":", color="gray", label="ideal")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("GPUs")


if __name__ == "__main__":
    main()
