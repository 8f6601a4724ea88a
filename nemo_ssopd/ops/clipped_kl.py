"""Pointwise-clipped forward KL over a vocabulary sharded over ranks (paper, eqs. 3 and 6).

    loss_t = sum_v min(p_T(v) * (log p_T(v) - log p_S(v)), clip)           teacher p_T, student p_S, in nats
    d loss_t / d z_S(v) = P_U * p_S(v) - p_T(v) * [v in U],                U = {v : summand below clip}, P_U = p_T(U)

Exact over the whole vocabulary. Two collectives of a few numbers per token (the log-sum-exp of both models, then loss
and P_U), whatever the vocabulary. The teacher gets no gradient. `docs/clipped_kl.md` derives the gradient.

T tokens, C tokens of one chunk, H hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_ssopd.ops.fused_output_loss import linear_distillation
from nemo_ssopd.ops.vocab_parallel import (
    RowNorm,
    compute_dtype,
    gather_shards,
    has_whole_rows,
    in_huge_pages,
    norm_and_entropy,
    output_layer,
    row_kernels,
    shard_columns,
    sum_shards,
)


@dataclass(frozen=True)
class DivergenceStats:
    """Statistics to log in addition to the loss, per token, without gradient, in nats.

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
    """Return the clipped KL of each token, [T], in nats, not reduced; float32 (float64 for float64 logits).

    Logits are this rank's columns, [T, V/tp]; ranks hold consecutive ranges of the vocabulary. Columns from
    `vocab_size` on are padding: they take no mass and get no gradient. The student's gradient has the dtype of its
    logits. The inputs are not changed, and both must stay unchanged until the backward.
    """
    return _logits_clipped_kl(student_logits, teacher_logits, clip, group, vocab_size)[0]


def vocab_parallel_clipped_kl_with_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    clip: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """Return `vocab_parallel_clipped_kl` and its statistics, from the same passes."""
    return _logits_clipped_kl(student_logits, teacher_logits, clip, group, vocab_size)


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
    """Return the clipped KL of each token, [T], between `softmax(hidden W^T / temperature)` of student and teacher.

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
) -> tuple[Tensor, DivergenceStats]:
    """Return `linear_clipped_kl` and its statistics, from the same passes."""
    _check_pair(student_hidden, teacher_hidden, clip)
    layer = output_layer(
        student_hidden,
        weight,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )
    loss_T, stats_T5 = linear_distillation(student_hidden, teacher_hidden, weight, _ClippedKL(clip, group), layer)
    return loss_T, DivergenceStats(*stats_T5.unbind(1))


def _logits_clipped_kl(
    student_TW: Tensor,
    teacher_TW: Tensor,
    clip: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
) -> tuple[Tensor, DivergenceStats]:
    _check_pair(student_TW, teacher_TW, clip)
    width = student_TW.shape[1]
    if vocab_size is not None:
        shard = shard_columns(width, vocab_size, group, student_TW.device)
        width = shard.stop - shard.start
    loss_T, stats_T5 = _LogitsClippedKL.apply(student_TW, teacher_TW.detach(), _ClippedKL(clip, group), width)
    return loss_T, DivergenceStats(*stats_T5.unbind(1))


def _check_pair(student: Tensor, teacher: Tensor, clip: float) -> None:
    if student.dim() != 2 or student.shape != teacher.shape or student.dtype != teacher.dtype:
        raise ValueError(
            f"student and teacher must be alike and have two dimensions, got {tuple(student.shape)} {student.dtype} "
            f"and {tuple(teacher.shape)} {teacher.dtype}; flatten sequence and batch, cast the teacher"
        )
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, got {clip}; infinity disables clipping")


@dataclass(frozen=True)
class _ClippedKL:
    """The clipped KL as a `LogitsLoss`."""

    clip: float
    group: dist.ProcessGroup | None
    num_saved: ClassVar[int] = 5  # log-sum-exp of student and teacher, each as two numbers, and P_U

    def evaluate(self, student_CW: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate with two collectives: a gather of the row statistics of both models, then a sum of loss and P_U."""
        kernels = row_kernels(student_CW)
        on_one_rank = student_CW.device.type == "cpu" and has_whole_rows(self.group)
        if on_one_rank:
            stats_C6, sums_C4 = kernels.statistics_and_sums(student_CW, teacher_CW, self.clip)
        else:
            stats_C6 = torch.cat([kernels.row_statistics(student_CW), kernels.row_statistics(teacher_CW)], dim=1)
        stats_NC6 = gather_shards(stats_C6, self.group)
        student, student_entropy_C = norm_and_entropy(stats_NC6[:, :, :3])
        teacher, teacher_entropy_C = norm_and_entropy(stats_NC6[:, :, 3:])
        if not on_one_rank:
            sums_C4 = sum_shards(kernels.kl_sums(student_CW, teacher_CW, student, teacher, self.clip), self.group)
        loss_C, unclipped_mass_C, kl_C, shards_clipped_C = sums_C4.unbind(1)
        clipped_mass_C = torch.where(kl_C == loss_C, 0.0, kl_C - loss_C)  # without a clip, both may be infinite
        stats = [kl_C, shards_clipped_C.clamp(max=1.0), clipped_mass_C, teacher_entropy_C, student_entropy_C]
        saved = [*student, *teacher, unclipped_mass_C]
        return loss_C, torch.stack(stats, dim=1), torch.stack(saved, dim=1)

    def write_gradient(
        self, student_CW: Tensor, teacher_CW: Tensor, saved: Tensor, upstream_C: Tensor | None, out_CW: Tensor
    ) -> None:
        student_max_C, student_log_C, teacher_max_C, teacher_log_C, mass_C = saved.unbind(1)
        row_kernels(student_CW).write_kl_gradient(
            student_CW,
            teacher_CW,
            RowNorm(student_max_C, student_log_C),
            RowNorm(teacher_max_C, teacher_log_C),
            mass_C.to(compute_dtype(student_CW.dtype)),
            self.clip,
            upstream_C,
            out_CW,
        )


class _LogitsClippedKL(torch.autograd.Function):
    """The clipped KL of logits. It keeps them and five numbers per token, and writes the gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any, student_TW: Tensor, teacher_TW: Tensor, logits_loss: _ClippedKL, width: int
    ) -> tuple[Tensor, Tensor]:
        loss_T, stats_T5, saved_T5 = logits_loss.evaluate(student_TW[:, :width], teacher_TW[:, :width])
        ctx.logits_loss, ctx.width = logits_loss, width
        ctx.save_for_backward(student_TW, teacher_TW, saved_T5)
        ctx.mark_non_differentiable(stats_T5)
        return loss_T.clone(), stats_T5

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_TW, teacher_TW, saved_T5 = ctx.saved_tensors
        grad_TW = in_huge_pages(torch.empty_like(student_TW, memory_format=torch.contiguous_format))
        grad_TW[:, ctx.width :] = 0.0  # padding
        ctx.logits_loss.write_gradient(
            student_TW[:, : ctx.width], teacher_TW[:, : ctx.width], saved_T5, upstream_T, grad_TW[:, : ctx.width]
        )
        return grad_TW, None, None, None
