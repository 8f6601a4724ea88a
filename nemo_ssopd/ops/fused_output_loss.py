"""A distillation loss per token with the output layer fused in: logits exist for one chunk of tokens at a time.

Where gradients are computed. The gradient of a token's loss in its hidden state is one row, so an upstream gradient
only scales that row: as long as the weight is frozen (LoRA), the row is made in the forward while the chunk's logits
are there, three matrix products in all, and the backward is a scaling and one all-reduce. The weight's gradient sums
over tokens with their upstream gradients, which the forward does not know: when it is asked for, the backward
recomputes both logits chunk by chunk (six products), with no collective but the last all-reduce.

T tokens, C tokens of one chunk, H hidden size, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_ssopd.ops.vocab_parallel import LinearGradients, OutputLayer, compute_dtype, scale_hidden_gradient


class LogitsLoss(Protocol):
    """A loss between the rows of two shards of logits, and its gradient in the student's."""

    num_saved: ClassVar[int]
    """Numbers per token that the gradient needs in addition to the logits."""

    def evaluate(self, student_CW: Tensor, teacher_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss [C], statistics [C, 5] and what to save [C, num_saved], the same on every rank."""
        ...

    def write_gradient(
        self, student_CW: Tensor, teacher_CW: Tensor, saved: Tensor, upstream_C: Tensor | None, out_CW: Tensor
    ) -> None:
        """Write the gradient in the student's logits. `out_CW` may be `student_CW`. Without a collective.

        No upstream gradient counts as 1.
        """
        ...


def linear_distillation(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, logits_loss: LogitsLoss, layer: OutputLayer
) -> tuple[Tensor, Tensor]:
    """Return loss [T] and statistics [T, 5] of `softmax(hidden W^T / temperature)` of student and teacher.

    The gradient of the student's hidden states comes back summed over the group; the weight's is this shard's own, of
    the student side alone, and computed only if the weight requires it.
    """
    loss_T, stats_T5 = _LinearDistillation.apply(
        student_hidden,
        teacher_hidden.detach(),
        weight,
        logits_loss,
        layer,
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return loss_T, stats_T5


class _LinearDistillation(torch.autograd.Function):
    """The loss with the output layer. It writes the student's gradient over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        teacher_TH: Tensor,
        weight_WH: Tensor,
        logits_loss: LogitsLoss,
        layer: OutputLayer,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, dtype = student_TH.shape[0], compute_dtype(student_TH.dtype)
        loss_T = student_TH.new_empty(num_tokens, dtype=dtype)
        stats_T5 = student_TH.new_empty(num_tokens, 5, dtype=dtype)
        saved = student_TH.new_empty(num_tokens, logits_loss.num_saved, dtype=torch.float64)
        grad_hidden_TH = torch.empty_like(student_TH) if needs_hidden and not needs_weight else None
        student_buffer_CW, teacher_buffer_CW = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(num_tokens):
            student_CW = layer.logits(student_TH[rows], weight_WH, student_buffer_CW)
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, teacher_buffer_CW)
            loss_T[rows], stats_T5[rows], saved[rows] = logits_loss.evaluate(student_CW, teacher_CW)
            if grad_hidden_TH is not None:
                logits_loss.write_gradient(student_CW, teacher_CW, saved[rows], None, student_CW)
                layer.write_hidden_gradient(student_CW, weight_WH, grad_hidden_TH[rows])
        ctx.logits_loss, ctx.layer, ctx.needs_hidden, ctx.needs_weight = logits_loss, layer, needs_hidden, needs_weight
        if needs_weight:
            ctx.save_for_backward(student_TH, teacher_TH, weight_WH, saved)
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
        student_TH, teacher_TH, weight_WH, saved = ctx.saved_tensors
        gradients = LinearGradients(layer, student_TH, weight_WH, ctx.needs_hidden)
        student_buffer_CW, teacher_buffer_CW = layer.buffer(student_TH), layer.buffer(student_TH)
        for rows in layer.chunks(student_TH.shape[0]):
            student_CW = layer.logits(student_TH[rows], weight_WH, student_buffer_CW)
            teacher_CW = layer.logits(teacher_TH[rows], weight_WH, teacher_buffer_CW)
            ctx.logits_loss.write_gradient(student_CW, teacher_CW, saved[rows], upstream_T[rows], student_CW)
            gradients.add(student_CW, rows)
        grad_hidden_TH, grad_weight_WH = gradients.finish()
        return grad_hidden_TH, None, grad_weight_WH, None, None, None, None
