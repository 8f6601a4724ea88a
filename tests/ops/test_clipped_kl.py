"""The clipped KL on one rank: against float64 autograd, at the edges of its domain, and as a citizen of autograd.

A failure here means that training minimises something else than the loss of the method, or poisons it with a NaN.
T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_ssopd.algo.reference import clipped_forward_kl
from nemo_ssopd.ops.clipped_kl import (
    linear_clipped_kl,
    linear_clipped_kl_with_stats,
    vocab_parallel_clipped_kl,
    vocab_parallel_clipped_kl_with_stats,
)
from tests.ops import oracle

CLIP = 0.05
INF = float("inf")


def _run(student: Tensor, teacher: Tensor, upstream_T: Tensor, **settings: float | None) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss_T = vocab_parallel_clipped_kl(student, teacher, group=None, **{"clip": CLIP, **settings})
    (grad,) = torch.autograd.grad(loss_T, student, upstream_T)
    return loss_T.detach(), grad


def _upstream(num_tokens: int) -> Tensor:
    """Not uniform, with a zero and negative entries."""
    return torch.linspace(-1.0, 2.0, num_tokens) * (torch.arange(num_tokens) != 1)


def test_hand_computed_example() -> None:
    student = torch.tensor([[0.9, 0.1]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5]]).log()
    loss_T, stats = vocab_parallel_clipped_kl_with_stats(student, teacher, clip=CLIP, group=None)
    below, above = 0.5 * math.log(0.5 / 0.9), 0.5 * math.log(0.5 / 0.1)
    assert loss_T.item() == pytest.approx(below + CLIP, abs=1e-6)
    assert clipped_forward_kl(student, teacher, clip=CLIP).item() == pytest.approx(below + CLIP, abs=1e-6)
    assert stats.kl_T.item() == pytest.approx(below + above, abs=1e-6)
    assert stats.was_clipped_T.item() == 1.0
    assert stats.clipped_mass_T.item() == pytest.approx(above - CLIP, abs=1e-6)
    assert stats.teacher_entropy_T.item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats.student_entropy_T.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-6)
    # U = {0}: P_U = 0.5, so the gradient is 0.5 * (0.9, 0.1) - (0.5, 0).
    loss_T.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[-0.05, 0.05]]))


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (5, 2), (7, 401), (3, 50021), (9, 40000)])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 2e-5, 2e-5),
        (torch.float16, 2e-5, 1e-3),
        (torch.bfloat16, 2e-5, 5e-3),
    ],
)
def test_matches_float64_autograd(
    num_tokens: int, width: int, dtype: torch.dtype, loss_error: float, grad_error: float
) -> None:
    """The loss is computed in fp32 from logits of any dtype; the gradient has that dtype."""
    student, teacher = (oracle.logits(num_tokens, width, seed=seed).to(dtype) for seed in (1, 2))
    upstream_T = _upstream(num_tokens).to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss_T, grad = _run(student, teacher, upstream_T)
    expected_T, expected_grad = oracle.clipped_kl(student, teacher, CLIP, upstream_T)
    assert grad.dtype == dtype
    assert oracle.relative_error(loss_T, expected_T) < loss_error
    assert oracle.relative_error(grad, expected_grad) < grad_error


@given(
    num_tokens=st.integers(0, 9),
    width=st.integers(1, 90),
    clip=st.sampled_from([0.0, 1e-3, 0.05, 1.0, INF]),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    inf_share=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_shape_and_scale(
    num_tokens: int, width: int, clip: float, scale: float, inf_share: float, seed: int
) -> None:
    student = oracle.logits(num_tokens, width, seed=seed, scale=scale, inf_share=inf_share)
    teacher = oracle.logits(num_tokens, width, seed=seed + 1, scale=scale, inf_share=inf_share if scale <= 1 else 0.0)
    if (
        scale > 1
    ):  # a teacher's probability of 1e-40 is 0 in fp32; times an infinite log-ratio the difference would show
        teacher = teacher.masked_fill(student.isinf(), -INF)
    upstream_T = _upstream(num_tokens)
    loss_T, grad = _run(student, teacher, upstream_T, clip=clip)
    expected_T, expected_grad = oracle.clipped_kl(student, teacher, clip, upstream_T)
    assert oracle.relative_error(loss_T, expected_T) < 2e-5
    if expected_grad.isfinite().all():  # autograd's own is NaN where the student gives -inf to what the teacher knows
        assert oracle.relative_error(grad, expected_grad) < 2e-5
    assert grad.isfinite().all()


def test_large_logits_keep_their_precision() -> None:
    """Two terms of a log-softmax near 1e4: their fp32 sum would be off by 5e-4."""
    student, teacher = (oracle.logits(6, 1000, seed=seed) + 1e4 for seed in (3, 4))
    loss_T, grad = _run(student, teacher, torch.ones(6))
    expected_T, expected_grad = oracle.clipped_kl(student, teacher, CLIP, torch.ones(6))
    assert oracle.relative_error(loss_T, expected_T) < 2e-5
    assert oracle.relative_error(grad, expected_grad) < 2e-5


def test_a_column_that_the_student_excludes() -> None:
    """Its summand is infinite: cut to the clip, or an infinite loss without a clip; never a NaN."""
    student = torch.tensor([[0.0, -INF, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, -INF]])
    loss_T, grad = _run(student, teacher, torch.ones(1))
    assert loss_T.item() == pytest.approx(2 * 0.0 + CLIP, abs=1e-6)  # p_T = p_S = 1/2 in column 0
    # U = {0, 2}: P_U = 1/2, p_S = (1/2, 0, 1/2).
    torch.testing.assert_close(grad, torch.tensor([[0.25 - 0.5, 0.0, 0.25]]))
    loss_T, grad = _run(student, teacher, torch.ones(1), clip=INF)
    assert loss_T.item() == INF
    torch.testing.assert_close(grad, torch.tensor([[0.0, -0.5, 0.5]]))  # p_S - p_T, which pulls the column up again


def test_a_row_without_mass_is_nan_as_softmax_makes_it() -> None:
    student = torch.tensor([[-INF, -INF], [0.0, 1.0]])
    teacher = torch.zeros(2, 2)
    loss_T, _ = _run(student, teacher, torch.ones(2))
    assert loss_T[0].isnan() and loss_T[1].isfinite()


def test_infinite_clip_is_plain_kl() -> None:
    student, teacher = oracle.logits(6, 300, seed=5), oracle.logits(6, 300, seed=6)
    loss_T, _ = _run(student, teacher, torch.ones(6), clip=INF)
    expected_T = torch.nn.functional.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert oracle.relative_error(loss_T, expected_T) < 2e-5


@pytest.mark.parametrize("garbage", [0.0, 50.0, INF, float("nan")])
def test_padding_takes_no_mass_and_gets_no_gradient(garbage: float) -> None:
    student, teacher = oracle.logits(4, 60, seed=7), oracle.logits(4, 60, seed=8)
    student[:, 50:] = teacher[:, 50:] = garbage
    loss_T, grad = _run(student, teacher, _upstream(4), vocab_size=50)
    expected_T, expected_grad = _run(student[:, :50], teacher[:, :50], _upstream(4))
    torch.testing.assert_close(loss_T, expected_T)
    torch.testing.assert_close(grad[:, :50], expected_grad)
    assert (grad[:, 50:] == 0).all()


def test_statistics_match_their_definitions() -> None:
    student, teacher = oracle.logits(64, 500, seed=9, scale=1.0), oracle.logits(64, 500, seed=10, scale=1.0)
    student[:40] = teacher[:40]  # rows without a clipped entry
    loss_T, stats = vocab_parallel_clipped_kl_with_stats(student, teacher, clip=0.02, group=None)
    teacher_p = teacher.double().softmax(-1)
    summands = teacher_p * (teacher.double().log_softmax(-1) - student.double().log_softmax(-1))
    assert oracle.relative_error(stats.kl_T, summands.sum(-1)) < 2e-5
    assert oracle.relative_error(stats.clipped_mass_T, (summands - 0.02).clamp(min=0).sum(-1)) < 1e-4
    assert torch.equal(stats.was_clipped_T == 1, (summands >= 0.02).any(-1))
    assert 0 < stats.was_clipped_T.sum() <= 24
    assert oracle.relative_error(stats.teacher_entropy_T, oracle.entropy(teacher)) < 2e-5
    assert oracle.relative_error(stats.student_entropy_T, oracle.entropy(student)) < 2e-5
    torch.testing.assert_close(stats.kl_T - stats.clipped_mass_T, loss_T)


def test_gradcheck() -> None:
    """Numerical differentiation, which shares no formula with the backward. No summand is near the clip here."""
    student = oracle.logits(3, 7, seed=11, scale=1.0).double().requires_grad_()
    teacher = oracle.logits(3, 7, seed=12, scale=1.0).double()
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_clipped_kl(z, teacher, clip=CLIP, group=None), student)
    # The weight is left out: moving it moves the teacher too, to which the gradient is not meant to flow.
    hidden, teacher_hidden = student[:, :4].detach().requires_grad_(), teacher[:, :4]
    weight = oracle.logits(9, 4, seed=13, scale=1.0).double()
    assert torch.autograd.gradcheck(
        lambda h: linear_clipped_kl(
            h, teacher_hidden, weight, clip=CLIP, temperature=1.3, group=None, chunk_tokens=2, vocab_size=8
        ),
        hidden,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_form(chunk_tokens: int, needs_weight: bool, dtype: torch.dtype) -> None:
    num_tokens, hidden_size, width, vocab_size, temperature = 11, 24, 310, 301, 1.3
    hidden = oracle.logits(num_tokens, hidden_size, seed=14, scale=1.0).to(dtype).requires_grad_()
    teacher_hidden = oracle.logits(num_tokens, hidden_size, seed=15, scale=1.0).to(dtype)
    weight = oracle.logits(width, hidden_size, seed=16, scale=0.7).to(dtype).requires_grad_(needs_weight)
    loss_T, stats = linear_clipped_kl_with_stats(
        hidden,
        teacher_hidden,
        weight,
        clip=CLIP,
        temperature=temperature,
        group=None,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )
    loss_T.backward(_upstream(num_tokens))

    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    student = hidden64 @ weight64[:vocab_size].t() / temperature
    teacher = (teacher_hidden.double() @ weight64[:vocab_size].t() / temperature).detach()
    expected_T = clipped_forward_kl(student, teacher, clip=CLIP)
    expected_T.backward(_upstream(num_tokens).double())
    # Logits in half precision: three digits in bfloat16, four in float16, and summands near the clip.
    error = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert oracle.relative_error(loss_T.detach(), expected_T.detach()) < error
    assert oracle.relative_error(hidden.grad, hidden64.grad) < error
    assert oracle.relative_error(stats.student_entropy_T, oracle.entropy(student.detach())) < error
    assert oracle.relative_error(stats.teacher_entropy_T, oracle.entropy(teacher)) < error
    if needs_weight:
        assert oracle.relative_error(weight.grad, weight64.grad) < error
        assert (weight.grad[vocab_size:] == 0).all()
    else:
        assert weight.grad is None


def test_no_tokens() -> None:
    loss_T, grad = _run(torch.empty(0, 9), torch.empty(0, 9), torch.empty(0))
    assert loss_T.shape == (0,) and grad.shape == (0, 9)
    for needs_weight in (False, True):
        hidden = torch.empty(0, 4, requires_grad=True)
        weight = torch.ones(9, 4, requires_grad=needs_weight)
        loss_T = linear_clipped_kl(
            hidden, hidden.detach(), weight, clip=CLIP, temperature=1.0, group=None, chunk_tokens=8
        )
        loss_T.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, 4)
        assert not needs_weight or (weight.grad == 0).all()


def test_inputs_stay_and_the_teacher_gets_no_gradient() -> None:
    student = oracle.logits(5, 80, seed=17).requires_grad_()
    teacher = oracle.logits(5, 80, seed=18).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None).sum().backward()
    assert teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_a_graph_can_be_walked_twice() -> None:
    """The forward's gradient is handed out in place once; the second time it is computed anew."""
    student = oracle.logits(5, 80, seed=19).requires_grad_()
    loss_T = vocab_parallel_clipped_kl(student, oracle.logits(5, 80, seed=20), clip=CLIP, group=None)
    (first,) = torch.autograd.grad(loss_T, student, _upstream(5), retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss_T, student, _upstream(5))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_bits_on_every_run(num_threads: int) -> None:
    """Large enough for the rows to be dealt out to threads; also leaves torch's number of threads as it was."""
    student, teacher = oracle.logits(13, 40000, seed=21), oracle.logits(13, 40000, seed=22)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        first, second = (_run(student, teacher, _upstream(13)) for _ in range(2))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    student, teacher = oracle.logits(13, 40000, seed=23), oracle.logits(13, 40000, seed=24)
    loss_T, grad = _run(student, teacher, torch.ones(13))
    for row in (0, 6, 12):
        alone_T, alone_grad = _run(student[row : row + 1], teacher[row : row + 1], torch.ones(1))
        torch.testing.assert_close(loss_T[row : row + 1], alone_T, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad[row : row + 1], alone_grad, rtol=1e-5, atol=1e-9)


