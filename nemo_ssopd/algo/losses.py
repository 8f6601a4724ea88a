"""The terms of the objective: a loss over completion tokens, plus auxiliary losses on hidden states.

    L = token loss / its token count  +  sum over auxiliary losses: loss / its own count          (paper eq. 13)

All counts are those of the global batch, over data-parallel ranks and micro-batches. So no term dilutes another, and
none depends on how the batch is split. `MegatronPolicy` divides by the counts, not the functions here. Metrics hold
scalar tensors, so nothing here waits for the device.

Shapes: T completion tokens of a micro-batch, K positions that an auxiliary loss reads, H hidden size, W this rank's
vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from nemo_ssopd.algo.grpo import PENALTIES, RatioClip, clipped_surrogate, importance, ratio_stats
from nemo_ssopd.metrics import EffectiveShare, Max, Mean, Metrics, Sum
from nemo_ssopd.ops.clipped_kl import DivergenceStats, linear_clipped_kl_with_stats
from nemo_ssopd.ops.divergences import Divergence, linear_divergence
from nemo_ssopd.types import TrainExample


@dataclass(frozen=True)
class TokenInputs:
    """Per-token values of one micro-batch, each [T], at the sampling temperature. Only `logprobs_T` has a gradient.

    `weights_T` are the examples' token weights: 0 leaves a token out. If `old_logprobs_T` is None, the policy has not
    moved since sampling, and its own log-probs are the old ones. `sampler_logprobs_T` and `reference_logprobs_T` are
    None if the recipe does not use them.

    >>> TokenInputs(logprobs_T=lp, entropy_T=h, weights_T=w, advantages_T=a)
    """

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    weights_T: torch.Tensor
    advantages_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None
    sampler_logprobs_T: torch.Tensor | None = None


TokenLoss = Callable[[TokenInputs], tuple[torch.Tensor, Metrics]]
"""A function that returns the loss of each token, [T], not yet weighted, and metrics."""


def grpo_loss(
    inputs: TokenInputs,
    *,
    clip: RatioClip,
    reference_kl: float,
    reference_penalty: str = "k3",
    importance_cap: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """Return the clipped surrogate plus reference_kl times the penalty, per token [T], to be minimized (paper eq. 2).

    An `importance_cap` above 0 weights the surrogate by `importance`, truncated at the cap (truncated importance
    sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    """
    tokens, weights_T = inputs.logprobs_T.numel(), inputs.weights_T
    old_logprobs_T = inputs.logprobs_T.detach() if inputs.old_logprobs_T is None else inputs.old_logprobs_T
    ratio = inputs.logprobs_T, old_logprobs_T, inputs.advantages_T
    loss_T = clipped_surrogate(*ratio, clip)
    metrics: Metrics = {
        "loss/entropy": Mean(inputs.entropy_T.sum(), tokens),
        "loss/clip_fraction": Mean(ratio_stats(*ratio, clip).clipped_T.sum(), tokens),
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
            loss_T = loss_T * importance_T
            metrics["loss/importance"] = Mean(importance_T.sum(), tokens)
    metrics["loss/grpo"] = _mean_of(loss_T, weights_T)
    if inputs.reference_logprobs_T is not None:
        penalty_T = PENALTIES[reference_penalty](inputs.logprobs_T, inputs.reference_logprobs_T)
        metrics["loss/reference_kl"] = _mean_of(penalty_T, weights_T)
        loss_T = loss_T + reference_kl * penalty_T
    return loss_T, metrics


def sft_loss(inputs: TokenInputs) -> tuple[torch.Tensor, Metrics]:
    """Return the cross-entropy of each token, [T], in nats. Tokens of weight 0 are read but not learned."""
    loss_T = -inputs.logprobs_T
    return loss_T, {"loss/sft": _mean_of(loss_T, inputs.weights_T)}


def _mean_of(values_T: torch.Tensor, weights_T: torch.Tensor) -> Mean:
    return Mean((values_T.detach() * weights_T).sum(), weights_T.sum())


class AuxLoss(Protocol):
    """A loss on the hidden states of the policy's own forward pass. It costs no second pass."""

    @property
    def area(self) -> str:
        """Return the first part of its metrics' names, area/name."""
        ...

    def positions(self, example: TrainExample) -> int:
        """Return how many leading completion positions of this example the loss reads, 0 for none."""
        ...

    def denominator(self, examples: Sequence[TrainExample]) -> float:
        """Return this rank's share of the loss's denominator. The shares are summed over data-parallel ranks."""
        ...

    def __call__(
        self, examples: Sequence[TrainExample], hidden_KH: torch.Tensor, weight_WH: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the sum of the losses of `examples`, and metrics without the area in their names.

        `hidden_KH` holds the student's hidden states at the examples' positions, laid end to end. They predict the
        first completion tokens. `weight_WH` is this rank's part of the output layer.
        """
        ...


@dataclass(frozen=True)
class Distillation:
    """SSOPD's auxiliary loss (paper eqs. 3, 6, 11): lambda(x) / K_x * sum_t sum_v min(p_T (log p_T - log p_S), tau).

    tau is `kl_clip`. The loss is divided by the number of prompts. Teacher and student share the output layer, so the
    loss needs only the hidden states of both.

    Two options are not in the paper. `divergence` chooses another divergence (see `ops/divergences.py`). `contrast`
    times the loss against a second teacher is subtracted.
    """

    area: ClassVar[str] = "ssopd"
    kl_clip: float
    temperature: float
    chunk_tokens: int
    vocab_size: int
    group: torch.distributed.ProcessGroup | None
    divergence: str = "forward_kl"
    contrast: float = 0.0

    def positions(self, example: TrainExample) -> int:
        return 0 if example.teacher is None else example.teacher.sequence.completion_length

    def denominator(self, examples: Sequence[TrainExample]) -> float:
        return len({example.group for example in examples})

    def __call__(
        self, examples: Sequence[TrainExample], hidden_KH: torch.Tensor, weight_WH: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        lengths = [self.positions(example) for example in examples]
        loss_K, stats = self._divergence(hidden_KH, _joined(e.teacher_states for e in examples), weight_WH)
        losses = [part.mean() for part in loss_K.split(lengths)]
        metrics = _distillation_metrics(stats, examples)
        contrasted = [i for i, example in enumerate(examples) if example.contrast_states is not None]
        if contrasted:
            students = hidden_KH.split(lengths)
            away_K, away_stats = self._divergence(
                torch.cat([students[i] for i in contrasted]),
                _joined(examples[i].contrast_states for i in contrasted),
                weight_WH,
            )
            for i, part in zip(contrasted, away_K.split([lengths[i] for i in contrasted]), strict=True):
                losses[i] = losses[i] - self.contrast * part.mean()
            metrics["kl_contrast"] = Mean(away_stats.kl_T.sum(), len(away_K))
        loss_R = torch.stack(losses)
        metrics["loss"] = Mean(loss_R.detach().sum(), len(losses))
        weights = [example.teacher.weight for example in examples if example.teacher is not None]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum(), metrics

    def _divergence(
        self, hidden_KH: torch.Tensor, teacher_KH: torch.Tensor, weight_WH: torch.Tensor
    ) -> tuple[torch.Tensor, DivergenceStats]:
        if self.divergence == "forward_kl":
            return linear_clipped_kl_with_stats(
                hidden_KH,
                teacher_KH,
                weight_WH,
                clip=self.kl_clip,
                temperature=self.temperature,
                group=self.group,
                chunk_tokens=self.chunk_tokens,
                vocab_size=self.vocab_size,
            )
        return linear_divergence(
            hidden_KH,
            teacher_KH,
            weight_WH,
            divergence=Divergence(self.divergence, self.kl_clip),
            temperature=self.temperature,
            group=self.group,
            chunk_tokens=self.chunk_tokens,
            vocab_size=self.vocab_size,
        )


def _joined(states: Iterable[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([states_KH for states_KH in states if states_KH is not None])


def _distillation_metrics(stats: DivergenceStats, examples: Sequence[TrainExample]) -> Metrics:
    kl, positions = stats.kl_T.sum(), len(stats.kl_T)
    weights = [example.teacher.weight for example in examples if example.teacher is not None]
    return {
        "weight": Mean(sum(weights), len(weights)),
        "pairs": Sum(len(examples)),
        "kl_unclipped": Mean(kl, positions),
        "clipped_positions": Mean(stats.was_clipped_T.sum(), positions),
        # The clip cuts no share of a KL that is zero up to rounding.
        "clipped_mass": Mean(stats.clipped_mass_T.sum().where(kl > 0, 0.0), kl.where(kl > 0, 0.0)),
        "teacher_entropy": Mean(stats.teacher_entropy_T.sum(), positions),
        "student_entropy": Mean(stats.student_entropy_T.sum(), positions),
    }
