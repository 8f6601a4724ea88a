"""The pair and the frontier weight of a group."""

from __future__ import annotations

import pytest

from nemo_ssopd.algo.selection import frontier_weight, select_pair, split
from nemo_ssopd.types import Pair


def test_shortest_correct_and_longest_wrong() -> None:
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    lengths = [90, 10, 40, 80, 60, 30]
    assert select_pair(rewards=rewards, lengths=lengths) == Pair(correct=2, wrong=3)


def test_ties_go_to_the_lower_index() -> None:
    assert select_pair(rewards=[0, 1, 0, 1, 0, 1], lengths=[5, 7, 9, 4, 9, 4]) == Pair(correct=3, wrong=2)


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_a_uniform_group_has_no_pair(rewards: list[float]) -> None:
    assert select_pair(rewards=rewards, lengths=[3] * len(rewards)) is None


@pytest.mark.parametrize(("lengths", "message"), [([3], "2 rewards but 1 lengths"), ([3, 0], r"lengths are \[3, 0\]")])
def test_bad_lengths_are_an_error(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_pair(rewards=[1.0, 0.0], lengths=lengths)


def test_the_threshold_is_a_setting() -> None:
    rewards, lengths = [0.3, 0.7, 1.5, 0.9], [5, 6, 7, 8]
    assert select_pair(rewards=rewards, lengths=lengths) == Pair(correct=1, wrong=0)
    assert select_pair(rewards=rewards, lengths=lengths, threshold=0.9) == Pair(correct=2, wrong=3)  # over it, not at
    assert select_pair(rewards=rewards, lengths=lengths, threshold=1.5) is None
    assert frontier_weight(rewards, lambda_0=1.0) == 3 / 16
    assert frontier_weight(rewards, lambda_0=1.0, threshold=0.8) == 1 / 4
    assert frontier_weight(rewards, lambda_0=1.0, threshold=2.0) == 0.0
    assert split(rewards, 0.8) == ([2, 3], [0, 1])


def test_frontier_weight() -> None:
    # 3 of 8 correct: 3/8 * 5/8 = 15/64.
    assert frontier_weight([1, 0, 0, 1, 0, 0, 1, 0], lambda_0=2.0) == 2.0 * 15 / 64
    assert frontier_weight([1, 0], lambda_0=1.0) == 0.25
    assert frontier_weight([1, 1, 1], lambda_0=1.0) == 0.0
    assert frontier_weight([0, 0, 0], lambda_0=1.0) == 0.0
    assert frontier_weight([1, 0], lambda_0=0.0) == 0.0
    with pytest.raises(ValueError, match="at least one completion"):
        frontier_weight([], lambda_0=1.0)


@pytest.mark.parametrize(
    ("shape", "weights"),
    [("fixed", [1.0, 1.0, 1.0])],
)
def test_other_frontier_weights(shape: str, weights: list[float]) -> None:
    groups = [[1, 0, 0, 0], [1, 0], [0, 0]]
    assert [frontier_weight(g, lambda_0=1.0, shape=shape) for g in groups] == pytest.approx(weights, abs=1e-15)
    assert frontier_weight(groups[0], lambda_0=3.0, shape=shape) == pytest.approx(3 * weights[0])
