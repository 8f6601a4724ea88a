"""Which completions of a group the auxiliary loss uses, and how much the group weighs (paper eqs. 8, 10, 12)."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_ssopd.types import Pair


def select_pair(*, rewards: Sequence[float], lengths: Sequence[int]) -> Pair | None:
    """The shortest correct and the longest wrong completion, lengths in tokens; None for a uniform group.

    Ties go to the lower index, so that every rank selects the same pair.

    >>> select_pair(rewards=[0.0, 1.0, 1.0, 0.0], lengths=[7, 9, 4, 7])
    Pair(correct=2, wrong=0)
    """
    if len(rewards) != len(lengths):
        raise ValueError(f"{len(rewards)} rewards but {len(lengths)} lengths: give one of each per completion")
    if lengths and min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}: a completion has at least one token, its end-of-turn token")
    correct = [i for i, reward in enumerate(rewards) if is_correct(reward)]
    wrong = [i for i, reward in enumerate(rewards) if not is_correct(reward)]
    if not correct or not wrong:
        return None
    # min and max both keep the first of equals.
    return Pair(correct=min(correct, key=lengths.__getitem__), wrong=max(wrong, key=lengths.__getitem__))


def frontier_weight(rewards: Sequence[float], *, lambda_0: float) -> float:
    """lambda(x) = lambda_0 p(1 - p), p the share of correct completions: exactly zero for a uniform group.

    It peaks at lambda_0 / 4, for a balanced group. p is the plain sample share, without a small-group correction.

    >>> frontier_weight([1.0, 0.0, 0.0, 0.0], lambda_0=1.0)
    0.1875
    """
    if not rewards:
        raise ValueError("a group has no rewards: it needs at least one completion")
    p = sum(is_correct(reward) for reward in rewards) / len(rewards)
    return lambda_0 * p * (1 - p)


def is_correct(reward: float) -> bool:
    """Rewards are 0 or 1; the threshold makes every use agree on anything between."""
    return reward > 0.5