def test_logits_with_strides() -> None:
    student, teacher = oracle.logits(70, 6, seed=25).t(), oracle.logits(70, 12, seed=26)[:, ::2].t()
    loss_T, grad = _run(student, teacher, _upstream(6))
    expected_T, expected_grad = _run(student.contiguous(), teacher.contiguous(), _upstream(6))
    torch.testing.assert_close(loss_T, expected_T)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), {}, "alike"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16), {}, "alike"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), {}, "two dimensions"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"clip": -0.1}, "clip must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"clip": float("nan")}, "clip must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"vocab_size": 4}, "only 3 columns"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"vocab_size": 0}, "at least 1"),
    ],
)
def test_what_a_caller_gets_wrong(student: Tensor, teacher: Tensor, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_clipped_kl(student, teacher, group=None, **{"clip": CLIP, **settings})


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        (torch.zeros(5, 3), {}, "flatten"),
        (torch.zeros(5, 4, dtype=torch.float64), {}, "cast one"),
        (torch.zeros(5, 4), {"temperature": 0.0}, "temperature"),
        (torch.zeros(5, 4), {"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_what_a_caller_of_the_fused_form_gets_wrong(weight: Tensor, settings: dict, message: str) -> None:
    hidden = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        linear_clipped_kl(
            hidden, hidden, weight, clip=CLIP, group=None, **{"temperature": 1.0, "chunk_tokens": 8, **settings}
        )
