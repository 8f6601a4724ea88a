"""Graded completions of held-out problems: draw, write, read and summarize them.

Evaluations during training and scripts/evaluate.py both use this module, with the engine and the grader of training.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_ssopd.config.sections import EvaluationConfig
from nemo_ssopd.evaluation.statistics import Estimate, summarise
from nemo_ssopd.metrics import Max, Metrics
from nemo_ssopd.rollout.collector import RolloutCollector, Sampling, request_seed
from nemo_ssopd.types import RenderedPrompt

Place = tuple[str, int]
"""A problem's id and the number of the sample, from 0."""


@dataclass(frozen=True)
class Sample:
    """One graded completion of the evaluation.

    >>> Sample("e-1", sample=0, reward=1.0, reason="correct", answer="8", gold="8", tokens=9, truncated=False, text="")
    """

    problem: str
    sample: int
    reward: float
    reason: str
    answer: str | None
    gold: str
    tokens: int
    truncated: bool
    text: str

    @property
    def place(self) -> Place:
        return self.problem, self.sample


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def evaluate(
    collector: RolloutCollector,
    prompts: Sequence[RenderedPrompt],
    config: EvaluationConfig,
    *,
    dp_rank: int,
    dp_size: int,
    cpu_group: dist.ProcessGroup,
    batch: int | None = None,
    done: Collection[Place] = frozenset(),
) -> Iterator[list[Sample]]:
    """Yield `config.samples` graded completions of every problem, except those `done`, in order, on every rank.

    They come in batches of `batch` problems, which all data-parallel ranks share (None: all at once). A sample's seed
    depends only on `config.seed`, the problem and the sample's number. So layout, batch size and interruptions do not
    change it.
    """
    size = batch or max(len(prompts), 1)
    for start in range(0, len(prompts), size):
        wanted = [
            (prompt, [k for k in range(config.samples) if (prompt.prompt.id, k) not in done])
            for prompt in prompts[start : start + size]
        ]
        wanted = [(prompt, numbers) for prompt, numbers in wanted if numbers]
        if not wanted:
            continue
        local = _draw(collector, wanted[dp_rank::dp_size], config)
        gathered: list[Any] = [None] * cpu_group.size()
        dist.all_gather_object(gathered, local, group=cpu_group)
        by_place = {sample.place: sample for part in gathered for sample in part}
        yield [by_place[prompt.prompt.id, k] for prompt, numbers in wanted for k in numbers]


def _draw(
    collector: RolloutCollector, wanted: Sequence[tuple[RenderedPrompt, list[int]]], config: EvaluationConfig
) -> list[Sample]:
    """Draw and grade the samples with these numbers for each problem. All ranks of a tensor-parallel group call it."""
    sampling = Sampling(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )
    seeds = [[request_seed(config.seed, "eval", prompt.prompt.id, k) for k in numbers] for prompt, numbers in wanted]
    groups = collector.generate([prompt.tokens for prompt, _ in wanted], seeds=seeds, sampling=sampling)
    completions = [completion for group in groups for completion in group]
    places = [(prompt.prompt, k) for prompt, numbers in wanted for k in numbers]
    verdicts = collector.grade(completions, [prompt for prompt, _ in places])
    return [
        Sample(
            problem=prompt.id,
            sample=k,
            reward=verdict.reward,
            reason=verdict.reason,
            answer=verdict.answer,
            gold=prompt.answer,
            tokens=len(completion.tokens),
            truncated=completion.finish_reason == "length",
            text=completion.text,
        )
        for (prompt, k), completion, verdict in zip(places, completions, verdicts, strict=True)
    ]


# ---- Summing up ------------------------------------------------------------------------------------------------------


def summary_of(samples: Sequence[Sample], config: EvaluationConfig, *, threshold: float) -> dict[str, Estimate]:
    """Return Avg@n, pass@k, maj@k, mean length and truncated share, each with a bootstrap interval over problems.

    `samples` hold `config.samples` of each problem, one problem after the other.
    """
    n = config.samples
    rows = [samples[start : start + n] for start in range(0, len(samples), n)]
    return summarise(
        rewards_PN=[[sample.reward for sample in row] for row in rows],
        answers_PN=[[sample.answer for sample in row] for row in rows],
        lengths_PN=[[sample.tokens for sample in row] for row in rows],
        truncated_PN=[[sample.truncated for sample in row] for row in rows],
        threshold=threshold,
        seed=config.seed,
    )


def eval_metrics(summary: Mapping[str, Estimate]) -> Metrics:
    """Return the estimates as metrics, with the ends of their intervals under NAME_low and NAME_high."""
    metrics: Metrics = {}
    for key, estimate in summary.items():
        metrics |= {key: Max(estimate.value), f"{key}_low": Max(estimate.low), f"{key}_high": Max(estimate.high)}
    return metrics


# ---- Files -----------------------------------------------------------------------------------------------------------


def to_lines(samples: Sequence[Sample]) -> str:
    """Return one line per sample: a JSON object in ASCII, which can hold any text."""
    return "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write a file of samples, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(to_lines(samples), encoding="utf-8")
    temporary.replace(path)


def read_samples(path: Path) -> list[Sample]:
    """Read the samples of a file in its order. An incomplete last line is left out.

    ValueError for a line that is not a sample, or for a repeated sample.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    samples: dict[Place, Sample] = {}
    for number, line in enumerate(lines, 1):
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a sample ({error}): remove the line") from None
        if sample.place in samples:
            raise ValueError(f"{path}, line {number} repeats sample {sample.sample} of {sample.problem}: remove one")
        samples[sample.place] = sample
    return list(samples.values())
