"""Which groups a step keeps, and their advantages; numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_ssopd.algo.groups import advantages, group_metrics, is_mixed, kept_groups
from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import TokenInputs, grpo_loss
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.types import Completion, Prompt, Rollout, RolloutGroup, TokenSequence

LIMIT = 10


def group(name: str, rewards: list[float], lengths: list[int] | None = None) -> RolloutGroup:
    rollouts = []
    for reward, length in zip(rewards, lengths or [3] * len(rewards), strict=True):
        completion = Completion((7,) * length, (-0.5,) * length, "", "length" if length == LIMIT else "stop", 0)
        rollouts.append(Rollout(TokenSequence((1, 2, *completion.tokens), 2), completion, reward, "", None))
    return RolloutGroup(Prompt(name, "", ""), tuple(rollouts))


WRONG, RIGHT, MIXED, OTHER = (group(n, r) for n, r in zip("abcd", ([0, 0], [1, 1], [0, 1], [1, 0]), strict=True))


def test_without_refills_every_group_is_kept_in_order() -> None:
    assert kept_groups([WRONG, MIXED, RIGHT], 3) == [WRONG, MIXED, RIGHT]


def test_mixed_groups_take_the_place_of_uniform_ones() -> None:
    assert kept_groups([WRONG, MIXED, RIGHT, OTHER], 2) == [MIXED, OTHER]
    assert kept_groups([WRONG, MIXED, RIGHT, OTHER], 3) == [WRONG, MIXED, OTHER]  # too few: the first uniform one stays


def test_a_recipe_without_a_reward_term_has_no_advantages() -> None:
    for recipe, expected in {"grpo": [-1.0, 1.0], "ssopd": [-1.0, 1.0], "opsd": [0.0, 0.0]}.items():
        values = advantages(MIXED, AlgorithmConfig(name=recipe, advantage_eps=0.0), max_new_tokens=LIMIT)
        assert values == expected


GRADED = group("graded", [0.3, 0.7, 1.5], [1, 2, 3])


def test_the_gradient_of_rewards_that_are_not_0_or_1() -> None:
    """On-policy, d loss / d log-prob is minus the advantage: rewards 0.3, 0.7, 1.5 have mean 5/6, std sqrt(56)/15."""
    std = 56**0.5 / 15
    expected = [-16 / 30 / std, -4 / 30 / std, 20 / 30 / std]
    values = advantages(GRADED, AlgorithmConfig(name="grpo", advantage_eps=0.0), max_new_tokens=LIMIT)
    assert values == pytest.approx(expected, abs=1e-14)
    per_token = [value for value, length in zip(values, GRADED.lengths, strict=True) for _ in range(length)]
    logprobs_T = torch.full((6,), -0.5, dtype=torch.float64, requires_grad=True)
    inputs = TokenInputs(logprobs_T, torch.zeros(6), torch.ones(6), torch.tensor(per_token, dtype=torch.float64))
    loss_T, _ = grpo_loss(inputs, clip=RatioClip(0.2, 0.2), reference_kl=0.0)
    loss_T.sum().backward()
    by_hand = [-a for a, length in zip(expected, (1, 2, 3), strict=True) for _ in range(length)]
    torch.testing.assert_close(logprobs_T.grad, torch.tensor(by_hand, dtype=torch.float64))


def test_the_threshold_makes_pairs_and_equal_rewards_make_uniform_groups() -> None:
    all_wrong = replace(GRADED, threshold=2.0)
    assert (is_mixed(GRADED), is_mixed(all_wrong)) == (True, False)
    metrics = {t: group_metrics([replace(GRADED, threshold=t)], AlgorithmConfig()) for t in (0.5, 1.0, 2.0)}
    assert [metrics[t]["reward/mean"].value() for t in metrics] == pytest.approx([2.5 / 3] * 3)
    assert [metrics[t]["group/mixed_fraction"].value() for t in metrics] == [1, 1, 0]
    assert metrics[2.0]["group/all_wrong_fraction"].value() == 1
    assert [metrics[t]["group/correct_length"].value() for t in (0.5, 1.0)] == [2, 3]
    assert [metrics[t]["group/wrong_length"].value() for t in (0.5, 1.0)] == [1, 2]
    # It has no pair, and yet advantages: a refill must not drop it.
    assert kept_groups([WRONG, all_wrong, RIGHT], 1) == [all_wrong]


def test_reasons_are_counted_by_the_part_before_a_colon() -> None:
    reasons = ["tests: 3 of 4", "tests: 1 of 4", "error: KeyError (r.py, line 3): 'a'", "no_box", "\ud800/b" + "c" * 99]
    made = group("reasons", [0.0] * len(reasons))
    rollouts = tuple(replace(r, reason=reason) for r, reason in zip(made.rollouts, reasons, strict=True))
    metrics = group_metrics([replace(made, rollouts=rollouts)], AlgorithmConfig())
    assert {key: metric.value() for key, metric in metrics.items() if key.startswith("reward/reason/")} == {
        "reward/reason/tests": 2,
        "reward/reason/error": 1,
        "reward/reason/no_box": 1,
        "reward/reason/__b" + "c" * 37: 1,
    }


def test_length_is_punished_in_the_advantages_alone() -> None:
    # Buffer 4: none up to 6 tokens, -1/2 at 8, -1 at 10.
    long = group("long", [1.0, 1.0, 1.0, 0.0], [6, 8, 10, 10])
    algorithm = AlgorithmConfig(advantage="mean", overlong_buffer=4)
    # Rewards 1, 1/2, 0, -1: their mean is 1/8.
    assert advantages(long, algorithm, max_new_tokens=LIMIT) == pytest.approx([0.875, 0.375, -0.125, -1.125])
    metrics = group_metrics([long], algorithm)
    assert metrics["reward/mean"].value() == 0.75
    assert metrics["rollout/truncated_fraction"].value() == 0.5
    assert (metrics["group/correct_length"].value(), metrics["group/wrong_length"].value()) == (6, 10)
