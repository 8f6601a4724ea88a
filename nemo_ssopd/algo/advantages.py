"""Group advantages (paper eq. 1), their variants, and the penalty for completions near the length limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float], *, eps: float = 1e-4, kind: str = "std") -> list[float]:
    """Return A_i = (r_i - mean(r)) / (std(r) + eps), with the population standard deviation of this group alone.

    A uniform group gets exactly zero advantages, free of rounding errors, so GRPO learns nothing from it. Other kinds:
    "mean" is without the division (Dr. GRPO, arXiv 2503.20783). "leave_one_out" is r_i minus the mean of the others,
    which is G / (G - 1) times "mean" (RLOO, arXiv 2402.14740). ValueError for an empty group.

    >>> group_advantages([1.0, 0.0, 0.0, 1.0], eps=0.0)
    [1.0, -1.0, -1.0, 1.0]
    """
    if not rewards:
        raise ValueError("a group has no rewards: it needs at least one completion")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    if kind == "leave_one_out":
        return [(reward - mean) * len(rewards) / (len(rewards) - 1) for reward in rewards]
    scale = statistics.pstdev(rewards) + eps if kind == "std" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def overlong_penalty(length: int, *, limit: int, buffer: int) -> float:
    """Return a penalty to add to the reward: 0 until `buffer` tokens before the limit, then down to -1 at the limit.

    This is the soft overlong punishment (DAPO, arXiv 2503.14476). A buffer of 0 disables it.

    >>> overlong_penalty(90, limit=100, buffer=40)
    -0.75
    """
    if not buffer:
        return 0.0
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
