"""From graded groups to what one optimizer step minimises: the batch of the token loss, and the distillation beside it.

Both are composed from `config.algorithm`; scoring and the teacher's pass happen here, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from nemo_ssopd.algo.grpo import token_scales
from nemo_ssopd.algo.losses import ClippedDistillation, DistillTarget
from nemo_ssopd.config.run import Config
from nemo_ssopd.distillation import lessons
from nemo_ssopd.groups import advantages
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.metrics import Metrics
from nemo_ssopd.types import RolloutGroup, StepCounts, TrainBatch


def make_batches(
    groups: Sequence[RolloutGroup], actor: MegatronPolicy, config: Config
) -> list[tuple[Sequence[RolloutGroup], TrainBatch]]:
    """One batch per optimizer step, with everything that must be scored before the first of them."""
    updates, algorithm = config.trainer.updates_per_step, config.algorithm
    max_new_tokens = config.rollout.max_new_tokens
    size = len(groups) // updates
    parts = [groups[start : start + size] for start in range(0, len(groups), size)]
    batches = []
    for part in parts:
        rollouts = [rollout for group in part for rollout in group.rollouts]
        sequences = tuple(rollout.sequence for rollout in rollouts)
        lengths = [sequence.completion_length for sequence in sequences]
        kept = [not (algorithm.overlong_mask and rollout.completion.finish_reason == "length") for rollout in rollouts]
        counts = global_counts(
            actor.runtime,
            tokens=sum(length for length, keep in zip(lengths, kept, strict=True) if keep),
            prompts=len(part),
            completions=sum(kept),
        )
        values = [a for group in part for a in advantages(group, algorithm, max_new_tokens=max_new_tokens)]
        # On the first update the policy is still the sampling policy: its own log-probs, detached, are the old ones.
        old = actor.logprobs(sequences) if updates > 1 else None
        reference = None
        if algorithm.reference_kl > 0:
            with actor.reference():
                reference = actor.logprobs(sequences)
        batch = TrainBatch(
            sequences=sequences,
            weights=tuple((value,) * length for value, length in zip(values, lengths, strict=True)),
            counts=counts,
            old_logprobs=old,
            reference_logprobs=reference,
            sampler_logprobs=tuple(torch.tensor(rollout.completion.logprobs) for rollout in rollouts),
            scales=token_scales(
                lengths,
                kept,
                by=algorithm.normalization,
                tokens=counts.tokens,
                completions=counts.completions,
                max_length=max_new_tokens,
            ),
        )
        batches.append((part, batch))
    return batches


def global_counts(runtime: Runtime, *, tokens: int, prompts: int, completions: int = 0) -> StepCounts:
    """The denominators: this rank's counts, summed over the data-parallel ranks. Without any token, 1 divides zero."""
    counts = torch.tensor([tokens, prompts, completions], device=runtime.device)
    dist.all_reduce(counts, group=runtime.dp_group)
    tokens, prompts, completions = counts.tolist()
    return StepCounts(max(1, tokens), prompts, completions)


def distillation(
    groups: Sequence[RolloutGroup], actor: MegatronPolicy, config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[ClippedDistillation | None, Metrics]:
    """The teacher's pass over what is distilled: by default adapters off, the group's shortest correct completion."""
    algorithm = config.algorithm
    if not algorithm.distils:
        return None, {}
    planned, metrics = lessons(groups, config, tokenizer, max_length=actor.hf.max_position_embeddings)
    away = [lesson.away for lesson in planned if lesson.away is not None]
    with actor.teacher():
        hidden = iter(actor.hidden_states([lesson.teacher for lesson in planned] + away))
    teacher_hidden = [next(hidden) for _ in planned]
    targets = {
        lesson.row: DistillTarget(hidden_KH, lesson.weight, None if lesson.away is None else next(hidden))
        for lesson, hidden_KH in zip(planned, teacher_hidden, strict=True)
    }
    aux = ClippedDistillation(
        targets=targets,
        clip=algorithm.clip,
        temperature=config.rollout.temperature,
        chunk_tokens=config.trainer.chunk_tokens,
        vocab_size=actor.hf.vocab_size,
        group=actor.runtime.tp_group,
        divergence=algorithm.divergence,
        clip_unit=algorithm.clip_unit,
        position_decay=algorithm.position_decay,
        contrast=algorithm.contrast,
    )
    return aux, metrics
