"""GRPO's terms, one value per completion token (paper eq. 2). T counts the completion tokens of a micro-batch.

Nothing here averages: the caller sums over its tokens and divides once, by the token count of the global batch,
so that value and gradient do not depend on micro-batch size, data-parallel size or padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def clipped_surrogate(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """Per-token loss, to be minimised: l_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    rho_t = exp(log pi_theta - log pi_old) at the sampled token; `advantages_T` repeats each completion's advantage
    over its tokens. Gradients flow through `logprobs_T` only: where the clip is active (see `ratio_stats`) there
    is none, elsewhere dl_t/dlog pi_theta = -rho_t A_t. Returns [T]; the denominator is the caller's.
    """
    ratio_T = torch.exp(logprobs_T - old_logprobs_T.detach())
    advantages_T = advantages_T.detach()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def k3_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of the reverse KL(pi_theta || pi_ref): exp(d) - d - 1, d = log pi_ref - log pi_theta.

    Never negative, zero where the two agree; its mean over tokens sampled from pi_theta is the KL. It is added to
    the loss with weight beta. Gradients flow through `logprobs_T` only: 1 - exp(d). Returns [T]; the denominator is
    the caller's.
    """
    d_T = reference_logprobs_T.detach() - logprobs_T
    return torch.expm1(d_T) - d_T


@dataclass(frozen=True)
class RatioStats:
    """Detached diagnostics, one value per token.

    >>> stats = RatioStats(ratio_T=torch.tensor([1.0, 1.5]), clipped_T=torch.tensor([False, True]))
    """

    ratio_T: torch.Tensor
    clipped_T: torch.Tensor


def ratio_stats(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> RatioStats:
    """The ratio of each token, and whether the clip takes its gradient away.

    It does so only where the ratio has already moved the way the advantage pushes: above 1 + clip_high for A > 0,
    below 1 - clip_low for A < 0.
    """
    ratio_T = torch.exp(logprobs_T.detach() - old_logprobs_T.detach())
    too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    too_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    return RatioStats(ratio_T=ratio_T, clipped_T=too_high_T | too_low_T)
