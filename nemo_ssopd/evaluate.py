"""Avg@n, pass@k and maj@k on held-out problems, with the engine and the verifier of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_ssopd.config import EvaluationConfig
from nemo_ssopd.metrics import Max, Metrics
from nemo_ssopd.rollout.collect import RolloutCollector, Sampling, request_seed
from nemo_ssopd.statistics import Estimate, summarise
from nemo_ssopd.types import RenderedPrompt


@dataclass(frozen=True)
class Sample:
    """One graded completion of the evaluation.

    >>> Sample("eval-1", sample=0, reward=1.0, reason="correct", answer="8", tokens=9, truncated=False, text="...")
    """

    problem: str
    sample: int
    reward: float
    reason: str
    answer: str | None
    tokens: int
    truncated: bool
    text: str


def evaluate(
    collector: RolloutCollector,
    prompts: Sequence[RenderedPrompt],
    config: EvaluationConfig,
    *,
    dp_rank: int,
    dp_size: int,
    cpu_group: dist.ProcessGroup,
) -> list[Sample]:
    """`config.samples` graded completions of every problem, in order, on every rank.

    A sample's seed depends on the problem and its number alone, so that the figure does not depend on the layout.
    """
    mine = prompts[dp_rank::dp_size]
    sampling = Sampling(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )
    seeds = [[request_seed(config.seed, "eval", p.prompt.id, k) for k in range(config.samples)] for p in mine]
    groups = collector.generate([p.tokens for p in mine], seeds=seeds, sampling=sampling)
    completions = [completion for group in groups for completion in group]
    verdicts = collector.grade(completions, [p.prompt.answer for p in mine for _ in range(config.samples)])
    local = [
        Sample(
            problem=mine[index // config.samples].prompt.id,
            sample=index % config.samples,
            reward=verdict.reward,
            reason=verdict.reason,
            answer=verdict.answer,
            tokens=len(completion.tokens),
            truncated=completion.finish_reason == "length",
            text=completion.text,
        )
        for index, (completion, verdict) in enumerate(zip(completions, verdicts, strict=True))
    ]
    gathered: list[Any] = [None] * cpu_group.size()
    dist.all_gather_object(gathered, local, group=cpu_group)
    by_place = {(sample.problem, sample.sample): sample for part in gathered for sample in part}
    return [by_place[p.prompt.id, k] for p in prompts for k in range(config.samples)]


def summary_of(samples: Sequence[Sample], config: EvaluationConfig) -> dict[str, Estimate]:
    """Avg@n, pass@n, maj@n, mean length and truncated share, each with a bootstrap interval over problems."""
    n = config.samples
    rows = [samples[start : start + n] for start in range(0, len(samples), n)]
    return summarise(
        rewards_PN=[[sample.reward for sample in row] for row in rows],
        answers_PN=[[sample.answer for sample in row] for row in rows],
        lengths_PN=[[sample.tokens for sample in row] for row in rows],
        truncated_PN=[[sample.truncated for sample in row] for row in rows],
        seed=config.seed,
    )


def eval_metrics(summary: Mapping[str, Estimate]) -> Metrics:
    """The estimates, and the ends of their intervals under NAME_low and NAME_high."""
    metrics: Metrics = {}
    for key, estimate in summary.items():
        metrics |= {key: Max(estimate.value), f"{key}_low": Max(estimate.low), f"{key}_high": Max(estimate.high)}
    return metrics


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object per sample, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples), encoding="utf-8")
    temporary.replace(path)
