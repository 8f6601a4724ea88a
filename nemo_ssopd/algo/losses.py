"""What one optimizer step minimises: a loss over completion tokens, plus auxiliary losses on hidden states.

    L = 1/tokens * sum_t loss_t  +  1/prompts * sum_x lambda(x) L_SSOPD(x)          (paper eq. 13)

Both denominators count the global batch, over data-parallel ranks and micro-batches, so neither term dilutes
the other and neither depends on how the batch is split. Functions here return sums; the actor divides. Metrics hold
scalar tensors: nothing here waits for the device.

Shapes: T completion tokens of a micro-batch, K prefix positions, H hidden size, W this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_ssopd.algo.grpo import PENALTIES, clipped_surrogate, importance, ratio_stats
from nemo_ssopd.metrics import EffectiveShare, Max, Mean, Metrics, Sum
from nemo_ssopd.ops.clipped_kl import DivergenceStats, linear_clipped_kl_with_stats
from nemo_ssopd.ops.divergences import Divergence, linear_divergence


@dataclass(frozen=True)
class TokenInputs:
    """Per-token values of one micro-batch, each [T], at the sampling temperature. Only `logprobs_T` has a gradient.

    `old_logprobs_T` None means that the policy has not moved since sampling: its own log-probs are the old ones.
    `sampler_logprobs_T` and `reference_logprobs_T` are None where the recipe has none; `scales_T` None is 1 for all.

    >>> TokenInputs(logprobs_T=lp, entropy_T=h, advantages_T=a)
    """

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    advantages_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None
    sampler_logprobs_T: torch.Tensor | None = None
    scales_T: torch.Tensor | None = None


TokenLoss = Callable[[TokenInputs], tuple[torch.Tensor, Metrics]]


def grpo_loss(
    inputs: TokenInputs,
    *,
    clip_low: float,
    clip_high: float,
    reference_kl: float,
    penalty: str = "k3",
    dual_clip: float = 0.0,
    importance_cap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """Sum over T of the clipped surrogate plus reference_kl times the penalty (paper eq. 2); to be minimised.

    With an `importance_cap` above 0 the surrogate is weighted by `importance`, truncated there (truncated importance
    sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    """
    tokens = inputs.logprobs_T.numel()
    old_logprobs_T = inputs.logprobs_T.detach() if inputs.old_logprobs_T is None else inputs.old_logprobs_T
    ratio = inputs.logprobs_T, old_logprobs_T, inputs.advantages_T
    surrogate_T = clipped_surrogate(*ratio, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    stats = ratio_stats(*ratio, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    metrics: Metrics = {
        "loss/entropy": Mean(inputs.entropy_T.sum(), tokens),
        "loss/clip_fraction": Mean(stats.clipped_T.sum(), tokens),
    }
    if inputs.sampler_logprobs_T is not None:
        difference_T = (old_logprobs_T - inputs.sampler_logprobs_T).abs()
        metrics["rollout/logprob_mismatch"] = Mean(difference_T.sum(), tokens)
        metrics["rollout/logprob_mismatch_max"] = Max(difference_T.max())
        ratio_T = importance(old_logprobs_T, inputs.sampler_logprobs_T)
        exact_T = ratio_T.double()
        metrics["rollout/effective_sample_size"] = EffectiveShare(exact_T.sum(), exact_T.square().sum(), tokens)
        if importance_cap > 0:
            importance_T = ratio_T.clamp(max=importance_cap)
            surrogate_T = surrogate_T * importance_T
            metrics["loss/importance"] = Mean(importance_T.sum(), tokens)
    surrogate = _scaled_sum(surrogate_T, inputs.scales_T)
    counted = tokens if inputs.scales_T is None else inputs.scales_T.count_nonzero()
    metrics["loss/grpo"] = Mean(surrogate.detach(), counted)
    if inputs.reference_logprobs_T is None:
        return surrogate, metrics
    reference = _scaled_sum(PENALTIES[penalty](inputs.logprobs_T, inputs.reference_logprobs_T), inputs.scales_T)
    metrics["loss/reference_kl"] = Mean(reference.detach(), counted)
    return surrogate + reference_kl * reference, metrics


def _scaled_sum(values_T: torch.Tensor, scales_T: torch.Tensor | None) -> torch.Tensor:
    return values_T.sum() if scales_T is None else (values_T * scales_T).sum()


def sft_loss(inputs: TokenInputs) -> tuple[torch.Tensor, Metrics]:
    """Sum over T of the cross-entropy on reference solutions; `advantages_T` is 0 where a token is input only."""
    loss = -(inputs.logprobs_T * inputs.advantages_T).sum()
    return loss, {"loss/sft": Mean(loss.detach(), inputs.advantages_T.count_nonzero())}


class AuxLoss(Protocol):
    """A loss on the hidden states that the policy's own forward pass computes: it costs no second pass."""

    def positions(self, sequence: int) -> int:
        """How many leading completion positions of this sequence of the batch it wants; 0 for none."""
        ...

    def __call__(self, sequence: int, hidden_KH: torch.Tensor, weight_WH: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """The sequence's weighted loss, to be summed over sequences and divided by the global prompt count."""
        ...


@dataclass(frozen=True)
class DistillTarget:
    """The teacher's final hidden states at the first K completion positions of `y-`, and the group's weight.

    A second teacher's, whose pull is subtracted, are `away_hidden_KH`.

    >>> DistillTarget(teacher_hidden_KH=torch.zeros(64, 128), weight=0.25)
    """

    teacher_hidden_KH: torch.Tensor
    weight: float
    away_hidden_KH: torch.Tensor | None = None


@dataclass(frozen=True)
class ClippedDistillation:
    """SSOPD's auxiliary loss (paper eqs. 3, 6, 11): lambda(x) / K_x * sum_t sum_v min(p_T (log p_T - log p_S), clip).

    Teacher and student share the output layer, so hidden states of both are all it takes. `targets` maps the
    batch's sequence index of `y-` to its target.

    What is not the paper's: another `divergence` or `clip_unit` (see `ops/divergences.py`); position t weighs
    position_decay^t, as a share of the sum over the prefix; `contrast` times the loss against the second teacher is
    subtracted.
    """

    targets: Mapping[int, DistillTarget]
    clip: float
    temperature: float
    chunk_tokens: int
    vocab_size: int
    group: torch.distributed.ProcessGroup | None
    divergence: str = "forward_kl"
    clip_unit: str = "summand"
    position_decay: float = 1.0
    contrast: float = 0.0

    def positions(self, sequence: int) -> int:
        return len(self.targets[sequence].teacher_hidden_KH) if sequence in self.targets else 0

    def __call__(self, sequence: int, hidden_KH: torch.Tensor, weight_WH: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        target = self.targets[sequence]
        loss_K, stats = self._divergence(hidden_KH, target.teacher_hidden_KH, weight_WH)
        K = len(loss_K)
        kl = stats.kl_T.sum()
        metrics: Metrics = {
            "ssopd/weight": Mean(target.weight, 1),
            "ssopd/pairs": Sum(1),
            "ssopd/kl_unclipped": Mean(kl, K),
            "ssopd/clipped_positions": Mean(stats.was_clipped_T.sum(), K),
            # A KL that is zero but for rounding has no share that was cut.
            "ssopd/clipped_mass": Mean(stats.clipped_mass_T.sum().where(kl > 0, 0.0), kl.where(kl > 0, 0.0)),
            "ssopd/teacher_entropy": Mean(stats.teacher_entropy_T.sum(), K),
            "ssopd/student_entropy": Mean(stats.student_entropy_T.sum(), K),
        }
        if target.away_hidden_KH is not None:
            away_K, away_stats = self._divergence(hidden_KH, target.away_hidden_KH, weight_WH)
            loss_K = loss_K - self.contrast * away_K
            metrics["ssopd/kl_away"] = Mean(away_stats.kl_T.sum(), K)
        loss = self._over_positions(loss_K)
        metrics["ssopd/loss"] = Mean(loss.detach(), 1)
        return target.weight * loss, metrics

    def _divergence(
        self, hidden_KH: torch.Tensor, teacher_KH: torch.Tensor, weight_WH: torch.Tensor
    ) -> tuple[torch.Tensor, DivergenceStats]:
        layer: dict[str, Any] = {
            "temperature": self.temperature,
            "group": self.group,
            "chunk_tokens": self.chunk_tokens,
            "vocab_size": self.vocab_size,
        }
        if self.divergence == "forward_kl" and self.clip_unit == "summand":
            return linear_clipped_kl_with_stats(hidden_KH, teacher_KH, weight_WH, clip=self.clip, **layer)
        divergence = Divergence(self.divergence, self.clip, self.clip_unit)
        return linear_divergence(hidden_KH, teacher_KH, weight_WH, divergence=divergence, **layer)

    def _over_positions(self, loss_K: torch.Tensor) -> torch.Tensor:
        if self.position_decay == 1:
            return loss_K.mean()
        weights_K = self.position_decay ** torch.arange(len(loss_K), dtype=loss_K.dtype, device=loss_K.device)
        return (loss_K * weights_K).sum() / weights_K.sum()
