"""What the operations are compared with: float64, the whole vocabulary on one rank, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_ssopd.algo.reference import clipped_forward_kl


def logits(num_tokens: int, width: int, *, seed: int, scale: float = 3.0, inf_share: float = 0.0) -> Tensor:
    """Random logits; a share of them -inf, but never all of a row."""
    generator = torch.Generator().manual_seed(seed)
    values_TV = torch.randn(num_tokens, width, generator=generator) * scale
    masked_TV = torch.rand(num_tokens, width, generator=generator) < inf_share
    if width > 0:
        masked_TV[:, seed % width] = False
    return values_TV.masked_fill(masked_TV, -torch.inf)


def clipped_kl(student: Tensor, teacher: Tensor, clip: float, upstream_T: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of `upstream . loss` in the student's logits."""
    student = student.detach().double().requires_grad_()
    loss_T = clipped_forward_kl(student, teacher.double(), clip=clip)
    (grad,) = torch.autograd.grad(loss_T, student, upstream_T.double())
    return loss_T.detach(), grad


def entropy(logits_TV: Tensor) -> Tensor:
    p_TV = logits_TV.double().softmax(dim=-1)
    return torch.special.entr(p_TV).sum(dim=-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, by its norm. Two equal infinities agree; a NaN or another infinity is an infinite error."""
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isfinite(), expected.isfinite()) or actual.isnan().any() or expected.isnan().any():
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    distance = (actual[finite] - expected[finite]).norm()
    return float(distance / expected[finite].norm().clamp(min=1e-2))
