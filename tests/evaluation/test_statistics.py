"""Avg@n, pass@k, maj@k and their intervals, against enumeration and hand-computed numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemo_ssopd.evaluation.statistics import (
    Estimate,
    average,
    estimate,
    macro_estimate,
    maj_at_k,
    paired_bootstrap,
    pass_at_k,
    summarise,
    t_interval,
)

REWARDS = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k: int) -> None:
    expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in REWARDS]
    assert pass_at_k(REWARDS, k=k) == pytest.approx(expected, abs=1e-12)


def test_average_and_pass_at_1_agree() -> None:
    assert average(REWARDS).tolist() == [0.4, 0.0, 1.0, 0.2]
    assert pass_at_k(REWARDS, k=1) == pytest.approx(average(REWARDS), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8", "9"], [1, 0, 0], 1 / 3),  # three tied, one of them correct
        (["8", "7", "7", "8"], [0, 1, 1, 0], 0.5),
        (["7", None, None], [1, 0, 0], 1.0),  # no answer is not a vote
        ([None, None, None], [0, 0, 0], 0.0),
        (["7", "7", "7"], [1, 0, 1], 2 / 3),  # one grading was cut short
    ],
)
def test_majority(answers: list[str | None], rewards: list[float], expected: float) -> None:
    for order in itertools.permutations(range(len(answers))):
        score = maj_at_k([[rewards[i] for i in order]], [[answers[i] for i in order]], k=len(answers))
        assert score.tolist() == pytest.approx([expected], abs=1e-12)


def test_majority_ties_are_the_expectation_of_a_random_choice() -> None:
    """Against every way to break a tie by a random order of the answers."""
    answers, rewards = ["a", "b", "c", "b", "a", "d"], [0, 1, 0, 1, 0, 0]
    wins = []
    for order in itertools.permutations("abcd"):
        winner = max(order, key=answers.count)  # the first of the largest
        wins.append(rewards[answers.index(winner)])
    assert maj_at_k([rewards], [answers], k=6).tolist() == pytest.approx([np.mean(wins)])


def test_majority_of_fewer_samples_averages_blocks() -> None:
    # Blocks (7 7 8) and (8 8 7): right, wrong; the seventh sample is left over.
    assert maj_at_k([[1, 1, 0, 0, 0, 1, 1]], [["7", "7", "8", "8", "8", "7", "7"]], k=3).tolist() == [0.5]


def test_the_interval_matches_the_enumerated_bootstrap() -> None:
    """With three problems all 27 resamples can be listed, and so the exact quantiles of their mean."""
    scores = [0.0, 0.5, 1.0]
    means = sorted(np.mean(resample) for resample in itertools.product(scores, repeat=3))
    result = estimate(scores, confidence=0.8)
    # 10 % and 90 % of 27 equally likely means: 1/27 + 3/27 lie at or below 1/6, and likewise above.
    assert (means[3], means[-4]) == pytest.approx((1 / 6, 5 / 6))
    assert (result.value, result.low, result.high) == pytest.approx((0.5, 1 / 6, 5 / 6))


def test_the_interval_of_many_problems_is_the_normal_one() -> None:
    scores = np.random.default_rng(3).normal(0.5, 0.2, size=400)
    half = 1.96 * scores.std() / 20
    result = estimate(scores, resamples=4000)
    assert result.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_intervals_are_repeatable_and_seeded() -> None:
    scores = np.random.default_rng(0).random(30)
    assert estimate(scores, resamples=200, seed=5) == estimate(scores, resamples=200, seed=5)
    assert estimate(scores, resamples=200, seed=5) != estimate(scores, resamples=200, seed=6)


def test_paired_bootstrap_cancels_the_difficulty_of_problems() -> None:
    difficulty = np.random.default_rng(1).random(40)
    a, b = difficulty + 0.1, difficulty
    difference = paired_bootstrap(a, b, resamples=500)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert estimate(a, resamples=500).low < estimate(b, resamples=500).high  # apart, the two overlap
    assert paired_bootstrap(b, a, resamples=500).value == pytest.approx(-0.1)


def test_the_threshold_decides_what_is_correct() -> None:
    rewards = [[0.2, 0.9, 1.5, -1.0], [0.9, 0.9, 0.9, 0.9]]
    assert average(rewards) == pytest.approx([0.4, 0.9])
    assert pass_at_k(rewards, k=1).tolist() == [0.5, 1.0]
    assert pass_at_k(rewards, k=1, threshold=0.9).tolist() == [0.25, 0.0]  # over it, not at it
    answers = [["7", "8", "8", "7"], ["7"] * 4]
    assert maj_at_k(rewards, answers, k=4).tolist() == [0.5, 1.0]  # 7 and 8 tie, and both rewards of 8 are over 0.5
    assert maj_at_k(rewards, answers, k=4, threshold=0.9).tolist() == [0.25, 0.0]


def test_summary() -> None:
    summary = summarise(
        rewards_PN=[[1, 0], [0, 0]],
        answers_PN=[["7", "8"], [None, "3"]],
        lengths_PN=[[10, 20], [30, 100]],
        truncated_PN=[[False, False], [False, True]],
    )
    assert {key: value.value for key, value in summary.items()} == {
        "eval/avg_at_n": 0.25,
        "eval/pass_at_1": 0.25,
        "eval/pass_at_n": 0.5,
        "eval/maj_at_1": 0.25,
        "eval/maj_at_n": 0.25,
        "eval/length_mean": 40.0,
        "eval/truncated_fraction": 0.25,
    }
    # Two problems: both, either or the other twice, so the interval spans the two scores.
    assert summary["eval/avg_at_n"] == Estimate(value=0.25, low=0.0, high=0.5)


def test_bad_tables_are_errors() -> None:
    with pytest.raises(ValueError, match="k is 6 but each problem has 5 samples"):
        pass_at_k(REWARDS, k=6)
    with pytest.raises(ValueError, match="problems x samples"):
        average([])
    with pytest.raises(ValueError, match="not a table of 1 problems x 2 samples"):
        maj_at_k([[1, 0]], [["7"]], k=2)
    with pytest.raises(ValueError, match="on the same problems"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])


def test_summary_has_every_power_of_two_below_n() -> None:
    rewards = [[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0] * 12]
    summary = summarise(rewards_PN=rewards, answers_PN=[["7"] * 12] * 2, lengths_PN=rewards, truncated_PN=rewards)
    ks = {1, 2, 4, 8, 12}
    assert {key for key in summary if "pass" in key} == {f"eval/pass_at_{k if k < 12 else 'n'}" for k in ks}
    for k in ks:
        chance = np.mean([any(subset) for subset in itertools.combinations(rewards[0], k)]) / 2
        assert summary[f"eval/pass_at_{k if k < 12 else 'n'}"].value == pytest.approx(chance, abs=1e-12)


def test_the_macro_average_weighs_sets_alike_and_draws_within_them() -> None:
    """One set without spread, one of two problems: the mean of their means is one of three values."""
    result = macro_estimate([[0.5] * 10, [0.0, 1.0]], confidence=0.8)
    assert (result.value, result.low, result.high) == (0.5, 0.25, 0.75)
    assert macro_estimate([[0.2, 0.4, 0.9]], seed=3) == estimate([0.2, 0.4, 0.9], seed=3)
    with pytest.raises(ValueError, match="at least one set"):
        macro_estimate([])


def test_t_interval_by_hand() -> None:
    """Differences 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, and t(0.975, 3) = 3.182446 from the table."""
    interval = t_interval([1, 2, 3, 4])
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.445739, 2.5, 4.554261), abs=1e-5)
    assert np.isnan(t_interval([0.3]).low)
    with pytest.raises(ValueError, match="one number per run"):
        t_interval([])
