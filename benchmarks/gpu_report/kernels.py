"""The four row kernels against float64 on the same device, and their speed against a copy's."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu_report.stage import Results
from nemo_ssopd.ops.vocab_parallel import RowNorm, norm_and_entropy, row_kernels
from tests.ops import oracle

CLIP = 0.05
SHAPES = {"cuda": ((2, 3), (7, 401), (5, 50021), (33, 151936)), "cpu": ((2, 3), (5, 2051))}
"""Tokens and columns."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Of gradients, which have the type of the logits. What is summed over a row is float32 always."""
TIMED = {"cuda": (4096, 151936, 10), "cpu": (8, 2051, 1)}
"""Tokens, columns and runs: on CUDA over a gigabyte, far beyond any cache."""


def run(results: Results) -> None:
    for dtype in TOLERANCE:
        for num_tokens, width in SHAPES[results.device]:
            for name, (error, limit) in errors(num_tokens, width, dtype, results.device).items():
                results.add(f"{name}, T={num_tokens}, V={width}, {_name(dtype)}: relative error", error, below=limit)
    tokens, width, runs = TIMED[results.device]
    for dtype in (torch.bfloat16, torch.float32):
        _add_speeds(results, tokens, width, dtype, runs)


def errors(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """What a kernel computes -> its relative error against float64, and the limit.

    Rows are strided; some of the teacher's logits are -inf.
    """
    logits = [oracle.logits(num_tokens, width, seed=s, inf_share=0.1).to(device, dtype) for s in (1, 2)]
    student, teacher = _strided(logits[0].clamp(min=-20)), _strided(logits[1])
    upstream_T = torch.linspace(-1.0, 2.0, num_tokens, device=device)
    targets_T = torch.arange(num_tokens, device=device) * 101 % width
    kernels = row_kernels(student)
    (norm, entropy_T), (teacher_norm, _) = (_norm(kernels, x) for x in (student, teacher))
    sums_T4 = kernels.kl_sums(student, teacher, norm, teacher_norm, CLIP)
    kl_grad, logprob_grad = torch.empty_like(student), torch.empty_like(student)
    kernels.write_kl_gradient(student, teacher, norm, teacher_norm, sums_T4[:, 1], CLIP, upstream_T, kl_grad)
    kernels.write_logprob_gradient(student, norm, targets_T, upstream_T, logprob_grad)

    loss64_T, kl_grad64 = oracle.clipped_kl(student, teacher, CLIP, upstream_T)
    logprob_grad64 = -student.double().softmax(-1)
    logprob_grad64[torch.arange(num_tokens, device=device), targets_T] += 1.0
    logprob_grad64 *= upstream_T.unsqueeze(1)
    return {
        "entropy": (oracle.relative_error(entropy_T, oracle.entropy(student)), TOLERANCE[torch.float32]),
        "clipped KL": (oracle.relative_error(sums_T4[:, 0], loss64_T), TOLERANCE[torch.float32]),
        "gradient of the clipped KL": (oracle.relative_error(kl_grad, kl_grad64), TOLERANCE[dtype]),
        "gradient of log-probs": (oracle.relative_error(logprob_grad, logprob_grad64), TOLERANCE[dtype]),
    }


def _strided(values: Tensor) -> Tensor:
    """The same values in rows that do not touch, and start at addresses that are no multiple of 16 bytes."""
    whole = values.new_empty(values.shape[0], values.shape[1] + 3)
    whole[:, : values.shape[1]] = values
    return whole[:, : values.shape[1]]


def _norm(kernels: ModuleType, logits: Tensor) -> tuple[RowNorm, Tensor]:
    return norm_and_entropy(kernels.row_statistics(logits).unsqueeze(0))


def _add_speeds(results: Results, num_tokens: int, width: int, dtype: torch.dtype, runs: int) -> None:
    student, teacher = (torch.randn(num_tokens, width, device=results.device).to(dtype) * 3 for _ in range(2))
    out = torch.empty_like(student)
    kernels = row_kernels(student)
    (norm, _), (teacher_norm, _) = (_norm(kernels, x) for x in (student, teacher))
    mass_T = kernels.kl_sums(student, teacher, norm, teacher_norm, CLIP)[:, 1]
    targets_T = torch.arange(num_tokens, device=results.device) % width
    # Name -> how many times as many bytes as one matrix of logits has are read or written, and the call.
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: out.copy_(student)),
        "row statistics": (1, lambda: kernels.row_statistics(student)),
        "sums of the clipped KL": (2, lambda: kernels.kl_sums(student, teacher, norm, teacher_norm, CLIP)),
        "gradient of the clipped KL": (
            3,
            lambda: kernels.write_kl_gradient(student, teacher, norm, teacher_norm, mass_T, CLIP, None, out),
        ),
        "gradient of log-probs": (2, lambda: kernels.write_logprob_gradient(student, norm, targets_T, None, out)),
    }
    setting, bandwidth = f"T={num_tokens}, V={width}, {_name(dtype)}", 0.0
    for name, (matrices, call) in calls.items():
        seconds = best_seconds(call, results.device, runs)
        rate = matrices * student.nbytes / seconds
        bandwidth = bandwidth or rate
        results.add(f"{name}, {setting}", 1e3 * seconds, f"ms, {rate / 1e9:.0f} GB/s, {rate / bandwidth:.2f} of a copy")


def best_seconds(call: Callable[[], object], device: str, runs: int) -> float:
    """Of `runs` calls after two that warm up: the device's own time on CUDA."""
    call(), call()
    return min(_cuda_seconds(call) if device == "cuda" else _wall_seconds(call) for _ in range(runs))


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
