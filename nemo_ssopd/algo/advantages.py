"""Group advantages (paper eq. 1)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float], *, eps: float = 1e-4) -> list[float]:
    """A_i = (r_i - mean(r)) / (std(r) + eps), with the population standard deviation of this group alone.

    A uniform group has exactly zero advantages: it teaches GRPO nothing, whatever its rounding errors.

    >>> group_advantages([1.0, 0.0, 0.0, 1.0], eps=0.0)
    [1.0, -1.0, -1.0, 1.0]
    """
    if not rewards:
        raise ValueError("a group has no rewards: it needs at least one completion")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) + eps
    return [(reward - mean) / scale for reward in rewards]
