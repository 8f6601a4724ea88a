"""Divergences other than the clipped forward KL, over a vocabulary sharded over ranks: plain torch, in token chunks.

    forward_kl: sum_v p_T log(p_T / p_S)          reverse_kl: sum_v p_S log(p_S / p_T)
    jsd: (KL(p_T || m) + KL(p_S || m)) / 2, m = (p_T + p_S) / 2         (the family of GKD, arXiv 2306.13649)

With d_v the derivative of the clipped sum in log p_S(v), the gradient in the student's logits is
d_v - p_S(v) sum_u d_u. Two collectives of a few numbers per token. Slower than `clipped_kl`, which fuses all this for
the default loss: a chunk's log-probs and gradient exist in float32. Logits must be finite.

T tokens, C tokens of one chunk, H hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_ssopd.ops.clipped_kl import DivergenceStats
from nemo_ssopd.ops.fused_output_loss import linear_distillation
from nemo_ssopd.ops.vocab_parallel import LN_2, compute_dtype, gather_shards, output_layer, sum_shards


@dataclass(frozen=True)
class Divergence:
    """A divergence, and the cap on each of its summands over the vocabulary.

    >>> Divergence(kind="reverse_kl", clip=0.05)
    """

    kind: str
    clip: float

    def summands(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """Return one summand per column of the vocabulary, before any clip."""
        if self.kind == "forward_kl":
            return teacher_logp.exp() * (teacher_logp - student_logp)
        if self.kind == "reverse_kl":
            return student_logp.exp() * (student_logp - teacher_logp)
        assert self.kind == "jsd", self.kind
        mean_logp = torch.logaddexp(student_logp, teacher_logp) - LN_2
        return (teacher_logp.exp() * (teacher_logp - mean_logp) + student_logp.exp() * (student_logp - mean_logp)) / 2


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    divergence: Divergence,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    vocab_size: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """Return the clipped divergence of each token, [T], in nats, and its statistics; their `kl_T` is unclipped.

    Arguments and gradients are those of `linear_clipped_kl`.
    """
    layer = output_layer(
        student_hidden, weight, temperature=temperature, group=group, chunk_tokens=chunk_tokens, vocab_size=vocab_size
    )
    loss_T, stats_T5 = linear_distillation(
        student_hidden, teacher_hidden, weight, _TokenDivergence(divergence, group), layer
    )
    return loss_T, DivergenceStats(*stats_T5.unbind(1))


@dataclass(frozen=True)
class _TokenDivergence:
    """A divergence as a `LogitsLoss`."""

    divergence: Divergence
    group: dist.ProcessGroup | None
    num_saved: ClassVar[int] = 3  # log-sum-exp of student and teacher, sum of d_v

    def evaluate(self, student_CW: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_sums = [
            gather_shards(logits_CW.to(compute_dtype(logits_CW.dtype)).logsumexp(1), self.group).logsumexp(0)
            for logits_CW in (student_CW, teacher_CW)
        ]
        student_logp_CW, teacher_logp_CW = _log_probs(student_CW, log_sums[0]), _log_probs(teacher_CW, log_sums[1])
        slope_CW, summands_CW, counted_CW = self._slope(student_logp_CW, teacher_logp_CW)
        entropies = [-(logp_CW.exp() * logp_CW).sum(1) for logp_CW in (teacher_logp_CW, student_logp_CW)]
        over_C = (summands_CW > self.divergence.clip).any(1).to(summands_CW.dtype)
        parts = [counted_CW.sum(1), slope_CW.sum(1), summands_CW.sum(1), over_C, *entropies]
        loss_C, slope_C, whole_C, over_C, *entropies = sum_shards(torch.stack(parts), self.group).unbind(0)
        stats = [whole_C, over_C.clamp(max=1.0), whole_C - loss_C, *entropies]
        return loss_C, torch.stack(stats, dim=1), torch.stack([*log_sums, slope_C], dim=1)

    def write_gradient(
        self, student_CW: Tensor, teacher_CW: Tensor, saved: Tensor, upstream_C: Tensor | None, out_CW: Tensor
    ) -> None:
        student_log_sum_C, teacher_log_sum_C, slope_C = saved.to(compute_dtype(student_CW.dtype)).unbind(1)
        student_logp_CW = _log_probs(student_CW, student_log_sum_C)
        slope_CW, _, _ = self._slope(student_logp_CW, _log_probs(teacher_CW, teacher_log_sum_C))
        grad_CW = slope_CW - student_logp_CW.exp() * slope_C.unsqueeze(1)
        out_CW.copy_(grad_CW if upstream_C is None else grad_CW * upstream_C.unsqueeze(1))

    def _slope(self, student_logp_CW: Tensor, teacher_logp_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d_v, the summands, and the clipped summands, all [C, W]."""
        with torch.enable_grad():
            student_logp_CW = student_logp_CW.detach().requires_grad_()
            summands_CW = self.divergence.summands(student_logp_CW, teacher_logp_CW)
            counted_CW = summands_CW.clamp(max=self.divergence.clip)
            (slope_CW,) = torch.autograd.grad(counted_CW.sum(), student_logp_CW)
        return slope_CW, summands_CW.detach(), counted_CW.detach()


def _log_probs(logits_CW: Tensor, log_sum_C: Tensor) -> Tensor:
    """Return the log-probs of this rank's columns, normalized over the columns of all ranks."""
    return logits_CW.to(log_sum_C.dtype) - log_sum_C.unsqueeze(1)
