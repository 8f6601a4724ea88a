"""Which groups a step keeps, and their advantages; numbers by hand."""

from __future__ import annotations

import pytest

from nemo_ssopd.algo.groups import advantages, group_metrics, kept_groups
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
