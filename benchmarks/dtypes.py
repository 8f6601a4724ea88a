"""Which part of a small update the types of the weights show, and how training goes in them. Writes docs/benchmarks.md.

    python benchmarks/dtypes.py                                       # the share of an update that is visible: a minute
    python scripts/sweep.py benchmarks/sweeps/dtypes.yaml             # training runs: about an hour on one core
    python benchmarks/dtypes.py --runs runs/dtypes                    # both tables, from the finished runs

Everything is on CPU with the demo model. Products of half-precision matrices are computed in float32 and rounded once,
as a GPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
PAGE, MODEL = ROOT / "docs" / "benchmarks.md", ROOT / "assets" / "demo_model"
CURVES, SMOOTHED = ROOT / "docs" / "images" / "dtypes.png", 5
RATE, STEPS, RANK, SCALE = 5e-6, (1, 10, 100), 16, 2.0
ROWS, LENGTH = 16, 64
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A and B of each projection, in float64."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the sweep's runs")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    sections = {"visible": visible_table([visible(name, steps) for name in HALF for steps in STEPS])}
    if arguments.runs:
        sections["dtypes"] = runs_table(arguments.runs)
        if not arguments.no_write:
            draw(arguments.runs, CURVES)
    for name, text in sections.items():
        print(text)
        if not arguments.no_write:
            write_section(name, text)


# ---- What of an update is visible ------------------------------------------------------------------------------------


def merged(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The adapter is added to the weight, which is rounded: refit=merged, exports."""
    return _product(x, (weight.double() + SCALE * b @ a).to(weight.dtype))


