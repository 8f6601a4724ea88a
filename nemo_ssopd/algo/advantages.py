"""Group advantages (paper eq. 1), their variants, and what a completion near the length limit loses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float], *, eps: float = 1e-4, kind: str = "std") -> list[float]:
    """A_i = (r_i - mean(r)) / (std(r) + eps), with the population standard deviation of this group alone.

    A uniform group has exactly zero advantages: it teaches GRPO nothing, whatever its rounding errors. The other kinds:
    mean, without the division (Dr. GRPO, arXiv 2503.20783); leave_one_out, r_i less the mean of the others, which is
    G / (G - 1) times that (RLOO, arXiv 2402.14740).

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
    """From 0 at `buffer` tokens before the limit down to -1 at the limit, to be added to the reward.

    Soft overlong punishment (DAPO, arXiv 2503.14476); 0 for a buffer of 0.

    >>> overlong_penalty(90, limit=100, buffer=40)
    -0.75
    """
    if not buffer:
        return 0.0
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
