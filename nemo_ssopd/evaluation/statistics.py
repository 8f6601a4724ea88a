"""Avg@n, pass@k and maj@k from a table of samples, with bootstrap intervals over problems.

P problems, N samples of each. Each score gives one number per problem, and we report its mean over problems.
`estimate` adds the interval of that mean: it resamples problems, but not the samples within a problem. `t_interval`
gives the interval for scores of several runs.

>>> estimate(pass_at_k(rewards_PN, k=4))
Estimate(value=0.71, low=0.58, high=0.83)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its percentile bootstrap interval.

    >>> Estimate(value=0.62, low=0.53, high=0.70)
    """

    value: float
    low: float
    high: float


def average(values_PN: ArrayLike) -> Scores:
    """Return the mean over the samples of each problem, [P]: Avg@n for rewards, the mean length for lengths."""
    return _table(values_PN).mean(axis=1)


def pass_at_k(rewards_PN: ArrayLike, *, k: int, threshold: float = 0.5) -> Scores:
    """Return the chance that k samples of a problem, drawn without replacement, include a correct one, [P].

    It is 1 - C(n - c, k) / C(n, k), with c of n rewards over the threshold (Chen et al., 2021). This is unbiased,
    unlike 1 - (1 - c/n)^k.
    """
    correct_PN = _table(rewards_PN) > threshold
    n = _checked_k(k, correct_PN.shape[1])
    return np.array([1 - comb(n - int(c), k) / comb(n, k) for c in correct_PN.sum(axis=1)])


def maj_at_k(
    rewards_PN: ArrayLike, answers_PN: Sequence[Sequence[str | None]], *, k: int, threshold: float = 0.5
) -> Scores:
    """Return the chance that the majority answer among k samples is correct (its reward over the threshold), [P].

    A sample votes for its extracted answer, compared as text. None (no answer found) does not vote. A tie is averaged:
    the score is the share of the tied answers that are correct, so the order within a block does not matter. The n
    samples are split into n // k blocks of k, in order, and the blocks are averaged. Left-over samples are not used.
    """
    correct_PN = (_table(rewards_PN) > threshold).astype(np.float64)
    n = _checked_k(k, correct_PN.shape[1])
    if [len(answers) for answers in answers_PN] != [n] * len(correct_PN):
        raise ValueError(f"answers are not a table of {len(correct_PN)} problems x {n} samples, as the rewards are")
    starts = range(0, n - k + 1, k)
    return np.array(
        [
            np.mean([_majority_score(c[start : start + k], a[start : start + k]) for start in starts])
            for c, a in zip(correct_PN, answers_PN, strict=True)
        ]
    )


def _majority_score(correct: Scores, answers: Sequence[str | None]) -> float:
    votes: dict[str, list[float]] = defaultdict(list)
    for is_correct, answer in zip(correct, answers, strict=True):
        if answer is not None:
            votes[answer].append(float(is_correct))
    if not votes:
        return 0.0
    most = max(len(voters) for voters in votes.values())
    # Equal answers may have unequal rewards: one may time out, and a user's function reads more than the answer.
    return float(np.mean([np.mean(voters) for voters in votes.values() if len(voters) == most]))


def estimate(scores_P: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Return the mean over problems with its percentile bootstrap interval. The same seed gives the same interval."""
    scores = np.asarray(scores_P, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"scores have shape {scores.shape}: give one number per problem, and at least one problem")
    means = _resampled_means(scores, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(scores.mean()), low=float(low), high=float(high))


def _resampled_means(scores: Scores, resamples: int, generator: np.random.Generator) -> Scores:
    """Return the means of scores.size draws with replacement, [resamples], computed in blocks of bounded memory."""
    block = max(1, 2**20 // scores.size)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([scores[generator.integers(scores.size, size=(rows, scores.size))].mean(1) for rows in sizes])


def macro_estimate(
    scores: Sequence[ArrayLike], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean over sets of each set's mean over its problems, with its interval: a table's last column.

    Each resample draws new problems within every set. The sets themselves are fixed.
    """
    if not scores:
        raise ValueError("there are no scores: give those of at least one set")
    generator = np.random.default_rng(seed)
    tables = [np.asarray(scores_P, dtype=np.float64) for scores_P in scores]
    means = np.mean(
        [[table[generator.integers(table.size, size=table.size)].mean() for _ in range(resamples)] for table in tables],
        axis=0,
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(np.mean([table.mean() for table in tables])), low=float(low), high=float(high))


def paired_bootstrap(
    a_P: ArrayLike, b_P: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return mean(a) - mean(b) with its interval, for two runs scored on the same problems in the same order.

    It also serves for two arms on the same seeds. Each resample takes both scores of a problem together, so the
    difficulty of the problems cancels. The difference is significant at 1 - confidence if the interval excludes zero.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the runs have scores of shape {a.shape} and {b.shape}: score both on the same problems")
    return estimate(a - b, confidence=confidence, resamples=resamples, seed=seed)


def t_interval(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of independent values, such as one score per run, with Student's t interval.

    A single value has no interval (NaN). For a paired comparison, give the differences.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"values have shape {x.shape}: give one number per run, and at least one run")
    if x.size == 1:
        return Estimate(value=float(x[0]), low=math.nan, high=math.nan)
    half = scipy.stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Estimate(value=float(x.mean()), low=float(x.mean() - half), high=float(x.mean() + half))


def summarise(
    *,
    rewards_PN: ArrayLike,
    answers_PN: Sequence[Sequence[str | None]],
    lengths_PN: ArrayLike,
    truncated_PN: ArrayLike,
    threshold: float = 0.5,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return the results of an evaluation under their metric keys, for n samples of each problem.

    A sample is correct if its reward is over the threshold. It is truncated if it was cut at the token limit.

    pass@k and maj@k are given at n (pass_at_n) and at the powers of two below it (pass_at_1, pass_at_2, ...).

    >>> summarise(rewards_PN=..., answers_PN=..., lengths_PN=..., truncated_PN=...)["eval/avg_at_n"]
    Estimate(value=0.62, low=0.53, high=0.70)
    """
    n = _table(rewards_PN).shape[1]
    ks = {str(2**power): 2**power for power in range(n.bit_length()) if 2**power < n} | {"n": n}
    scores = {
        "eval/avg_at_n": average(rewards_PN),
        **{f"eval/pass_at_{name}": pass_at_k(rewards_PN, k=k, threshold=threshold) for name, k in ks.items()},
        **{f"eval/maj_at_{name}": maj_at_k(rewards_PN, answers_PN, k=k, threshold=threshold) for name, k in ks.items()},
        "eval/length_mean": average(lengths_PN),
        "eval/truncated_fraction": average(truncated_PN),
    }
    return {key: estimate(scores_P, seed=seed) for key, scores_P in scores.items()}


def _table(values_PN: ArrayLike) -> Scores:
    values = np.asarray(values_PN, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"the table has shape {values.shape}: give problems x samples, at least one of each")
    return values


def _checked_k(k: int, n: int) -> int:
    if not 1 <= k <= n:
        raise ValueError(f"k is {k} but each problem has {n} samples: choose k from 1 to {n}")
    return n
