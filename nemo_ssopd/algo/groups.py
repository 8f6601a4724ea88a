"""Graded groups: which ones a step keeps, their advantages, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_ssopd.algo.advantages import group_advantages, overlong_penalty
from nemo_ssopd.algo.selection import select, split
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.metrics import Mean, Metrics, Sum, countable, merge
from nemo_ssopd.types import RolloutGroup


def is_mixed(group: RolloutGroup) -> bool:
    """Tell whether the group has a correct and a wrong completion, and so a pair."""
    return all(split(group.rewards, group.threshold))


def is_uniform(group: RolloutGroup) -> bool:
    """Tell whether all rewards are equal. Then all advantages are zero, and there is no pair."""
    return len(set(group.rewards)) == 1


def kept_groups(sampled: Sequence[RolloutGroup], wanted: int) -> list[RolloutGroup]:
    """Return `wanted` of the sampled groups in their order, with uniform ones only if the others are too few."""
    uniform_last = sorted(range(len(sampled)), key=lambda g: is_uniform(sampled[g]))
    return [sampled[g] for g in sorted(uniform_last[:wanted])]


def advantages(group: RolloutGroup, algorithm: AlgorithmConfig, *, max_new_tokens: int) -> list[float]:
    """Return one advantage per completion, all zero if the recipe has no reward term.

    Zero advantages make the surrogate and its gradient zero. The penalty for length counts here only: selection and
    metrics use the grader's reward.
    """
    if not algorithm.rewards:
        return [0.0] * len(group.rollouts)
    rewards = [
        reward + overlong_penalty(length, limit=max_new_tokens, buffer=algorithm.overlong_buffer)
        for reward, length in zip(group.rewards, group.lengths, strict=True)
    ]
    return group_advantages(rewards, eps=algorithm.advantage_eps, kind=algorithm.advantage)


def selected(group: RolloutGroup, candidates: Sequence[int], selector: str) -> int:
    """Return the candidate that the selector names, by length in tokens or by the sampler's mean log-prob."""
    logprobs = [rollout.completion.logprobs for rollout in group.rollouts]
    means = [sum(values) / len(values) for values in logprobs]
    return select(candidates, by=selector, lengths=group.lengths, mean_logprobs=means)


def group_metrics(sampled: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> Metrics:
    """Return metrics of all rollouts of a step, also those of dropped groups."""
    rollouts = [rollout for group in sampled for rollout in group.rollouts]
    correct = [len(split(group.rewards, group.threshold)[0]) for group in sampled]
    size = len(sampled[0].rollouts)
    tokens = sum(rollout.sequence.completion_length for rollout in rollouts)
    truncated = sum(rollout.completion.finish_reason == "length" for rollout in rollouts)
    metrics: Metrics = {
        "reward/mean": Mean(sum(rollout.reward for rollout in rollouts), len(rollouts)),
        "group/mixed_fraction": Mean(sum(0 < c < size for c in correct), len(sampled)),
        "group/all_correct_fraction": Mean(sum(c == size for c in correct), len(sampled)),
        "group/all_wrong_fraction": Mean(sum(c == 0 for c in correct), len(sampled)),
        "rollout/tokens": Sum(tokens),
        "rollout/length_mean": Mean(tokens, len(rollouts)),
        "rollout/truncated_fraction": Mean(truncated, len(rollouts)),
        "progress/tokens": Sum(tokens),
    }
    reasons: list[Metrics] = [{f"reward/reason/{countable(rollout.reason)}": Sum(1)} for rollout in rollouts]
    return merge(metrics, *reasons, *(pair_metrics(group, algorithm) for group in sampled))


def pair_metrics(group: RolloutGroup, algorithm: AlgorithmConfig) -> Metrics:
    """Return the lengths, in tokens, of the selected correct and wrong completion of a mixed group, for any recipe."""
    if not is_mixed(group):
        return {}
    correct, wrong = split(group.rewards, group.threshold)
    return {
        "group/correct_length": Mean(group.lengths[selected(group, correct, algorithm.correct_selector)], 1),
        "group/wrong_length": Mean(group.lengths[selected(group, wrong, algorithm.wrong_selector)], 1),
    }
