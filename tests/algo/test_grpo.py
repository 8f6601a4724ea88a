"""GRPO's per-token terms: hand-computed values, and float64 gradients against their formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from nemo_ssopd.algo.grpo import (
    PENALTIES,
    RatioClip,
    clipped_surrogate,
    k1_penalty,
    k2_penalty,
    k3_penalty,
    ratio_stats,
)
from nemo_ssopd.algo.losses import TokenInputs, grpo_loss
from nemo_ssopd.metrics import merge

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
    clip = RatioClip(CLIP_LOW, CLIP_HIGH)

    loss_T = clipped_surrogate(logprobs_T, old_T, advantages_T, clip)
    loss_T.sum().backward()

    torch.testing.assert_close(loss_T.detach(), torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(logprobs_T.grad, torch.tensor(gradients, dtype=torch.float64))
    assert old_T.grad is None and advantages_T.grad is None

    stats = ratio_stats(logprobs_T, old_T, advantages_T, clip)
    torch.testing.assert_close(stats.ratio_T, torch.tensor(ratios, dtype=torch.float64))
    assert stats.clipped_T.tolist() == clipped
    assert not stats.ratio_T.requires_grad


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 exactly, where the two branches of the minimum tie, the whole gradient -A comes through."""
    logprobs_T = torch.tensor([-0.7, -2.0, -0.01], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([1.7, -0.6, 0.3], dtype=torch.float64)
    old_T = logprobs_T.detach().clone()
    clipped_surrogate(logprobs_T, old_T, advantages_T, RatioClip(0.2, 0.2)).sum().backward()
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-1.7, 0.6, -0.3]


def test_gradients_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    old_T = torch.randn(50, generator=generator, dtype=torch.float64) - 2
    logprobs_T = (old_T + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages_T = torch.randn(50, generator=generator, dtype=torch.float64)

    def surrogate(x_T: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(x_T, old_T, advantages_T, RatioClip(CLIP_LOW, CLIP_HIGH))

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


def test_dual_clip_bounds_tokens_with_a_negative_advantage() -> None:
    # ratio, advantage, loss with c = 3, gradient, clipped. A positive advantage is as without it.
    cases = [(2.5, -2.0, 5.0, 5.0, False), (4.0, -2.0, 6.0, 0.0, True), (4.0, 2.0, -2.6, 0.0, True)]
    ratios, advantages, losses, gradients, clipped = (list(column) for column in zip(*cases, strict=True))
    logprobs_T = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    inputs = logprobs_T, torch.zeros(3, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64)
    loss_T = clipped_surrogate(*inputs, RatioClip(CLIP_LOW, CLIP_HIGH, 3.0))
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx(losses)
    assert logprobs_T.grad is not None and logprobs_T.grad.tolist() == pytest.approx(gradients)
    stats = ratio_stats(*inputs, RatioClip(CLIP_LOW, CLIP_HIGH, 3.0))
    assert stats.clipped_T.tolist() == clipped


def test_k1_and_k2_values_and_gradients() -> None:
    # log pi_theta - log pi_ref = -1/2 and 2.
    reference_T = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    logprobs_T = torch.tensor([-1.5, -1.0], dtype=torch.float64, requires_grad=True)
    for penalty, values, gradients in ((k1_penalty, [-0.5, 2.0], [1.0, 1.0]), (k2_penalty, [0.125, 2.0], [-0.5, 2.0])):
        penalty_T = penalty(logprobs_T, reference_T)
        (gradient_T,) = torch.autograd.grad(penalty_T.sum(), logprobs_T)
        assert (penalty_T.tolist(), gradient_T.tolist()) == (values, gradients)


def test_expected_k1_is_the_reverse_kl_and_k2_has_its_gradient() -> None:
    logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    logp_V = logits_V.log_softmax(0)
    p_V = logp_V.exp().detach()
    kl = (logp_V.exp() * (logp_V - reference_V)).sum()
    torch.testing.assert_close((p_V * k1_penalty(logp_V, reference_V)).sum(), kl)
    (expected_V,) = torch.autograd.grad(kl, logits_V, retain_graph=True)
    for name, has_the_gradient in {"k1": False, "k2": True, "k3": False}.items():
        estimate = (p_V * PENALTIES[name](logp_V, reference_V)).sum()
        (gradient_V,) = torch.autograd.grad(estimate, logits_V, retain_graph=True)
        assert torch.allclose(gradient_V, expected_V) == has_the_gradient, name


def batch() -> tuple[TokenInputs, list[int]]:
    """Three completions of 1, 4 and 3 tokens. Ratios leave the clip's range, and the sampler differs."""
    generator = torch.Generator().manual_seed(2)
    old_T, noise_T, sampler_T, reference_T = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    inputs = TokenInputs(
        logprobs_T=(old_T + 0.5 * noise_T).requires_grad_(),
        old_logprobs_T=old_T,
        advantages_T=torch.tensor([1.5] + [-0.5] * 4 + [-1.0] * 3, dtype=torch.float64),
        entropy_T=torch.zeros(8),
        weights_T=torch.ones(8, dtype=torch.float64),
        reference_logprobs_T=reference_T,
        sampler_logprobs_T=old_T + 0.3 * sampler_T,
    )
    return inputs, [1, 4, 3]


def by_hand(inputs: TokenInputs, *, cap: float) -> list[torch.Tensor]:
    """Each completion's token losses: surrogate, weighted by the truncated ratio, and 0.1 times k3."""
    losses = []
    for t in range(8):
        ratio = (inputs.logprobs_T[t] - inputs.old_logprobs_T[t]).exp()
        surrogate = torch.min(ratio * inputs.advantages_T[t], ratio.clamp(0.8, 1.3) * inputs.advantages_T[t])
        weight = (inputs.old_logprobs_T[t] - inputs.sampler_logprobs_T[t]).exp().clamp(max=cap)
        d = inputs.reference_logprobs_T[t] - inputs.logprobs_T[t]
        losses.append(-weight * surrogate + 0.1 * (d.exp() - d - 1))
    return [torch.stack(part) for part in (losses[:1], losses[1:5], losses[5:])]


def test_importance_and_reference_penalty_of_each_token() -> None:
    inputs, lengths = batch()
    loss_T, metrics = grpo_loss(inputs, clip=RatioClip(CLIP_LOW, CLIP_HIGH), reference_kl=0.1, importance_cap=1.1)
    expected_T = torch.cat(by_hand(inputs, cap=1.1))
    torch.testing.assert_close(loss_T, expected_T)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), inputs.logprobs_T, retain_graph=True)
    torch.testing.assert_close(gradient_T, torch.autograd.grad(expected_T.sum(), inputs.logprobs_T)[0])
    assert 0 < metrics["loss/importance"].value() < 1.1


