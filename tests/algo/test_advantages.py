"""Group advantages against hand-computed numbers."""

from __future__ import annotations

import pytest

from nemo_ssopd.algo.advantages import group_advantages, overlong_penalty


def test_one_correct_of_four() -> None:
    # mean 1/4, population variance 3/16, std sqrt(3)/4: advantages sqrt(3) and -1/sqrt(3).
    advantages = group_advantages([0.0, 1.0, 0.0, 0.0], eps=0.0)
    assert advantages == pytest.approx([-(3**-0.5), 3**0.5, -(3**-0.5), -(3**-0.5)], abs=1e-15)


def test_any_finite_rewards() -> None:
    # mean 5/6; differences -16/30, -4/30, 20/30; population variance (256 + 16 + 400) / 2700 = 56/225.
    std = 56**0.5 / 15
    expected = [-16 / 30 / std, -4 / 30 / std, 20 / 30 / std]
    assert group_advantages([0.3, 0.7, 1.5], eps=0.0) == pytest.approx(expected, abs=1e-14)
    assert group_advantages([0.3, 0.7, 1.5], kind="mean") == pytest.approx([-16 / 30, -4 / 30, 20 / 30], abs=1e-14)
    assert group_advantages([-2.0, 0.5], eps=0.0) == [-1.0, 1.0]


def test_eps_is_added_to_the_standard_deviation() -> None:
    # mean 1/2, std 1/2.
    assert group_advantages([1.0, 0.0], eps=0.5) == [0.5, -0.5]
    assert group_advantages([1.0, 0.0]) == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001], abs=1e-15)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_uniform_group_has_exactly_zero_advantages(reward: float) -> None:
    # 0.1 is not a binary fraction: its mean over three differs from it by a rounding error.
    assert group_advantages([reward] * 3, eps=0.0) == [0.0, 0.0, 0.0]


def test_an_empty_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one completion"):
        group_advantages([])


def test_variants() -> None:
    # Dr. GRPO: 3/4 and -1/4. RLOO: 1 - 0, and 0 - 1/3.
    assert group_advantages([0.0, 1.0, 0.0, 0.0], kind="mean") == [-0.25, 0.75, -0.25, -0.25]
    assert group_advantages([0.0, 1.0, 0.0, 0.0], kind="leave_one_out") == pytest.approx([-1 / 3, 1.0, -1 / 3, -1 / 3])
    for kind in ("mean", "leave_one_out"):
        assert group_advantages([0.1] * 3, kind=kind) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (60, 0.0), (70, -0.25), (100, -1.0)])
def test_overlong_penalty(length: int, penalty: float) -> None:
    assert overlong_penalty(length, limit=100, buffer=40) == penalty
    assert overlong_penalty(length, limit=100, buffer=0) == 0.0