def merged_at_random(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Likewise, rounded up or down with the probability that makes the mean exact."""
    exact = weight.double() + SCALE * b @ a
    near = exact.to(weight.dtype)
    away = near.view(torch.int16) + torch.where((exact > near) == (near > 0), 1, -1).to(torch.int16)
    other = away.view(weight.dtype)
    chance = (exact - near.double()) / (other.double() - near.double())
    return _product(x, torch.where(torch.rand_like(chance) < chance, other, near))


def beside(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The adapter's output is added to the rounded output: the trainer, PEFT, vLLM with refit=adapter."""
    u = _product(x, a.to(x.dtype))
    return _product(x, weight) + SCALE * _product(u, b.to(x.dtype))


def rounded_once(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Both in float32, as one product of [x | u] with [W | scale B] adds them; then rounded."""
    u = _product(x, a.to(x.dtype))
    return (x.float() @ weight.float().T + SCALE * u.float() @ b.to(x.dtype).float().T).to(x.dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x @ weight.T + SCALE * (x @ a.T) @ b.T


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.float().T).to(x.dtype)


WAYS = {"merged": merged, "beside": beside, "rounded once": rounded_once, "merged, rounded at random": merged_at_random}


def visible(name: str, steps: int) -> dict[str, Any]:
    """For each way: the share of the update in a layer's output, and in the log-probs, with its cosine to the exact."""
    dtype = HALF[name]
    adapters = _adapters(dtype, steps)
    tokens = torch.randint(1, _load(torch.float64).config.vocab_size, (ROWS, LENGTH))
    truth, inputs = _logprobs(torch.float64, dtype, tokens, exact, adapters)
    change = truth - _logprobs(torch.float64, dtype, tokens, exact, _zeros(adapters))[0]
    row: dict[str, Any] = {"dtype": name, "steps": steps, "change": float(change.abs().mean())}
    for way, linear in WAYS.items():
        after = _logprobs(dtype, dtype, tokens, linear, adapters)[0]
        before = _logprobs(dtype, dtype, tokens, linear, _zeros(adapters))[0]
        shown = (after - before).flatten()
        row[way] = {
            "layer": _layers_share(linear, dtype, inputs, adapters),
            "logprobs": float(shown @ change.flatten() / change.flatten().square().sum()),
            "cosine": float(F.cosine_similarity(shown, change.flatten(), dim=0)),
        }
        row["noise"] = float((before - (truth - change)).abs().mean())
    return row


def _layers_share(linear: Callable, dtype: torch.dtype, inputs: dict[str, torch.Tensor], adapters: Weights) -> float:
    """<shown, exact> / <exact, exact> of the change of outputs, over all projections; inputs are the exact ones."""
    shown_exact = exact_exact = 0.0
    weights = {name: weight.to(dtype) for name, weight in _load(torch.float64).named_parameters()}
    for name, (a, b) in adapters.items():
        x, weight = inputs[name].to(dtype), weights[f"{name}.weight"]
        shown = linear(x, weight, a, b).double() - linear(x, weight, a, 0 * b).double()
        change = SCALE * (x.double() @ a.T) @ b.T
        shown_exact += float((shown * change).sum())
        exact_exact += float(change.square().sum())
    return shown_exact / exact_exact


def _adapters(dtype: torch.dtype, steps: int) -> Weights:
    """After steps of Adam of one sign each: B is steps x rate of either sign."""
    adapters = {}
    for name, layer in _load(torch.float64).named_modules():
        if isinstance(layer, nn.Linear) and "layers" in name:
            a = torch.empty(RANK, layer.in_features)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            b = steps * RATE * torch.randn(layer.out_features, RANK).sign()
            adapters[name] = a.to(dtype).double(), b.double()
    return adapters


def _zeros(adapters: Weights) -> Weights:
    return {name: (a, torch.zeros_like(b)) for name, (a, b) in adapters.items()}


def _load(dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 -- seconds

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def _logprobs(
    dtype: torch.dtype, grid: torch.dtype, tokens: torch.Tensor, linear: Callable, adapters: Weights
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of each next token, by a model in `dtype` whose weights lie on `grid`; and the inputs of every projection."""
    model, inputs = _load(torch.float64).to(grid).to(dtype), {}

    def forward(x: torch.Tensor, *, layer: nn.Linear, name: str) -> torch.Tensor:
        inputs[name] = x
        return linear(x, layer.weight, *adapters[name]) if name in adapters else product(x, layer.weight)

    product = _product if dtype is grid else F.linear
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(forward, layer=layer, name=name)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0], inputs


def visible_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## What of a small update is visible",
        "",
        f"`python benchmarks/dtypes.py`: the demo model on the grid of the type, adapters of rank {RANK} on all",
        f"projections after 1, 10 and 100 steps of Adam of one sign each at rate {RATE:g}. Share of the exact change",
        "(projected on it) in the outputs of the projections; share, and cosine with the exact change, in the",
        f"log-probs of {ROWS * (LENGTH - 1)} tokens. Last columns, in nats a token: the exact change, and what the",
        "type itself changes without any update. Simulated on CPU, not measured on a GPU.",
        "",
        "| type | steps | adapter | outputs | log-probs | cosine | exact change | noise of the type |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for way in WAYS:
            shown = row[way]
            lines.append(
                f"| {row['dtype']} | {row['steps']} | {way} | {shown['layer']:.0%} | {shown['logprobs']:.0%} "
                f"| {shown['cosine']:.2f} | {row['change']:.1e} | {row['noise']:.1e} |"
            )
    return "\n".join(lines)


# ---- Training runs ---------------------------------------------------------------------------------------------------


def runs_table(folder: Path) -> str:
    """Means over the seeds that are finished, and the range of Avg@12."""
    from nemo_ssopd.config.sections import ParallelConfig  # noqa: PLC0415 -- Megatron takes its time
    from nemo_ssopd.megatron.runtime import initialize  # noqa: PLC0415

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    runtime = initialize(ParallelConfig(world_size=1), seed=1)
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(folder.glob("*/seed_*/finished.json")):
        arms[record.parent.parent.name].append(run_figures(record.parent, runtime))
    if not arms:
        sys.exit(f"error: {folder} has no finished run: start scripts/sweep.py benchmarks/sweeps/dtypes.yaml")
    lines = [
        "## Types of the weights in training",
        "",
        "`python scripts/sweep.py benchmarks/sweeps/dtypes.yaml`, then `benchmarks/dtypes.py --runs runs/dtypes`:",
        "`tiny_cpu` on one process, 20 steps. Means over the seeds; Avg@12 after the last step with its range,",
        "mismatch and effective sample size over all steps, the share of the update that the merged weights hold,",
        "projected on the exact one, after 5 and after 20 steps. On CPU.",
        "",
        f"![training reward by step, mean of {SMOOTHED} steps and range over the seeds](images/dtypes.png)",
        "",
        "| type, rate | seeds | Avg@12 | mismatch, mean | worst step | worst token | effective sample size | visible, "
        "5 steps | 20 steps | skipped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in sorted(arms.items(), key=lambda item: (item[0].split("_")[1], item[0])):
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        scores = [run["score"] for run in runs]
        lines.append(
            f"| {arm.replace('_', ', ')} | {len(runs)} | {mean['score']:.1%} [{min(scores):.1%}, {max(scores):.1%}] "
            f"| {mean['mismatch']:.1e} | {max(run['worst'] for run in runs):.1e} "
            f"| {max(run['token'] for run in runs):.1e} | {mean['ess']:.6f} | {mean['early']:.0%} | {mean['late']:.0%} "
            f"| {mean['skipped']:g} |"
        )
    return "\n".join(lines)


def draw(folder: Path, path: Path) -> None:
    """Training reward by step: a panel for each rate, a line for each type, its range over the seeds shaded."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 -- the other table needs none

    plt.switch_backend("Agg")
    arms: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(folder.glob("*/seed_*/finished.json")):
        rows = [json.loads(line) for line in (record.parent / "metrics.jsonl").read_text().splitlines()]
        rewards = torch.tensor([row["reward/mean"] for row in rows if row["step"] > 0])
        name, rate, *more = record.parent.parent.name.split("_")
        arms[rate][" ".join([name, *more])].append(rewards.unfold(0, SMOOTHED, 1).mean(-1))
    figure, panels = plt.subplots(1, len(arms), figsize=(4 * len(arms), 3), sharey=True, squeeze=False)
    for panel, rate in zip(panels[0], sorted(arms, key=float), strict=True):
        for name, curves in sorted(arms[rate].items()):
            runs = torch.stack(curves)
            steps = range(SMOOTHED, SMOOTHED + runs.shape[1])
            panel.plot(steps, runs.mean(0), label=name)
            panel.fill_between(steps, runs.amin(0), runs.amax(0), alpha=0.12)
        panel.set(title=f"rate {rate}", xlabel="step")
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("training reward")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def run_figures(folder: Path, runtime: Any) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mismatches = [row["rollout/logprob_mismatch"] for row in rows]
    return {
        "score": rows[-1]["eval/avg_at_n"],
        "mismatch": statistics.mean(mismatches),
        "worst": max(mismatches),
        "token": max(row["rollout/logprob_mismatch_max"] for row in rows),
        "ess": statistics.mean(row["rollout/effective_sample_size"] for row in rows),
        "skipped": sum(row["optim/skipped_steps"] for row in rows),
        "early": merged_share(folder / "checkpoints" / "iter_0000005", runtime),
        "late": merged_share(folder / "checkpoints" / "iter_0000020", runtime),
    }


def merged_share(checkpoint: Path, runtime: Any) -> float:
    """<rounded, exact> / <exact, exact> of the change of all adapted weights."""
    from safetensors.torch import load_file  # noqa: PLC0415

    from nemo_ssopd.checkpoint.saved_model import open_checkpoint, stream_adapters  # noqa: PLC0415
    from nemo_ssopd.config.sections import ParallelConfig  # noqa: PLC0415
    from nemo_ssopd.megatron.model import DTYPES  # noqa: PLC0415

    saved = open_checkpoint(checkpoint, runtime, base=MODEL)
    assert saved.lora is not None
    base, dtype, scale = load_file(MODEL / "model.safetensors"), DTYPES[saved.dtype], saved.lora.alpha / saved.lora.rank
    matrices = {
        name.removeprefix("base_model.model."): tensor.double().clone()
        for name, tensor in stream_adapters(saved, ParallelConfig(world_size=1), runtime)
    }
    shown_exact = exact_exact = 0.0
    for name in [name.removesuffix(".lora_A.weight") for name in matrices if name.endswith(".lora_A.weight")]:
        weight = base[f"{name}.weight"].to(dtype).double()
        change = scale * matrices[f"{name}.lora_B.weight"] @ matrices[f"{name}.lora_A.weight"]
        shown = (weight + change).to(dtype).double() - weight
        shown_exact += float((shown * change).sum())
        exact_exact += float(change.square().sum())
    return shown_exact / exact_exact


def write_section(name: str, text: str) -> None:
    """Replaces what stands between our marks, or appends it."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, _, rest = PAGE.read_text().partition(start)
    PAGE.write_text(f"{before.rstrip()}\n\n{start}\n{text}\n{end}\n{rest.partition(end)[2].lstrip()}")


if __name__ == "__main__":
    main()
