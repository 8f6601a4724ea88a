"""From graded groups to what the teacher reads: the distilled completions, the witness of each, and their weights.

The teacher reads a prompt and then a completion's first K tokens, and its next-token distributions are the targets of
the student, which reads the same tokens behind its own prompt (paper eqs. 5, 8, 10 to 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.algo.selection import frontier_weight, is_correct, split
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.data.templates import render_teacher
from nemo_ssopd.evaluation.samples import Sample
from nemo_ssopd.groups import is_mixed, selected
from nemo_ssopd.metrics import Metrics, Sum
from nemo_ssopd.types import RenderedPrompt, RolloutGroup, TokenSequence


@dataclass(frozen=True)
class Lesson:
    """One distilled completion: its number among the groups' rollouts, what the teacher reads, and its weight.

    `away` is what a second teacher reads, whose pull is subtracted.

    >>> Lesson(row=9, teacher=TokenSequence((1, 5, 9, 7, 9, 2), prompt_length=4), weight=0.1875)
    """

    row: int
    teacher: TokenSequence
    weight: float
    away: TokenSequence | None = None


def lessons(
    groups: Sequence[RolloutGroup], config: Config, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[Lesson], Metrics]:
    """The distilled completions of one rank's groups.

    A completion without a witness, or whose teacher context is over `max_length` tokens, is left out and counted.
    """
    algorithm = config.algorithm
    planned: list[Lesson] = []
    dropped = {"long_teacher": 0, "no_witness": 0}
    first_row = 0
    for group, witness in zip(groups, witness_texts(groups, algorithm), strict=True):
        weight = frontier_weight(group.rewards, lambda_0=algorithm.lambda_0, shape=algorithm.frontier)
        chosen = targets(group, algorithm) if weight > 0 else []
        wrong = _wrong_attempt(group, algorithm) if algorithm.contrast > 0 else None
        prompt = None if witness is None else render_teacher(tokenizer, group.prompt, witness, config.data)
        away = None if wrong is None else render_teacher(tokenizer, group.prompt, wrong, config.data)
        for index in chosen:
            completion = group.rollouts[index].sequence
            prefix = completion.completion[: algorithm.prefixes]
            read = completion.prompt if algorithm.witness == "none" else prompt
            if read is None:
                dropped["no_witness"] += 1
            elif max(len(read), len(away or ())) + len(prefix) > max_length:
                dropped["long_teacher"] += 1
            else:
                planned.append(
                    Lesson(
                        row=first_row + index,
                        teacher=TokenSequence(read + prefix, len(read)),
                        weight=weight / len(chosen),
                        away=None if away is None else TokenSequence(away + prefix, len(away)),
                    )
                )
        first_row += len(group.rollouts)
    metrics: Metrics = {f"ssopd/dropped_{reason}": Sum(count) for reason, count in dropped.items()}
    return planned, {"ssopd/pairs": Sum(0), **metrics}


def targets(group: RolloutGroup, algorithm: AlgorithmConfig) -> list[int]:
    """Which completions of the group are distilled; with targets=every all, otherwise none of a uniform group's."""
    correct, wrong = split(group.rewards)
    if algorithm.targets == "every":
        return sorted(correct + wrong)
    if not is_mixed(group):
        return []
    return wrong if algorithm.targets == "every_wrong" else [selected(group, wrong, algorithm.wrong_selector)]


def witness_texts(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> list[str | None]:
    """What the teacher reads beside each group's problem; None where there is nothing to read.

    A shuffled witness is that of the next group with a correct completion, another prompt's.
    """
    if algorithm.witness == "solution":
        return [group.prompt.solution for group in groups]
    if algorithm.witness == "none":
        return [None] * len(groups)
    own = [_own_witness(group, algorithm.correct_selector) for group in groups]
    if algorithm.witness == "own":
        return own
    others = [[(g + step) % len(groups) for step in range(len(groups))] for g in range(len(groups))]
    return [
        next((own[o] for o in others[g] if own[o] is not None and groups[o].prompt.id != group.prompt.id), None)
        for g, group in enumerate(groups)
    ]


def held_out_teacher_prompts(
    samples: Sequence[Sample],
    prompts: Sequence[RenderedPrompt],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> list[RenderedPrompt]:
    """What the teacher reads before it answers held-out problems itself, for those that the policy solves in part.

    As in training, but for own witnesses by mean log-prob, which samples do not have: there the shortest is read.
    Problems without a witness, and prompts over `max_length` tokens, are left out.
    """
    longest = config.algorithm.correct_selector == "longest"
    witness: dict[str, str] = {}
    for sample in sorted(samples, key=lambda sample: -sample.tokens if longest else sample.tokens):
        if is_correct(sample.reward):
            witness.setdefault(sample.problem, sample.text)
    wrong = {sample.problem for sample in samples if not is_correct(sample.reward)}
    mixed = [prompt for prompt in prompts if prompt.prompt.id in witness and prompt.prompt.id in wrong]
    if config.algorithm.witness == "none":
        return mixed
    texts: list[str | None] = [witness[prompt.prompt.id] for prompt in mixed]
    if config.algorithm.witness == "solution":
        texts = [prompt.prompt.solution for prompt in mixed]
    if config.algorithm.witness == "shuffled":
        texts = texts[1:] + texts[:1] if len(mixed) > 1 else []
    rendered = [
        RenderedPrompt(prompt.prompt, render_teacher(tokenizer, prompt.prompt, text, config.data))
        for prompt, text in zip(mixed, texts, strict=False)
        if text is not None
    ]
    return [prompt for prompt in rendered if len(prompt.tokens) < max_length]


def _wrong_attempt(group: RolloutGroup, algorithm: AlgorithmConfig) -> str | None:
    _, wrong = split(group.rewards)
    return group.rollouts[selected(group, wrong, algorithm.wrong_selector)].completion.text if wrong else None


def _own_witness(group: RolloutGroup, selector: str) -> str | None:
    correct, _ = split(group.rewards)
    return group.rollouts[selected(group, correct, selector)].completion.text if correct else None
