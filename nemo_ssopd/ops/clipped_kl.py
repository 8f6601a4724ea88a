"""Pointwise-clipped forward KL over a vocabulary sharded over ranks (paper, eqs. 3 and 6).

    loss_t = sum_v min(p_T(v) * (log p_T(v) - log p_S(v)), clip)           teacher p_T, student p_S, in nats
    d loss_t / d z_S(v) = P_U * p_S(v) - p_T(v) * [v in U],                U = {v : summand below clip}, P_U = p_T(U)

Exact over the whole vocabulary. Two collectives of a few numbers per token (the log-sum-exp of both models, then loss
and P_U), whatever the vocabulary. The teacher gets no gradient. `docs/clipped_kl.md` derives the gradient.

Where the fused form computes gradients. The gradient of loss_t in its hidden state is one row, so an upstream gradient
only scales that row: as long as the weight is frozen (LoRA), the row is made in the forward while the chunk's logits
are there, three matrix products in all, and the backward is a scaling and one all-reduce. The weight's gradient sums
over tokens with their upstream gradients, which the forward does not know: when it is asked for, the backward
recomputes both logits chunk by chunk (six products), with no collective but the last all-reduce.

T tokens, C tokens of one chunk, H hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_ssopd.ops import row_kernels_torch
from nemo_ssopd.ops.row_kernels_torch import RowNorm, compute_dtype, in_huge_pages
from nemo_ssopd.ops.vocab_parallel import (
    LinearGradients,
    OutputLayer,
    gather_shards,
    has_whole_rows,
    norm_and_entropy,
    output_layer,
    row_kernels,
    scale_hidden_gradient,
    shard_columns,
    sum_shards,
)


@dataclass(frozen=True)
class ClippedKLStats:
    """What to log beside the loss, per token, without gradient, in nats.

    Example: p_T = (0.5, 0.5), p_S = (0.9, 0.1), clip 0.05. The summands are (-0.294, 0.805), so the loss is
    -0.294 + 0.05 = -0.244, the KL 0.511, `was_clipped` 1, `clipped_mass` 0.755, the teacher's entropy log 2.
    """

    kl_T: Tensor
    was_clipped_T: Tensor  # 1.0 where some summand reached the clip, else 0.0: its mean is the share of positions
    clipped_mass_T: Tensor  # kl - loss, what the clip cut off
    teacher_entropy_T: Tensor
    student_entropy_T: Tensor


def vocab_parallel_clipped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    clip: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None = None,
) -> Tensor:
    """The clipped KL of each token, [T], in nats, not reduced; float32 (float64 for float64 logits).

    Logits are this rank's columns, [T, V/tp]; ranks hold consecutive ranges of the vocabulary. Columns from
    `vocab_size` on are padding: they take no mass and get no gradient. The student's gradient has the dtype of its
    logits. The inputs are not changed, and both must stay unchanged until the backward.
    """
    return _logits_clipped_kl(student_logits, teacher_logits, clip, group, vocab_size, with_stats=False)[0]


def vocab_parallel_clipped_kl_with_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    clip: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None = None,
) -> tuple[Tensor, ClippedKLStats]:
    """`vocab_parallel_clipped_kl`, and its statistics out of the same passes."""
    return _logits_clipped_kl(student_logits, teacher_logits, clip, group, vocab_size, with_stats=True)


def linear_clipped_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    clip: float,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    vocab_size: int | None = None,
) -> Tensor:
    """The clipped KL of each token, [T], between `softmax(hidden W^T / temperature)` of student and teacher.

    Hidden states are [T, H], the weight is this rank's [V/tp, H].
    Logits exist for `chunk_tokens` tokens at a time. The gradient of the student's hidden states comes back summed over
    `group`; the weight's is this shard's own, of the student side alone, and computed only if the weight requires it.
    """
    return linear_clipped_kl_with_stats(
        student_hidden,
        teacher_hidden,
        weight,
        clip=clip,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )[0]


def linear_clipped_kl_with_stats(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    clip: float,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    vocab_size: int | None = None,
) -> tuple[Tensor, ClippedKLStats]:
    """`linear_clipped_kl`, and its statistics out of the same passes."""
    _check_pair(student_hidden, teacher_hidden, clip)
    layer = output_layer(
        student_hidden,
        weight,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )
    loss_T, stats_T5 = _LinearClippedKL.apply(
        student_hidden,
        teacher_hidden.detach(),
        weight,
        clip,
        layer,
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return loss_T, ClippedKLStats(*stats_T5.unbind(1))


def _logits_clipped_kl(
    student_TW: Tensor,
    teacher_TW: Tensor,
    clip: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    with_stats: bool,
) -> tuple[Tensor, ClippedKLStats]:
    _check_pair(student_TW, teacher_TW, clip)
    width = student_TW.shape[1]
    if vocab_size is not None:
        shard = shard_columns(width, vocab_size, group, student_TW.device)
        width = shard.stop - shard.start
    loss_T, stats_T5 = _LogitsClippedKL.apply(
        student_TW,
        teacher_TW.detach(),
        clip,
        group,
        width,
        with_stats,
        torch.is_grad_enabled() and student_TW.requires_grad,
    )
    return loss_T, ClippedKLStats(*stats_T5.unbind(1))


def _check_pair(student: Tensor, teacher: Tensor, clip: float) -> None:
    if student.dim() != 2 or student.shape != teacher.shape or student.dtype != teacher.dtype:
        raise ValueError(
            f"student and teacher must be alike and have two dimensions, got {tuple(student.shape)} {student.dtype} "
            f"and {tuple(teacher.shape)} {teacher.dtype}; flatten sequence and batch, cast the teacher"
        )
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, got {clip}; infinity turns clipping off")


@dataclass(frozen=True)
class _Terms:
    """What one pair of logits yields on every rank alike: the outputs, and what its gradient needs."""

    student: RowNorm
    teacher: RowNorm
    unclipped_mass_T: Tensor  # P_U
    loss_T: Tensor
    stats_T5: Tensor  # in the order of ClippedKLStats


def _clipped_kl_terms(
    student_TW: Tensor,
    teacher_TW: Tensor,
    clip: float,
    group: dist.ProcessGroup | None,
    with_stats: bool,
    unit_grad_TW: Tensor | None,
) -> _Terms:
    """Loss and statistics, and into `unit_grad_TW` the gradient for an upstream gradient of 1 if it is wanted.

    The two collectives are here: a gather of the row statistics of both models, then a sum of loss and P_U.
    """
    kernels = row_kernels(student_TW)
    one_sweep = has_whole_rows(group) and kernels is row_kernels_torch
    if one_sweep:
        student_T3, teacher_T3, sums_T4 = row_kernels_torch.sweep_whole_rows(
            student_TW, teacher_TW, clip, with_stats, unit_grad_TW
        )
        stats_NT6 = torch.cat([student_T3, teacher_T3], dim=1).unsqueeze(0)
    else:
        student_T3 = kernels.row_statistics(student_TW, with_stats)
        teacher_T3 = kernels.row_statistics(teacher_TW, with_stats)
        stats_NT6 = gather_shards(torch.cat([student_T3, teacher_T3], dim=1), group)
    student, student_entropy_T = norm_and_entropy(stats_NT6[:, :, :3])
    teacher, teacher_entropy_T = norm_and_entropy(stats_NT6[:, :, 3:])
    if not one_sweep:
        sums_T4 = sum_shards(kernels.kl_sums(student_TW, teacher_TW, student, teacher, clip, with_stats), group)
    loss_T, unclipped_mass_T, kl_T, shards_clipped_T = sums_T4.unbind(1)
    if unit_grad_TW is not None and not one_sweep:
        kernels.write_kl_gradient(student_TW, teacher_TW, student, teacher, unclipped_mass_T, clip, None, unit_grad_TW)
    clipped_mass_T = torch.where(kl_T == loss_T, 0.0, kl_T - loss_T)  # infinite alike without a clip
    stats_T5 = torch.stack(
        [kl_T, shards_clipped_T.clamp(max=1.0), clipped_mass_T, teacher_entropy_T, student_entropy_T], dim=1
    )
    return _Terms(student, teacher, unclipped_mass_T, loss_T, stats_T5)


def _empty_gradient(logits_TW: Tensor, width: int) -> Tensor:
    """To be written up to `width`; the padding behind it is zero already."""
    grad_TW = in_huge_pages(torch.empty_like(logits_TW))
    grad_TW[:, width:] = 0.0
    return grad_TW


class _LogitsClippedKL(torch.autograd.Function):
    """Keeps the logits and five numbers per token, and writes the gradient in the backward.

    Except where one sweep over cached rows yields loss and gradient for the same exponentials (whole rows on CPU):
    there the forward writes it, and the backward scales it in place and hands it out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_TW: Tensor,
        teacher_TW: Tensor,
        clip: float,
        group: dist.ProcessGroup | None,
        width: int,
        with_stats: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.in_forward = has_whole_rows(group) and row_kernels(student_TW) is row_kernels_torch
        unit_grad_TW = _empty_gradient(student_TW, width) if needs_grad and ctx.in_forward else None
        terms = _clipped_kl_terms(
            student_TW[:, :width],
            teacher_TW[:, :width],
            clip,
            group,
            with_stats,
            None if unit_grad_TW is None else unit_grad_TW[:, :width],
        )
        ctx.clip, ctx.width, ctx.unit_grad_TW = clip, width, unit_grad_TW
        ctx.save_for_backward(student_TW, teacher_TW, *terms.student, *terms.teacher, terms.unclipped_mass_T)
        ctx.mark_non_differentiable(terms.stats_T5)
        return terms.loss_T.clone(), terms.stats_T5

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_TW, teacher_TW, student_max_T, student_log_T, teacher_max_T, teacher_log_T, mass_T = ctx.saved_tensors
        if ctx.in_forward:
            grad_TW, ctx.unit_grad_TW = ctx.unit_grad_TW, None
            if grad_TW is None:  # a second backward of the same graph; the same kernel, for the same bits
                grad_TW = _empty_gradient(student_TW, ctx.width)
                row_kernels_torch.sweep_whole_rows(
                    student_TW[:, : ctx.width], teacher_TW[:, : ctx.width], ctx.clip, False, grad_TW[:, : ctx.width]
                )
            row_kernels_torch.scale_rows(grad_TW[:, : ctx.width], upstream_T)
            return grad_TW, None, None, None, None, None, None
        grad_TW = _empty_gradient(student_TW, ctx.width)
        row_kernels(student_TW).write_kl_gradient(
            student_TW[:, : ctx.width],
            teacher_TW[:, : ctx.width],
            RowNorm(student_max_T, student_log_T),
            RowNorm(teacher_max_T, teacher_log_T),
            mass_T,
            ctx.clip,
            upstream_T,
            grad_TW[:, : ctx.width],
        )
        return grad_TW, None, None, None, None, None, None


