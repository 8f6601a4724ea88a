"""The teacher: the context that it reads for each distilled completion, and its forward pass.

The teacher reads a prompt with a witness and then a completion's first K tokens. Its next-token distributions are the
targets of the student, which reads the same tokens after its own prompt (paper eqs. 5, 8, 10 to 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.algo.groups import is_mixed, selected
from nemo_ssopd.algo.selection import frontier_weight, is_correct, split
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.data.templates import render_teacher
from nemo_ssopd.evaluation.samples import Sample
from nemo_ssopd.metrics import Metrics, Sum
from nemo_ssopd.types import RenderedPrompt, RolloutGroup, TeacherContext, TokenSequence, TrainExample

if TYPE_CHECKING:  # Megatron-Core is needed for the annotation only
    from nemo_ssopd.megatron.policy import MegatronPolicy


def read_by_teacher(examples: Sequence[TrainExample], policy: MegatronPolicy) -> list[TrainExample]:
    """Add the teacher's hidden states to the examples that have a teacher context."""
    contexts = [example.teacher for example in examples if example.teacher is not None]
    contrasts = [context.contrast for context in contexts if context.contrast is not None]
    with policy.teacher():
        states = policy.hidden_states([context.sequence for context in contexts] + contrasts)
    teacher_states, contrast_states = iter(states[: len(contexts)]), iter(states[len(contexts) :])
    return [
        example
        if example.teacher is None
        else replace(
            example,
            teacher_states=next(teacher_states),
            contrast_states=None if example.teacher.contrast is None else next(contrast_states),
        )
        for example in examples
    ]


def teacher_contexts(
    groups: Sequence[RolloutGroup], config: Config, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[list[TeacherContext | None]], Metrics]:
    """Return one context or None for each completion of each group of one rank.

    A completion without a witness, or whose context is over `max_length` tokens, is left out and counted.
    """
    algorithm = config.algorithm
    if not algorithm.distills:
        return [[None] * len(group.rollouts) for group in groups], {}
    contexts: list[list[TeacherContext | None]] = []
    dropped = {"long_teacher": 0, "no_witness": 0}
    for group, witness in zip(groups, witness_texts(groups, algorithm), strict=True):
        weight = frontier_weight(
            group.rewards, lambda_0=algorithm.lambda_0, shape=algorithm.frontier, threshold=group.threshold
        )
        chosen = distilled(group, algorithm) if weight > 0 else []
        prompt, contrast = _teacher_prompts(group, witness, config, tokenizer)
        of_group: list[TeacherContext | None] = [None] * len(group.rollouts)
        for index in chosen:
            prefix = group.rollouts[index].sequence.completion[: algorithm.prefix_tokens]
            if prompt is None:
                dropped["no_witness"] += 1
            elif max(len(prompt), len(contrast or ())) + len(prefix) > max_length:
                dropped["long_teacher"] += 1
            else:
                of_group[index] = TeacherContext(
                    sequence=TokenSequence(prompt + prefix, len(prompt)),
                    weight=weight / len(chosen),
                    contrast=None if contrast is None else TokenSequence(contrast + prefix, len(contrast)),
                )
        contexts.append(of_group)
    metrics: Metrics = {f"ssopd/dropped_{reason}": Sum(count) for reason, count in dropped.items()}
    return contexts, {"ssopd/pairs": Sum(0), **metrics}


def _teacher_prompts(
    group: RolloutGroup, witness: str | None, config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the prompt tokens of the teacher and of the contrast teacher; None for one that has nothing to read."""
    algorithm = config.algorithm
    wrong = _wrong_attempt(group, algorithm) if algorithm.contrast > 0 else None
    contrast = None if wrong is None else render_teacher(tokenizer, group.prompt, wrong, config.data)
    if algorithm.witness == "none":
        return group.rollouts[0].sequence.prompt, contrast
    return None if witness is None else render_teacher(tokenizer, group.prompt, witness, config.data), contrast


def distilled(group: RolloutGroup, algorithm: AlgorithmConfig) -> list[int]:
    """Return the indices of the completions to distill: all with distilled=every, otherwise none in a uniform group."""
    correct, wrong = split(group.rewards, group.threshold)
    if algorithm.distilled == "every":
        return sorted(correct + wrong)
    if not is_mixed(group):
        return []
    return wrong if algorithm.distilled == "every_wrong" else [selected(group, wrong, algorithm.wrong_selector)]


def witness_texts(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> list[str | None]:
    """Return the text that the teacher reads in addition to each group's problem; None where there is none.

    A shuffled witness comes from the next group that has another prompt and a correct completion.
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
    """Return the prompts from which the teacher answers held-out problems, for those that the policy solves in part.

    Witnesses are chosen as in training, except that samples have no log-probs: instead of max_logprob or min_logprob
    the shortest is read. Problems without a witness, and prompts of `max_length` tokens or more, are left out.
    """
    longest, threshold = config.algorithm.correct_selector == "longest", config.reward.threshold
    witness: dict[str, str] = {}
    for sample in sorted(samples, key=lambda sample: -sample.tokens if longest else sample.tokens):
        if is_correct(sample.reward, threshold):
            witness.setdefault(sample.problem, sample.text)
    wrong = {sample.problem for sample in samples if not is_correct(sample.reward, threshold)}
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
    _, wrong = split(group.rewards, group.threshold)
    return group.rollouts[selected(group, wrong, algorithm.wrong_selector)].completion.text if wrong else None


def _own_witness(group: RolloutGroup, selector: str) -> str | None:
    correct, _ = split(group.rewards, group.threshold)
    return group.rollouts[selected(group, correct, selector)].completion.text if correct else None
