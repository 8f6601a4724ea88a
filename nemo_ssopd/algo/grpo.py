"""GRPO's terms, one value per completion token (paper eq. 2). T counts the completion tokens of a micro-batch.

Nothing here averages: the caller sums over its tokens and divides once, by the token count of the global batch,
so that value and gradient do not depend on micro-batch size, data-parallel size or padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def clipped_surrogate(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> torch.Tensor:
    """Per-token loss, to be minimised: l_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    rho_t = exp(log pi_theta - log pi_old) at the sampled token; `advantages_T` repeats each completion's advantage
    over its tokens. Gradients flow through `logprobs_T` only: where the clip is active (see `ratio_stats`) there
    is none, elsewhere dl_t/dlog pi_theta = -rho_t A_t. Returns [T]; the denominator is the caller's.

    A `dual_clip` c above 1 bounds what a token with a negative advantage can cost: l_t is at most -c A_t (dual-clip
    PPO, arXiv 1912.09729); 0 leaves it off.
    """
    ratio_T = torch.exp(logprobs_T - old_logprobs_T.detach())
    advantages_T = advantages_T.detach()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if not dual_clip:
        return loss_T
    return torch.where(advantages_T < 0, torch.minimum(loss_T, -dual_clip * advantages_T), loss_T)


def importance(old_logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor) -> torch.Tensor:
    """pi_old / pi_sampler at the sampled token: by how much the engine samples it too rarely. Detached; returns [T]."""
    return torch.exp(old_logprobs_T - sampler_logprobs_T).detach()


def token_scales(
    lengths: Sequence[int], kept: Sequence[bool], *, by: str, tokens: int, completions: int, max_length: int
) -> tuple[float, ...] | None:
    """What the tokens of each completion count for, when the sum over all of them is divided by `tokens`.

    `tokens` and `completions` count those kept in the global batch. token: 1 (paper eq. 2; DAPO); sequence: the mean
    over each completion, then over completions (GRPO, arXiv 2402.03300); constant: the sum over each completion divided
    by `max_length`, then the mean over completions (Dr. GRPO, arXiv 2503.20783). A completion that is not kept counts
    nothing. None: 1 for all.

    >>> token_scales([1, 3], [True, True], by="sequence", tokens=4, completions=2, max_length=8)
    (2.0, 0.6666666666666666)
    """
    if by == "token":
        return None if all(kept) else tuple(map(float, kept))
    share = tokens / max(completions, 1)
    divisors = lengths if by == "sequence" else [max_length] * len(lengths)
    return tuple(share / divisor if keep else 0.0 for divisor, keep in zip(divisors, kept, strict=True))


def k3_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of the reverse KL(pi_theta || pi_ref): exp(d) - d - 1, d = log pi_ref - log pi_theta.

    Never negative, zero where the two agree; its mean over tokens sampled from pi_theta is the KL. It is added to
    the loss with weight beta. Gradients flow through `logprobs_T` only: 1 - exp(d). Returns [T]; the denominator is
    the caller's.
    """
    d_T = reference_logprobs_T.detach() - logprobs_T
    return torch.expm1(d_T) - d_T


def k1_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """log pi_theta - log pi_ref: unbiased for the KL, of either sign. Its gradient as a loss is 1, zero on average over
    the policy's own tokens: it measures, and hardly regularises (Schulman 2020, "Approximating KL divergence")."""
    return logprobs_T - reference_logprobs_T.detach()


def k2_penalty(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Half the square of k1: biased for the KL, of low variance; its gradient, k1, is on average that of the KL
    (Schulman 2020)."""
    return 0.5 * (logprobs_T - reference_logprobs_T.detach()).square()


PENALTIES = {"k1": k1_penalty, "k2": k2_penalty, "k3": k3_penalty}
"""Estimates of KL(pi_theta || pi_ref) at the sampled tokens, by name."""


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
    dual_clip: float = 0.0,
) -> RatioStats:
    """The ratio of each token, and whether the clip takes its gradient away.

    It does so only where the ratio has already moved the way the advantage pushes: above 1 + clip_high for A > 0,
    below 1 - clip_low for A < 0; and with a dual clip, above it for A < 0.
    """
    ratio_T = torch.exp(logprobs_T.detach() - old_logprobs_T.detach())
    too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    outside_T = (ratio_T < 1 - clip_low) | (ratio_T > (dual_clip or math.inf))
    too_low_T = outside_T & (advantages_T < 0)
    return RatioStats(ratio_T=ratio_T, clipped_T=too_high_T | too_low_T)
