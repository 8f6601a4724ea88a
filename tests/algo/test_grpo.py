"""GRPO's per-token terms: hand-computed values, and float64 gradients against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ssopd.algo.grpo import clipped_surrogate, k3_penalty, ratio_stats

CLIP_LOW, CLIP_HIGH = 0.2, 0.3

# ratio, advantage, loss, dloss / dlog pi_theta, clipped. The clip is active where the ratio has already moved the
# way the advantage pushes; where it moved against it, the loss stays live at any distance.
CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.2, 2.0, -2.4, -2.4, False),
    (1.5, 2.0, -2.6, 0.0, True),
    (0.5, 2.0, -1.0, -1.0, False),
    (1.0, -2.0, 2.0, 2.0, False),
    (0.9, -2.0, 1.8, 1.8, False),
    (0.5, -2.0, 1.6, 0.0, True),
    (1.5, -2.0, 3.0, 3.0, False),
    (1.5, 0.0, 0.0, 0.0, False),
]


def test_surrogate_value_gradient_and_clip() -> None:
    ratios, advantages, losses, gradients, clipped = (list(column) for column in zip(*CASES, strict=True))
    old_T = torch.linspace(-3.0, -0.1, len(CASES), dtype=torch.float64).requires_grad_()
    logprobs_T = (old_T + torch.tensor(ratios, dtype=torch.float64).log()).detach().requires_grad_()
    advantages_T = torch.tensor(advantages, dtype=torch.float64).requires_grad_()
    clip = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}

    loss_T = clipped_surrogate(logprobs_T, old_T, advantages_T, **clip)
    loss_T.sum().backward()

    torch.testing.assert_close(loss_T.detach(), torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(logprobs_T.grad, torch.tensor(gradients, dtype=torch.float64))
    assert old_T.grad is None and advantages_T.grad is None

    stats = ratio_stats(logprobs_T, old_T, advantages_T, **clip)
    torch.testing.assert_close(stats.ratio_T, torch.tensor(ratios, dtype=torch.float64))
    assert stats.clipped_T.tolist() == clipped
    assert not stats.ratio_T.requires_grad


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 exactly, where the two branches of the minimum tie, the whole gradient -A comes through."""
    logprobs_T = torch.tensor([-0.7, -2.0, -0.01], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([1.7, -0.6, 0.3], dtype=torch.float64)
    old_T = logprobs_T.detach().clone()
    clipped_surrogate(logprobs_T, old_T, advantages_T, clip_low=0.2, clip_high=0.2).sum().backward()
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-1.7, 0.6, -0.3]


def test_gradients_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    old_T = torch.randn(50, generator=generator, dtype=torch.float64) - 2
    logprobs_T = (old_T + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages_T = torch.randn(50, generator=generator, dtype=torch.float64)

    def surrogate(x_T: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(x_T, old_T, advantages_T, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    assert torch.autograd.gradcheck(surrogate, (logprobs_T,))
    assert torch.autograd.gradcheck(lambda x_T: k3_penalty(x_T, old_T), (logprobs_T,))


def test_k3_values_and_gradient() -> None:
    # d = 0, ln 2, -ln 2: 0, 2 - ln 2 - 1, 1/2 + ln 2 - 1. Gradient 1 - exp(d): 0, -1, 1/2.
    log2 = math.log(2.0)
    reference_T = torch.tensor([-1.0, -1.0 + log2, -1.0 - log2], dtype=torch.float64, requires_grad=True)
    logprobs_T = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    penalty_T = k3_penalty(logprobs_T, reference_T)
    penalty_T.sum().backward()
    assert penalty_T.tolist() == pytest.approx([0.0, 1 - log2, log2 - 0.5], abs=1e-15)
    assert logprobs_T.grad is not None and logprobs_T.grad.tolist() == pytest.approx([0.0, -1.0, 0.5], abs=1e-15)
    assert reference_T.grad is None


def test_expected_k3_is_the_reverse_kl() -> None:
    """E_{a ~ pi_theta} k3(a) = KL(pi_theta || pi_ref), which fixes the sign and the direction of d."""
    pi_V = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference_V = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    expected = (pi_V * k3_penalty(pi_V.log(), reference_V.log())).sum()
    torch.testing.assert_close(expected, (pi_V * (pi_V / reference_V).log()).sum())