def test_logged_losses_leave_out_tokens_without_weight() -> None:
    inputs, _ = batch()
    weights_T = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
    _, metrics = grpo_loss(
        replace(inputs, weights_T=weights_T), clip=RatioClip(CLIP_LOW, CLIP_HIGH), reference_kl=0.1, importance_cap=1.1
    )
    whole = [metrics["loss/grpo"].value() + 0.1 * metrics["loss/reference_kl"].value()]
    first, _, last = by_hand(inputs, cap=1.1)
    assert whole == pytest.approx([float(torch.cat([first, last]).detach().mean())])


@pytest.mark.parametrize("cuts", [(), (1,), (1, 3)])
def test_importance_weights_and_effective_sample_size_by_hand(cuts: tuple[int, ...]) -> None:
    """pi_old / pi_sampler is 1/2, 1, 2, 4: their sum is 7.5 and that of their squares 21.25. However they are split."""
    ratios_T = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    old_T = torch.tensor([-3.0, -2.0, -1.0, -2.0], dtype=torch.float64)
    advantages_T = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    logprobs_T = old_T.clone().requires_grad_()
    total, parts = torch.zeros(()), []
    for start, end in itertools.pairwise((0, *cuts, 4)):
        inputs = TokenInputs(
            logprobs_T=logprobs_T[start:end],
            old_logprobs_T=old_T[start:end],
            advantages_T=advantages_T[start:end],
            entropy_T=torch.zeros(end - start),
            weights_T=torch.ones(end - start, dtype=torch.float64),
            sampler_logprobs_T=old_T[start:end] - ratios_T[start:end].log(),
        )
        loss_T, metrics = grpo_loss(inputs, clip=RatioClip(0.2, 0.2), reference_kl=0.0, importance_cap=2.0)
        uncorrected_T, same = grpo_loss(inputs, clip=RatioClip(0.2, 0.2), reference_kl=0.0, importance_cap=0.0)
        assert float(uncorrected_T.detach().sum()) == pytest.approx(-float(advantages_T[start:end].sum()))
        assert same["rollout/effective_sample_size"] == metrics["rollout/effective_sample_size"]
        total, parts = total + loss_T.sum(), [*parts, metrics]
    total.backward()
    # -A min(w, 2) at ratio 1: -0.5 + 1 - 4 - 1.
    assert total.item() == pytest.approx(-4.5)
    assert logprobs_T.grad is not None and logprobs_T.grad.tolist() == pytest.approx([-0.5, 1.0, -4.0, -1.0])
    values = {key: metric.value() for key, metric in merge(*parts).items()}
    assert values["rollout/effective_sample_size"] == pytest.approx(
        7.5**2 / (4 * 21.25)
    )  # of the weights before the cap
    assert values["loss/importance"] == pytest.approx((0.5 + 1 + 2 + 2) / 4)
    assert values["rollout/logprob_mismatch"] == pytest.approx(math.log(2) * (1 + 0 + 1 + 2) / 4)
