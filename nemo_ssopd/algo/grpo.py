"""GRPO's terms, one value per completion token (paper eq. 2). T counts the completion tokens of a micro-batch.

Nothing here averages. The caller sums over its tokens and divides once, by the token count of the global batch. So
value and gradient do not depend on micro-batch size, data-parallel size or padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RatioClip:
    """The bounds on the ratio of the policy to the old one: between 1 - low and 1 + high.

    A `dual` above 1 also bounds the loss of a token with a negative advantage, by -dual times the advantage (dual-clip
    PPO, arXiv 1912.09729). 0 disables it.

    >>> RatioClip(low=0.2, high=0.28)
    """

    low: float
    high: float
    dual: float = 0.0


def clipped_surrogate(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip: RatioClip,
) -> torch.Tensor:
    """Return the per-token loss, to be minimized: l_t = -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), [T].

    rho_t = exp(log pi_theta - log pi_old) at the sampled token. `advantages_T` repeats each completion's advantage
    over its tokens. Gradients flow through `logprobs_T` only. Where the clip is active (see `ratio_stats`) there is
    none. Elsewhere dl_t/dlog pi_theta = -rho_t A_t. The caller divides.
    """
    ratio_T = torch.exp(logprobs_T - old_logprobs_T.detach())
    advantages_T = advantages_T.detach()
    clipped_T = ratio_T.clamp(1 - clip.low, 1 + clip.high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if not clip.dual:
        return loss_T
    return torch.where(advantages_T < 0, torch.minimum(loss_T, -clip.dual * advantages_T), loss_T)


def importance(old_logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return pi_old / pi_sampler at each sampled token, [T], detached. Above 1, the engine samples it too rarely."""
    return torch.exp(old_logprobs_T - sampler_logprobs_T).detach()


def k3_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return a per-token estimate of the reverse KL(pi_theta || pi_ref), [T], in nats (k3).

    It is exp(d) - d - 1, with d = log pi_ref - log pi_theta: never negative, and zero where the two agree. Its mean
    over tokens sampled from pi_theta is the KL. It is added to the loss with weight beta. Gradients flow through
    `logprobs_T` only: 1 - exp(d). The caller divides.
    """
    d_T = reference_logprobs_T.detach() - logprobs_T
    return torch.expm1(d_T) - d_T


def k1_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return log pi_theta - log pi_ref, [T], in nats: an unbiased estimate of the KL, of either sign (k1).

    As a loss it hardly regularizes: its gradient in log pi_theta is 1, and its effect averages to zero over the
    policy's own tokens (Schulman 2020, "Approximating KL divergence").
    """
    return logprobs_T - reference_logprobs_T.detach()


def k2_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return half the square of k1, [T]: a biased estimate of the KL with low variance (Schulman 2020).

    As a loss, its gradient in log pi_theta is k1, which on average gives the gradient of the KL.
    """
    return 0.5 * (logprobs_T - reference_logprobs_T.detach()).square()


PENALTIES = {"k1": k1_penalty, "k2": k2_penalty, "k3": k3_penalty}
"""Functions that estimate KL(pi_theta || pi_ref) at the sampled tokens, by name."""


@dataclass(frozen=True)
class RatioStats:
    """The ratio of each token and whether the clip cut its gradient, detached, [T] each.

    >>> stats = RatioStats(ratio_T=torch.tensor([1.0, 1.5]), clipped_T=torch.tensor([False, True]))
    """

    ratio_T: torch.Tensor
    clipped_T: torch.Tensor


def ratio_stats(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip: RatioClip,
) -> RatioStats:
    """Return the ratio of each token, and whether the clip cuts its gradient.

    The clip cuts it only if the ratio has already moved the way the advantage pushes: above 1 + clip.high for A > 0,
    below 1 - clip.low for A < 0. A dual clip also cuts it if the ratio is above `clip.dual` for A < 0.
    """
    ratio_T = torch.exp(logprobs_T.detach() - old_logprobs_T.detach())
    too_high_T = (ratio_T > 1 + clip.high) & (advantages_T > 0)
    outside_T = (ratio_T < 1 - clip.low) | (ratio_T > (clip.dual or math.inf))
    too_low_T = outside_T & (advantages_T < 0)
    return RatioStats(ratio_T=ratio_T, clipped_T=too_high_T | too_low_T)
