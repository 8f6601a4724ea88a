"""Log-probabilities and entropy under a vocabulary sharded over ranks, from hidden states, in token chunks.

GRPO's three passes use it, so that the logits of a batch never exist at once. T tokens, H hidden size, W columns of the
vocabulary on this rank, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_ssopd.ops.vocab_parallel import (
    LN_2,
    LinearGradients,
    OutputLayer,
    RowNorm,
    compute_dtype,
    gather_shards,
    log2_p,
    norm_and_entropy,
    output_layer,
    row_kernels,
    scale_hidden_gradient,
)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `log p(token)` and the entropy of `p = softmax(hidden W^T / temperature)`, both [T], nats, float32.

    Hidden states are [T, H], the weight this rank's [V/tp, H]. Token ids [T] are global; one that no shard
    holds has log-probability -inf. The log-probabilities are differentiable in the hidden states (that gradient comes
    back summed over `group`) and in the weight (that gradient is this shard's own); the entropy is not. Columns from
    `vocab_size` on are padding and take no mass.
    """
    layer = output_layer(
        hidden,
        weight,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )
    logprobs_T, entropy_T = _LinearLogprobs.apply(
        hidden,
        weight,
        token_ids - layer.shard.start,
        layer,
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return logprobs_T, entropy_T


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs, with the gradient d log p(token) / d logit_v = [v == token] - p(v).

    `fused_output_loss` says where the gradient is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_WH: Tensor,
        token_ids_T: Tensor,
        layer: OutputLayer,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        kernels = row_kernels(hidden_TH)
        num_tokens = hidden_TH.shape[0]
        logprobs_T, entropy_T = hidden_TH.new_empty(2, num_tokens, dtype=compute_dtype(hidden_TH.dtype)).unbind(0)
        max_T, log_sum_T = hidden_TH.new_empty(2, num_tokens, dtype=torch.float64).unbind(0)
        grad_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden and not needs_weight else None
        buffer_CW = layer.buffer(hidden_TH)
        for rows in layer.chunks(num_tokens):
            logits_CW = layer.logits(hidden_TH[rows], weight_WH, buffer_CW)
            stats_C4 = torch.cat([kernels.row_statistics(logits_CW), _logits_of(token_ids_T[rows], logits_CW)], dim=1)
            stats_NC4 = gather_shards(stats_C4, layer.group)
            norm, entropy_T[rows] = norm_and_entropy(stats_NC4[:, :, :3])
            max_T[rows], log_sum_T[rows] = norm
            logprobs_T[rows] = log2_p(stats_NC4[:, :, 3].amax(dim=0), norm) * LN_2
            if grad_hidden_TH is not None:
                kernels.write_logprob_gradient(logits_CW, norm, token_ids_T[rows], None, logits_CW)
                layer.write_hidden_gradient(logits_CW, weight_WH, grad_hidden_TH[rows])
        ctx.layer, ctx.needs_hidden, ctx.needs_weight = layer, needs_hidden, needs_weight
        if needs_weight:
            ctx.save_for_backward(hidden_TH, weight_WH, token_ids_T, max_T, log_sum_T)
        elif needs_hidden:
            ctx.save_for_backward(grad_hidden_TH)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_weight:
            (unit_grad_TH,) = ctx.saved_tensors
            return scale_hidden_gradient(unit_grad_TH, upstream_T, ctx.layer), None, None, None, None, None
        hidden_TH, weight_WH, token_ids_T, max_T, log_sum_T = ctx.saved_tensors
        kernels = row_kernels(hidden_TH)
        gradients = LinearGradients(ctx.layer, hidden_TH, weight_WH, ctx.needs_hidden)
        buffer_CW = ctx.layer.buffer(hidden_TH)
        for rows in ctx.layer.chunks(hidden_TH.shape[0]):
            logits_CW = ctx.layer.logits(hidden_TH[rows], weight_WH, buffer_CW)
            norm = RowNorm(max_T[rows], log_sum_T[rows])
            kernels.write_logprob_gradient(logits_CW, norm, token_ids_T[rows], upstream_T[rows], logits_CW)
            gradients.add(logits_CW, rows)
        return *gradients.finish(), None, None, None, None


def _logits_of(token_ids_C: Tensor, logits_CW: Tensor) -> Tensor:
    """Return the logits of the token ids, [C, 1]; -inf where another shard holds them, so that a maximum finds them."""
    missing_C1 = logits_CW.new_full((logits_CW.shape[0], 1), -torch.inf, dtype=compute_dtype(logits_CW.dtype))
    if logits_CW.shape[1] == 0:
        return missing_C1
    owned_C = (token_ids_C >= 0) & (token_ids_C < logits_CW.shape[1])
    found_C1 = logits_CW.gather(1, token_ids_C.clamp(0, logits_CW.shape[1] - 1).unsqueeze(1))
    return torch.where(owned_C.unsqueeze(1), found_C1.to(missing_C1.dtype), missing_C1)
