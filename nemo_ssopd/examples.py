"""Turn graded groups or written solutions into training examples, without any pass through a model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nemo_ssopd.algo.groups import advantages
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig
from nemo_ssopd.data.demo import CorpusExample
from nemo_ssopd.data.templates import render_sft
from nemo_ssopd.metrics import Metrics
from nemo_ssopd.teacher import teacher_contexts
from nemo_ssopd.types import Prompt, RolloutGroup, TokenSequence, TrainExample


def rollout_examples(
    groups: Sequence[RolloutGroup], config: Config, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[TrainExample], Metrics]:
    """Return one example per completion, in order, and metrics that count what the distillation leaves out.

    `max_length` is the longest sequence that the teacher can read, in tokens.
    """
    algorithm = config.algorithm
    contexts, metrics = teacher_contexts(groups, config, tokenizer, max_length=max_length)
    examples = []
    for number, group in enumerate(groups):
        values = advantages(group, algorithm, max_new_tokens=config.rollout.max_new_tokens)
        for rollout, value, context in zip(group.rollouts, values, contexts[number], strict=True):
            is_masked = algorithm.overlong_mask and rollout.completion.finish_reason == "length"
            examples.append(
                TrainExample(
                    sequence=rollout.sequence,
                    token_weights=(0.0 if is_masked else 1.0,) * rollout.sequence.completion_length,
                    group=number,
                    advantage=value,
                    sampler_logprobs=rollout.completion.logprobs,
                    teacher=context,
                )
            )
    return examples, metrics


def sft_examples(
    solved: Sequence[Prompt | CorpusExample], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TrainExample]:
    """Return one example per written solution. Tokens to learn have weight 1, tokens that are only read weight 0."""
    examples = []
    for number, problem in enumerate(solved):
        tokens, is_target = render_sft(tokenizer, problem, data)
        first = is_target.index(True)
        examples.append(
            TrainExample(
                sequence=TokenSequence(tokens, first),
                token_weights=tuple(map(float, is_target[first:])),
                group=number,
            )
        )
    return examples