class _LinearClippedKL(torch.autograd.Function):
    """One chunk of both logits at a time; the student's gradient is written over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        teacher_TH: Tensor,
        weight_WH: Tensor,
        clip: float,
        layer: OutputLayer,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, dtype = student_TH.shape[0], compute_dtype(student_TH.dtype)
        loss_T = student_TH.new_empty(num_tokens, dtype=dtype)
        stats_T5 = student_TH.new_empty(num_tokens, 5, dtype=dtype)
        rows_5T = student_TH.new_empty(5, num_tokens, dtype=dtype)
        grad_hidden_TH = torch.empty_like(student_TH) if needs_hidden and not needs_weight else None
        student_buffer_CW, teacher_buffer_CW = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(num_tokens):
            student_CW = layer.logits(student_TH[rows], weight_WH, student_buffer_CW)
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, teacher_buffer_CW)
            unit_grad_CW = None if grad_hidden_TH is None else student_CW
            terms = _clipped_kl_terms(student_CW, teacher_CW, clip, layer.group, True, unit_grad_CW)
            loss_T[rows], stats_T5[rows] = terms.loss_T, terms.stats_T5
            rows_5T[:, rows] = torch.stack([*terms.student, *terms.teacher, terms.unclipped_mass_T])
            if grad_hidden_TH is not None:
                layer.write_hidden_gradient(student_CW, weight_WH, grad_hidden_TH[rows])
        ctx.clip, ctx.layer, ctx.needs_hidden, ctx.needs_weight = clip, layer, needs_hidden, needs_weight
        if needs_weight:
            ctx.save_for_backward(student_TH, teacher_TH, weight_WH, rows_5T)
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
        student_TH, teacher_TH, weight_WH, rows_5T = ctx.saved_tensors
        kernels = row_kernels(student_TH)
        gradients = LinearGradients(layer, student_TH, weight_WH, ctx.needs_hidden)
        student_buffer_CW, teacher_buffer_CW = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(student_TH.shape[0]):
            student_CW = layer.logits(student_TH[rows], weight_WH, student_buffer_CW)
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, teacher_buffer_CW)
            student_max_C, student_log_C, teacher_max_C, teacher_log_C, mass_C = rows_5T[:, rows].unbind(0)
            kernels.write_kl_gradient(
                student_CW,
                teacher_CW,
                RowNorm(student_max_C, student_log_C),
                RowNorm(teacher_max_C, teacher_log_C),
                mass_C,
                ctx.clip,
                upstream_T[rows],
                student_CW,
            )
            gradients.add(student_CW, rows)
        grad_hidden_TH, grad_weight_WH = gradients.finish()
        return grad_hidden_TH, None, grad_weight_WH, None, None, None, None
