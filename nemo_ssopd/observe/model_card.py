"""The README.md of an exported model: its origin, its training and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from nemo_ssopd.config.run import Config
from nemo_ssopd.observe.report import Row, read_metrics, series

if TYPE_CHECKING:
    from nemo_ssopd.megatron.weights import Rounding

PAPER = "[Self-Supervised On-Policy Distillation](https://arxiv.org/abs/2605.17497)"
METRICS = {
    "eval/avg_at_n": "Avg@n on held-out problems",
    "eval/avg_at_n_low": "95 % interval, low",
    "eval/avg_at_n_high": "95 % interval, high",
    "eval/maj_at_n": "maj@n on held-out problems",
    "reward/mean": "training reward",
    "rollout/length_mean": "mean completion, tokens",
    "rollout/logprob_mismatch": "log-prob mismatch of trainer and engine",
}


def model_card(config: Config, step: int, run_dir: Path, *, dtype: str, rounding: Rounding | None) -> str:
    """Return the model card as Markdown. Its metrics are those of `run_dir`/metrics.jsonl up to `step`, if it exists.

    The weights are written in `dtype`. `rounding` is the loss from that, or None for an adapter by itself.
    """
    is_adapter = rounding is None
    rows = [row for row in _rows(run_dir) if (row["step"] or 0) <= step]
    kind = f"LoRA adapter of rank {config.lora.rank}" if is_adapter else "model"
    parts = [
        _front_matter(config, is_adapter=is_adapter),
        f"# {Path(config.run_dir).name}, step {step}",
        f"A {kind} trained by nemo_ssopd from `{config.model.path}` with {_method(config)}, for {step} steps.",
        _precision(config, dtype, rounding),
        "## Recipe",
        _table(("setting", "value"), _recipe(config)),
        "## Metrics",
        _table(("", "first", f"step {step}"), _metrics(rows))
        if rows
        else "No metrics were found beside the checkpoint.",
        "## Use",
        _use(config, is_adapter=is_adapter),
        "## Config",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.structured(config))}```",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(run_dir: Path) -> list[Row]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []


def _front_matter(config: Config, *, is_adapter: bool) -> str:
    lines = [
        f"base_model: {config.model.path}",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(['lora'] * is_adapter + [config.algorithm.name, 'reasoning'])}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _method(config: Config) -> str:
    name = config.algorithm.name
    return f"{name.upper()} ({PAPER})" if name == "ssopd" else name.upper()


def _precision(config: Config, dtype: str, rounding: Rounding | None) -> str:
    if rounding is None:
        return f"The adapter's matrices are the trained ones, in {dtype}: nothing was rounded."
    if not rounding.has_update:
        return f"The weights were trained in {config.model.dtype} and are written in {dtype}."
    kept = (
        f"The adapters were added to the weights in float32, and the sums are written in {dtype}. The written weights "
        f"keep {rounding.kept:.2%} of the adapters' update (its projection), with rounding errors of "
        f"{rounding.error:.2%} of the update's size."
    )
    if dtype == "float32":
        return kept
    return f"{kept} `scripts/export_hf.py --dtype float32` keeps all of it, and so does `--adapter-only`."


def _recipe(config: Config) -> list[tuple[str, str]]:
    algorithm, trainer, rollout = config.algorithm, config.trainer, config.rollout
    recipe: dict[str, object] = {"training data": config.data.train}
    if algorithm.name != "sft":
        recipe |= {
            "completions of each prompt": rollout.group_size,
            "sampling temperature": rollout.temperature,
            "longest completion, tokens": rollout.max_new_tokens,
        }
    if algorithm.name == "ssopd":
        recipe |= {
            "lambda_0": algorithm.lambda_0,
            "clip tau": algorithm.kl_clip,
            "distilled prefixes K": algorithm.prefix_tokens,
        }
    recipe |= {
        "prompts of a step": trainer.prompts_per_step,
        "trained": f"LoRA, rank {config.lora.rank}, alpha {config.lora.alpha:g}"
        if config.lora.enabled
        else "all weights",
        "learning rate": f"{config.optimizer.lr:g}",
        "trained in": config.model.dtype,
        "seed": trainer.seed,
    }
    return [(name, str(value)) for name, value in recipe.items()]


def _metrics(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for key, label in METRICS.items():
        if values := series(rows, key)[1]:
            lines.append((label, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return lines


def _use(config: Config, *, is_adapter: bool) -> str:
    if is_adapter:
        load = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{config.model.path}")\n'
            'model = PeftModel.from_pretrained(base, "PATH")'
        )
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH")'
        )
    return (
        f'```python\n{load}\ntokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n\n'
        f"Prompts in training were the chat template over:\n\n```\n{config.data.student_template}\n```"
    )


def _table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    cells = [header, ("---",) * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in cells)
