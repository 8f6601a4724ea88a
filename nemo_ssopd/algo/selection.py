"""Select the completions of a group for distillation, and weight the group (paper eqs. 8, 10, 12)."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_ssopd.types import Pair


def select(
    candidates: Sequence[int], *, by: str, lengths: Sequence[int], mean_logprobs: Sequence[float] | None = None
) -> int:
    """Return one candidate: the shortest or longest in tokens, or the one with the max_logprob or min_logprob.

    `candidates` are indices into `lengths` and `mean_logprobs`, the mean log-probs per token. Ties go to the lower
    index, so every rank selects the same candidate.

    >>> select([0, 2, 3], by="longest", lengths=[7, 9, 4, 7])
    0
    """
    extreme, measured = {
        "shortest": (min, lengths),
        "longest": (max, lengths),
        "min_logprob": (min, mean_logprobs),
        "max_logprob": (max, mean_logprobs),
    }[by]
    assert measured is not None, f"{by} needs mean_logprobs"
    return extreme(sorted(candidates), key=measured.__getitem__)  # min and max both keep the first of equals


def select_pair(
    *,
    rewards: Sequence[float],
    lengths: Sequence[int],
    mean_logprobs: Sequence[float] | None = None,
    correct_by: str = "shortest",
    wrong_by: str = "longest",
    threshold: float = 0.5,
) -> Pair | None:
    """Return one correct and one wrong completion, or None if the group lacks either.

    By default these are the shortest correct and the longest wrong completion.

    >>> select_pair(rewards=[0.0, 1.0, 1.0, 0.0], lengths=[7, 9, 4, 7])
    Pair(correct=2, wrong=0)
    """
    if len(rewards) != len(lengths):
        raise ValueError(f"{len(rewards)} rewards but {len(lengths)} lengths: give one of each per completion")
    if lengths and min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}: a completion has at least one token, its end-of-turn token")
    correct, wrong = split(rewards, threshold)
    if not correct or not wrong:
        return None
    return Pair(
        correct=select(correct, by=correct_by, lengths=lengths, mean_logprobs=mean_logprobs),
        wrong=select(wrong, by=wrong_by, lengths=lengths, mean_logprobs=mean_logprobs),
    )


def frontier_weight(
    rewards: Sequence[float], *, lambda_0: float, shape: str = "dynamic", threshold: float = 0.5
) -> float:
    """Return lambda(x) = lambda_0 p(1 - p), with p the share of correct completions in the group.

    It is exactly zero for a uniform group, and peaks at lambda_0 / 4 for a balanced one. p is the plain sample share,
    without a small-group correction. The other shape, "fixed", gives lambda_0 for every group, even for uniform ones.

    >>> frontier_weight([1.0, 0.0, 0.0, 0.0], lambda_0=1.0)
    0.1875
    """
    if not rewards:
        raise ValueError("a group has no rewards: it needs at least one completion")
    p = sum(is_correct(reward, threshold) for reward in rewards) / len(rewards)
    if shape == "fixed":
        return lambda_0
    return lambda_0 * p * (1 - p)


def split(rewards: Sequence[float], threshold: float = 0.5) -> tuple[list[int], list[int]]:
    """Return the indices of the correct completions and those of the wrong ones.

    >>> split([0.0, 1.0, 0.0])
    ([1], [0, 2])
    """
    correct = [i for i, reward in enumerate(rewards) if is_correct(reward, threshold)]
    return correct, [i for i, reward in enumerate(rewards) if not is_correct(reward, threshold)]


def is_correct(reward: float, threshold: float = 0.5) -> bool:
    """Tell whether a completion counts as correct. Advantages and mean rewards use the reward itself instead."""
    return reward > threshold
