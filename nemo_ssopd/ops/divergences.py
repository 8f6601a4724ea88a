"""Other divergences than the clipped forward KL, over a vocabulary sharded over ranks: plain torch, in token chunks.

    forward_kl: sum_v p_T log(p_T / p_S)          reverse_kl: sum_v p_S log(p_S / p_T)
    jsd: (KL(p_T || m) + KL(p_S || m)) / 2, m = (p_T + p_S) / 2         (the family of GKD, arXiv 2306.13649)

With d_v the derivative of the clipped sum in log p_S(v), the gradient in the student's logits is
d_v - p_S(v) sum_u d_u. Two collectives of a few numbers per token. Slower than `clipped_kl`, which fuses all this for
the default loss: a chunk's log-probs and gradient exist in float32. Logits must be finite.

T tokens, C tokens of one chunk, H hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_ssopd.ops.clipped_kl import ClippedKLStats
from nemo_ssopd.ops.row_kernels_torch import LN_2, compute_dtype
from nemo_ssopd.ops.vocab_parallel import (
    LinearGradients,
    OutputLayer,
    gather_shards,
    output_layer,
    scale_hidden_gradient,
    sum_shards,
)


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and what its clip caps: each summand over the vocabulary, or the sum, the token's loss.

    >>> Divergence(kind="reverse_kl", clip=0.05, clip_unit="token")
    """

    kind: str
    clip: float
    clip_unit: str

    def summands(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """One per column of the vocabulary, before any clip."""
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
) -> tuple[Tensor, ClippedKLStats]:
    """The clipped divergence of each token, [T], in nats, and its statistics; their `kl_T` is the unclipped one.

    Arguments and gradients are those of `linear_clipped_kl`.
    """
    layer = output_layer(
        student_hidden, weight, temperature=temperature, group=group, chunk_tokens=chunk_tokens, vocab_size=vocab_size
    )
    loss_T, stats_T5 = _LinearDivergence.apply(
        student_hidden,
        teacher_hidden.detach(),
        weight,
        divergence,
        layer,
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return loss_T, ClippedKLStats(*stats_T5.unbind(1))


def _log_softmax(logits_CW: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of this rank's columns, normalised over all of them."""
    logits_CW = logits_CW.to(compute_dtype(logits_CW.dtype))
    return logits_CW - gather_shards(logits_CW.logsumexp(1), group).logsumexp(0).unsqueeze(1)


def _terms(
    student_CW: Tensor, teacher_CW: Tensor, divergence: Divergence, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C], statistics [C, 5], and the gradient in this rank's logits for an upstream gradient of 1."""
    teacher_logp_CW = _log_softmax(teacher_CW, group)
    clip, per_token = divergence.clip, divergence.clip_unit == "token"
    with torch.enable_grad():
        student_logp_CW = _log_softmax(student_CW.detach(), group).requires_grad_()
        summands_CW = divergence.summands(student_logp_CW, teacher_logp_CW)
        counted_CW = summands_CW if per_token else summands_CW.clamp(max=clip)
        (slope_CW,) = torch.autograd.grad(counted_CW.sum(), student_logp_CW)
    student_logp_CW, summands_CW, counted_CW = student_logp_CW.detach(), summands_CW.detach(), counted_CW.detach()
    entropies = [-(logp_CW.exp() * logp_CW).sum(1) for logp_CW in (teacher_logp_CW, student_logp_CW)]
    over_C = (summands_CW > clip).any(1).to(summands_CW.dtype)
    parts = [counted_CW.sum(1), slope_CW.sum(1), summands_CW.sum(1), over_C, *entropies]
    loss_C, slope_C, whole_C, over_C, teacher_entropy_C, student_entropy_C = sum_shards(
        torch.stack(parts), group
    ).unbind(0)
    grad_CW = slope_CW - student_logp_CW.exp() * slope_C.unsqueeze(1)
    if per_token:
        over_C = (whole_C > clip).to(whole_C.dtype)
        loss_C = whole_C.clamp(max=clip)
        grad_CW = grad_CW * (1 - over_C).unsqueeze(1)
    stats = [whole_C, over_C.clamp(max=1.0), whole_C - loss_C, teacher_entropy_C, student_entropy_C]
    return loss_C, torch.stack(stats, dim=1), grad_CW


class _LinearDivergence(torch.autograd.Function):
    """Where the gradient is computed: see `clipped_kl`."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        teacher_TH: Tensor,
        weight_WH: Tensor,
        divergence: Divergence,
        layer: OutputLayer,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, dtype = student_TH.shape[0], compute_dtype(student_TH.dtype)
        loss_T = student_TH.new_empty(num_tokens, dtype=dtype)
        stats_T5 = student_TH.new_empty(num_tokens, 5, dtype=dtype)
        grad_hidden_TH = torch.empty_like(student_TH) if needs_hidden and not needs_weight else None
        buffers = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(num_tokens):
            student_CW = layer.logits(student_TH[rows], weight_WH, buffers[0])
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, buffers[1])
            loss_T[rows], stats_T5[rows], grad_CW = _terms(student_CW, teacher_CW, divergence, layer.group)
            if grad_hidden_TH is not None:
                layer.write_hidden_gradient(grad_CW.to(student_TH.dtype), weight_WH, grad_hidden_TH[rows])
        ctx.divergence, ctx.layer, ctx.needs_hidden, ctx.needs_weight = divergence, layer, needs_hidden, needs_weight
        if needs_weight:
            ctx.save_for_backward(student_TH, teacher_TH, weight_WH)
        elif needs_hidden:
            ctx.save_for_backward(grad_hidden_TH)
        ctx.mark_non_differentiable(stats_T5)
        return loss_T, stats_T5

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        layer: OutputLayer = ctx.layer
        if not ctx.needs_weight:
            (unit_grad_TH,) = ctx.saved_tensors
            return scale_hidden_gradient(unit_grad_TH, upstream_T, layer), None, None, None, None, None, None
        student_TH, teacher_TH, weight_WH = ctx.saved_tensors
        gradients = LinearGradients(layer, student_TH, weight_WH, ctx.needs_hidden)
        buffers = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(student_TH.shape[0]):
            student_CW = layer.logits(student_TH[rows], weight_WH, buffers[0])
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, buffers[1])
            _, _, grad_CW = _terms(student_CW, teacher_CW, ctx.divergence, layer.group)
            gradients.add((grad_CW * upstream_T[rows].unsqueeze(1)).to(student_TH.dtype), rows)
        grad_hidden_TH, grad_weight_WH = gradients.finish()
        return grad_hidden_TH, None, grad_weight_WH, None, None, None, None
