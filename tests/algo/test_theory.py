"""What the paper's theory promises, exactly, in rational arithmetic on a small tree.

A state is a tuple of actions. The policy picks an action at every state that is not a leaf, and a leaf is a finished
completion, correct or wrong.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import prod

import pytest

from nemo_ssopd.algo.selection import frontier_weight, select_pair

State = tuple[str, ...]
Policy = dict[State, dict[str, Fraction]]

POLICY: Policy = {
    (): {"a": Fraction(1, 2), "b": Fraction(1, 3), "c": Fraction(1, 6)},
    ("a",): {"a": Fraction(1, 4), "b": Fraction(3, 4)},
    ("b",): {"a": Fraction(2, 5), "b": Fraction(2, 5), "c": Fraction(1, 5)},
    ("a", "b"): {"a": Fraction(1, 7), "b": Fraction(6, 7)},
    ("b", "a"): {"a": Fraction(1, 2), "b": Fraction(1, 2)},
}
CORRECT = {("a", "a"), ("a", "b", "b"), ("b", "a", "a"), ("b", "c")}


def action_values(policy: Policy, state: State) -> dict[str, Fraction]:
    """Q(s, a)."""
    return {action: value(policy, (*state, action)) for action in policy[state]}


def value(policy: Policy, state: State) -> Fraction:
    """V(s): the probability that a completion through `state` ends correct."""
    if state not in policy:
        return Fraction(state in CORRECT)
    q = action_values(policy, state)
    return sum((p * q[action] for action, p in policy[state].items()), Fraction(0))


def reach(policy: Policy, state: State) -> Fraction:
    """d(s): the probability that the policy visits `state`."""
    return prod((policy[state[:t]][state[t]] for t in range(len(state))), start=Fraction(1))


def variance(weights: dict[str, Fraction], values: dict[str, Fraction]) -> Fraction:
    mean = sum((p * values[action] for action, p in weights.items()), Fraction(0))
    return sum((p * (values[action] - mean) ** 2 for action, p in weights.items()), Fraction(0))


def leaves(policy: Policy) -> list[State]:
    children = [(*state, action) for state, actions in policy.items() for action in actions]
    return [state for state in children if state not in policy]


def test_the_tree_is_a_tree() -> None:
    assert all(sum(actions.values()) == 1 for actions in POLICY.values())
    assert CORRECT < set(leaves(POLICY))
    assert sum(reach(POLICY, leaf) for leaf in leaves(POLICY)) == 1
    # 1/8 + 1/2 * 3/4 * 6/7 + 1/3 * 2/5 * 1/2 + 1/3 * 1/5
    assert value(POLICY, ()) == Fraction(1, 8) + Fraction(9, 28) + Fraction(1, 15) + Fraction(1, 15)


@pytest.mark.parametrize("state", POLICY, ids="".join)
def test_theorem_3_1_local_edit(state: State) -> None:
    """Editing pi to q(a) = pi(a) Q(s, a) / V(s) at one state gains d(s) Var[Q(s, a)] / V(s), exactly."""
    q_values = action_values(POLICY, state)
    v = value(POLICY, state)
    edited = {**POLICY, state: {action: p * q_values[action] / v for action, p in POLICY[state].items()}}
    gain = value(edited, ()) - value(POLICY, ())
    assert gain == reach(POLICY, state) * variance(POLICY[state], q_values) / v
    assert gain > 0


def test_proposition_3_3_variance_over_depths() -> None:
    """p(1 - p) = sum over depths of E[Var(next-step value)]: all the reward's variance is resolved along the way."""
    p = value(POLICY, ())
    by_depth = [Fraction(0)] * 3
    for state, actions in POLICY.items():
        by_depth[len(state)] += reach(POLICY, state) * variance(actions, action_values(POLICY, state))
    assert all(term > 0 for term in by_depth)
    assert sum(by_depth) == p * (1 - p)


@pytest.mark.parametrize("group_size", [1, 2, 5, 8])
def test_proposition_3_3_expected_pairs(group_size: int) -> None:
    """E[N+ N-] = G (G - 1) p(1 - p), by enumerating every group; so E[lambda] is (G - 1) / G of lambda_0 p(1 - p)."""
    p = value(POLICY, ())
    pairs = Fraction(0)
    weight = 0.0
    for outcomes in itertools.product((0, 1), repeat=group_size):
        correct = sum(outcomes)
        probability = p**correct * (1 - p) ** (group_size - correct)
        pairs += probability * correct * (group_size - correct)
        weight += float(probability) * frontier_weight(outcomes, lambda_0=2.0)
    assert pairs == group_size * (group_size - 1) * p * (1 - p)
    assert weight == pytest.approx(2.0 * (group_size - 1) / group_size * float(p * (1 - p)), abs=1e-12)


@pytest.mark.parametrize("gamma", [Fraction(1, 10), Fraction(1, 2), Fraction(99, 100)])
def test_root_weights_are_largest_for_the_selected_pair(gamma: Fraction) -> None:
    """Seen from the root, a correct completion of length n weighs gamma^n and a wrong one 1 - gamma^n.

    gamma^n is the terminal reward 1, discounted once per step; 1 - gamma^n is a cost of 1 - gamma at every step,
    discounted likewise. Both are computed here step by step; the selected pair has the largest of each.
    """

    def root_weight(leaf: State) -> Fraction:
        correct = leaf in CORRECT
        weight = Fraction(1 if correct else 0)
        for _ in leaf:
            weight = gamma * weight + (0 if correct else 1 - gamma)
        assert weight == (gamma ** len(leaf) if correct else 1 - gamma ** len(leaf))
        return weight

    completions = leaves(POLICY)
    pair = select_pair(
        rewards=[float(leaf in CORRECT) for leaf in completions], lengths=[len(leaf) for leaf in completions]
    )
    assert pair is not None
    assert root_weight(completions[pair.correct]) == max(root_weight(leaf) for leaf in CORRECT)
    assert root_weight(completions[pair.wrong]) == max(root_weight(leaf) for leaf in set(completions) - CORRECT)
    assert len(completions[pair.correct]) == 2 and len(completions[pair.wrong]) == 3
