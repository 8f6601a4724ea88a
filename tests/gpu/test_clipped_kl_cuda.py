"""The Triton kernels on a GPU, through the public functions, against float64 on the same device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_report.kernels import SHAPES, errors
from nemo_ssopd.algo.reference import clipped_forward_kl
from nemo_ssopd.ops.clipped_kl import linear_clipped_kl_with_stats, vocab_parallel_clipped_kl
from nemo_ssopd.ops.logprobs import linear_logprobs
from tests.ops import oracle

CLIP = 0.05
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (7, 401), (33, 151936), (5, 50021)])
@pytest.mark.parametrize("inf_share", [0.0, 0.2])
def test_logits_form(dtype: torch.dtype, num_tokens: int, width: int, inf_share: float) -> None:
    student, teacher = (
        oracle.logits(num_tokens, width, seed=seed, inf_share=inf_share).to("cuda", dtype) for seed in (1, 2)
    )
    student[teacher > -torch.inf] = student[teacher > -torch.inf].clamp(min=-20)  # autograd's gradient stays finite
    upstream_T = torch.linspace(-1.0, 2.0, num_tokens, device="cuda")
    expected_T, expected_grad = oracle.clipped_kl(student, teacher, CLIP, upstream_T)
    student.requires_grad_()
    results = []
    for _ in range(2):
        loss_T = vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None)
        (grad,) = torch.autograd.grad(loss_T, student, upstream_T)
        results.append((loss_T.detach(), grad))
    assert oracle.relative_error(results[0][0], expected_T) < 2e-5
    assert oracle.relative_error(results[0][1], expected_grad) < TOLERANCE[dtype]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "width"), SHAPES["cuda"])
def test_each_kernel_on_rows_that_do_not_touch(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    wrong = {name: pair for name, pair in errors(num_tokens, width, dtype, "cuda").items() if not pair[0] < pair[1]}
    assert not wrong


def test_large_logits_keep_their_precision() -> None:
    student, teacher = (oracle.logits(6, 1000, seed=seed).cuda() + 1e4 for seed in (3, 4))
    expected_T, _ = oracle.clipped_kl(student, teacher, CLIP, torch.ones(6, device="cuda"))
    loss_T = vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None)
    assert oracle.relative_error(loss_T, expected_T) < 2e-5


@pytest.mark.parametrize("needs_weight", [False, True])
def test_fused_forms(needs_weight: bool) -> None:
    num_tokens, hidden_size, width, vocab_size, temperature = 37, 64, 5008, 5003, 1.1
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden = oracle.logits(num_tokens, hidden_size, seed=5, scale=1.0).cuda().requires_grad_()
    teacher_hidden = oracle.logits(num_tokens, hidden_size, seed=6, scale=1.0).cuda()
    weight = oracle.logits(width, hidden_size, seed=7, scale=0.4).cuda().requires_grad_(needs_weight)
    targets_T = torch.arange(num_tokens, device="cuda") * 100 % vocab_size
    upstream_T = torch.linspace(-1.0, 2.0, num_tokens, device="cuda")
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    student = hidden64 @ weight64[:vocab_size].t() / temperature
    teacher = (teacher_hidden.double() @ weight64[:vocab_size].t() / temperature).detach()
    loss64_T = clipped_forward_kl(student, teacher, clip=CLIP)
    logprobs64_T = student.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
    settings = {"temperature": temperature, "group": None, "chunk_tokens": 16, "vocab_size": vocab_size}

    loss_T, stats = linear_clipped_kl_with_stats(hidden, teacher_hidden, weight, clip=CLIP, **settings)
    logprobs_T, entropy_T = linear_logprobs(hidden, weight, targets_T, **settings)
    torch.testing.assert_close(entropy_T, stats.student_entropy_T)
    for value_T, value64_T in ((loss_T, loss64_T), (logprobs_T, logprobs64_T)):
        assert oracle.relative_error(value_T.detach(), value64_T.detach()) < 2e-5
        wanted = (hidden, weight) if needs_weight else (hidden,)
        grads = torch.autograd.grad(value_T, wanted, upstream_T)
        grads64 = torch.autograd.grad(value64_T, (hidden64, weight64), upstream_T.double(), retain_graph=True)
        for grad, grad64 in zip(grads, grads64, strict=False):
            assert oracle.relative_error(grad, grad64) < 2e-5


@pytest.mark.parametrize("width", [151936, 50021])
def test_fused_forms_in_bfloat16(width: int) -> None:
    """Logits are rounded to bfloat16, to 2^-9 of up to 12: nothing beyond that may be lost."""
    num_tokens, hidden_size, temperature = 37, 64, 1.1
    hidden, teacher_hidden = (oracle.logits(num_tokens, hidden_size, seed=seed, scale=1.0) for seed in (5, 6))
    weight = oracle.logits(width, hidden_size, seed=7, scale=0.4)
    hidden, teacher_hidden, weight = (x.to("cuda", torch.bfloat16) for x in (hidden, teacher_hidden, weight))
    targets_T = torch.arange(num_tokens, device="cuda") * 1009 % width
    hidden64 = hidden.double().requires_grad_()
    logits64 = hidden64 @ weight.double().t() / temperature
    teacher64 = teacher_hidden.double() @ weight.double().t() / temperature
    loss64_T = clipped_forward_kl(logits64, teacher64, clip=CLIP)
    logprobs64_T = logits64.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
    hidden.requires_grad_()
    settings = {"temperature": temperature, "group": None, "chunk_tokens": 16}

    loss_T, _ = linear_clipped_kl_with_stats(hidden, teacher_hidden, weight, clip=CLIP, **settings)
    logprobs_T, _ = linear_logprobs(hidden, weight, targets_T, **settings)
    for value_T, value64_T in ((loss_T, loss64_T), (logprobs_T, logprobs64_T)):
        assert (value_T.double() - value64_T).abs().max() < 0.15
        (grad,) = torch.autograd.grad(value_T.sum(), hidden)
        (grad64,) = torch.autograd.grad(value64_T.sum(), hidden64, retain_graph=True)
        assert oracle.relative_error(grad, grad64) < 4e-2


def test_peak_memory_is_the_gradient() -> None:
    student = torch.randn(256, 151936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn_like(student)
    vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None).sum().backward()
    student.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None).sum().backward()
    logits_bytes = student.numel() * 2
    assert torch.cuda.max_memory_allocated() - before < logits_bytes * 1.02
