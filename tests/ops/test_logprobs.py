"""Log-probabilities and entropy from hidden states, on one rank, against float64 autograd.

A failure here means wrong policy ratios in GRPO. T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_ssopd.ops.logprobs import linear_logprobs
from tests.ops import oracle

T, H, V, PADDED = 11, 24, 301, 310
TEMPERATURE = 1.1


def _inputs(dtype: torch.dtype = torch.float32, weight_scale: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TH = oracle.logits(T, H, seed=1, scale=1.0).to(dtype).requires_grad_()
    weight_VH = oracle.logits(PADDED, H, seed=2, scale=weight_scale).to(dtype)
    targets_T = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3))
    return hidden_TH, weight_VH, targets_T


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64_autograd(chunk_tokens: int, needs_weight: bool, dtype: torch.dtype) -> None:
    hidden_TH, weight_VH, targets_T = _inputs(dtype)
    weight_VH.requires_grad_(needs_weight)
    upstream_T = torch.linspace(-1.0, 2.0, T)
    logprobs_T, entropy_T = linear_logprobs(
        hidden_TH,
        weight_VH,
        targets_T,
        temperature=TEMPERATURE,
        group=None,
        chunk_tokens=chunk_tokens,
        vocab_size=V,
    )
    assert not entropy_T.requires_grad
    logprobs_T.backward(upstream_T)

    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH))
    logits_TV = hidden64 @ weight64[:V].t() / TEMPERATURE
    expected_T = logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
    expected_T.backward(upstream_T.double())
    error = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert oracle.relative_error(logprobs_T.detach(), expected_T.detach()) < error
    assert oracle.relative_error(entropy_T, oracle.entropy(logits_TV.detach())) < error
    assert oracle.relative_error(hidden_TH.grad, hidden64.grad) < error
    if needs_weight:
        assert oracle.relative_error(weight_VH.grad, weight64.grad) < error
        assert (weight_VH.grad[V:] == 0).all()
    else:
        assert weight_VH.grad is None


def test_hand_computed_example() -> None:
    hidden_TH = torch.tensor([[1.0, 0.0]])
    weight_VH = torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 5.0]])  # p = (1/4, 3/4)
    logprobs_T, entropy_T = linear_logprobs(
        hidden_TH, weight_VH, torch.tensor([1]), temperature=1.0, group=None, chunk_tokens=1
    )
    assert logprobs_T.item() == pytest.approx(-0.28768, abs=1e-5)
    assert entropy_T.item() == pytest.approx(0.56234, abs=1e-5)


def test_near_certain_targets_keep_a_gradient() -> None:
    """1 - p = 1e-5 must not vanish in the rounding of p to bfloat16."""
    hidden_TH = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.tensor([[11.5], [0.0]], dtype=torch.bfloat16)
    logprobs_T, _ = linear_logprobs(
        hidden_TH, weight_VH, torch.tensor([0]), temperature=1.0, group=None, chunk_tokens=1
    )
    logprobs_T.sum().backward()
    one_minus_p = 1 / (1 + torch.exp(torch.tensor(11.5)))
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.item() == pytest.approx(11.5 * one_minus_p.item(), rel=1e-2)


def test_gradcheck() -> None:
    hidden_TH, weight_VH, targets_T = (tensor[:3] for tensor in _inputs(torch.float64))
    hidden_TH = hidden_TH[:, :4].detach().requires_grad_()
    weight_VH = weight_VH[:, :4].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets_T % 3, temperature=1.3, group=None, chunk_tokens=2)[0],
        (hidden_TH, weight_VH),
    )


def test_a_target_that_no_shard_holds_is_impossible() -> None:
    hidden_TH, weight_VH, targets_T = _inputs()
    targets_T[0], targets_T[1] = V, -100
    logprobs_T, _ = linear_logprobs(
        hidden_TH, weight_VH, targets_T, temperature=1.0, group=None, chunk_tokens=4, vocab_size=V
    )
    assert (logprobs_T[:2] == -torch.inf).all() and logprobs_T[2:].isfinite().all()


def test_large_and_infinite_logits() -> None:
    hidden_TH, weight_VH, targets_T = _inputs(weight_scale=1e3)
    logprobs_T, entropy_T = linear_logprobs(
        hidden_TH, weight_VH, targets_T, temperature=1.0, group=None, chunk_tokens=4
    )
    logits_TV = (hidden_TH @ weight_VH.t()).detach().double()
    expected_T = logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
    assert oracle.relative_error(logprobs_T.detach(), expected_T) < 2e-5
    assert entropy_T.isfinite().all()


def test_no_tokens() -> None:
    hidden_TH = torch.empty(0, H, requires_grad=True)
    logprobs_T, entropy_T = linear_logprobs(
        hidden_TH, _inputs()[1], torch.empty(0, dtype=torch.int64), temperature=1.0, group=None, chunk_tokens=4
    )
    logprobs_T.sum().backward()
    assert logprobs_T.shape == entropy_T.shape == (0,)
    assert hidden_TH.grad is not None and hidden_TH.grad.shape == (0, H)
