"""The row kernels in Triton, for CUDA: those of `row_kernels_cpu`, whose docstrings say what they compute.

A program owns one row and SPLIT_COLUMNS of its columns, so that few tokens still fill the GPU. It keeps its sums in
registers; the splits of a row are then added in a fixed order, as shards are, so that every run gives the same bits.
Memory traffic is all that counts here: each kernel reads each logit once, in 16-byte loads when rows are 16-byte
aligned, and computes in fp32. Only the gradient that is written has the logits' size, and it may go over the logits.

T tokens, W columns of the vocabulary on this rank, N splits of a row. Logarithms are in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_ssopd.ops.vocab_parallel import LN_2, LOG2_E, RowNorm, merge_statistics, with_unit_stride

BLOCK = 2048  # columns in flight: 16 per thread, two 16-byte loads of bf16
SPLIT_COLUMNS = 8 * BLOCK
NUM_WARPS = 4

_LOG2_E = tl.constexpr(LOG2_E)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _statistics_kernel(logits_ptr, stats_ptr, row_stride, num_rows, width, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    maximum = _LOWEST
    total = 0.0
    weighted = 0.0
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, width), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        logits = tl.load(logits_ptr + row * row_stride + columns, mask=mask, other=-float("inf")).to(tl.float32)
        # Online log-sum-exp: sums so far are rescaled to the new maximum.
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=0) * _LOG2_E)
        shift = maximum - new_maximum
        scale = tl.exp2(shift)
        z = tl.fma(logits, tl.full([BLOCK], _LOG2_E, tl.float32), tl.zeros([BLOCK], tl.float32) - new_maximum)
        power = tl.exp2(z)
        # The first shift is the lowest float: its product with a sum of 0 must be 0, so it is kept away from -inf.
        old = (weighted + total * tl.maximum(shift, -2000.0)) * scale
        weighted = old + tl.sum(power * tl.maximum(z, -2000.0), axis=0)
        total = total * scale + tl.sum(power, axis=0)
        maximum = new_maximum
    out_ptr = stats_ptr + (split * num_rows + row) * 3
    tl.store(out_ptr, maximum)
    tl.store(out_ptr + 1, total)
    tl.store(out_ptr + 2, weighted)


@triton.jit
def _log2_p(logits_ptr, columns, mask, maximum, log_sum, BLOCK: tl.constexpr):
    logits = tl.load(logits_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
    z = tl.fma(logits, tl.full([BLOCK], _LOG2_E, tl.float32), tl.zeros([BLOCK], tl.float32) - maximum)
    return z - log_sum


@triton.jit
def _kl_sums_kernel(
    student_ptr,
    teacher_ptr,
    norms_ptr,
    sums_ptr,
    student_stride,
    teacher_stride,
    num_rows,
    width,
    clip,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    student_max = tl.load(norms_ptr + row)
    student_log_sum = tl.load(norms_ptr + num_rows + row)
    teacher_max = tl.load(norms_ptr + 2 * num_rows + row)
    teacher_log_sum = tl.load(norms_ptr + 3 * num_rows + row)
    clipped = tl.zeros([BLOCK], tl.float32)
    unclipped_mass = tl.zeros([BLOCK], tl.float32)
    whole = tl.zeros([BLOCK], tl.float32)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, width), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        student = _log2_p(student_ptr + row * student_stride, columns, mask, student_max, student_log_sum, BLOCK)
        teacher = _log2_p(teacher_ptr + row * teacher_stride, columns, mask, teacher_max, teacher_log_sum, BLOCK)
        p = tl.exp2(teacher)
        kl = tl.where(p == 0.0, 0.0, p * (teacher - student))  # p = 0 contributes nothing, not 0 * inf; NaN stays NaN
        clipped += tl.where(kl < clip, kl, tl.where(kl == kl, clip, kl))
        unclipped_mass += tl.where((kl < clip) | (clip == float("inf")), p, 0.0)  # without a clip U is everything
        whole += kl
        most = tl.maximum(most, kl)
    out_ptr = sums_ptr + (split * num_rows + row) * 4
    tl.store(out_ptr, tl.sum(clipped, axis=0))
    tl.store(out_ptr + 1, tl.sum(unclipped_mass, axis=0))
    tl.store(out_ptr + 2, tl.sum(whole, axis=0))
    tl.store(out_ptr + 3, tl.where((tl.max(most, axis=0) >= clip) & (clip < float("inf")), 1.0, 0.0))


@triton.jit
def _kl_gradient_kernel(
    student_ptr,
    teacher_ptr,
    norms_ptr,
    unclipped_mass_ptr,
    upstream_ptr,
    out_ptr,
    student_stride,
    teacher_stride,
    out_stride,
    num_rows,
    width,
    clip,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    student_max = tl.load(norms_ptr + row)
    student_log_sum = tl.load(norms_ptr + num_rows + row)
    teacher_max = tl.load(norms_ptr + 2 * num_rows + row)
    teacher_log_sum = tl.load(norms_ptr + 3 * num_rows + row)
    unclipped_mass = tl.load(unclipped_mass_ptr + row)
    upstream = 1.0
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_ptr + row)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, width), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        student = _log2_p(student_ptr + row * student_stride, columns, mask, student_max, student_log_sum, BLOCK)
        teacher = _log2_p(teacher_ptr + row * teacher_stride, columns, mask, teacher_max, teacher_log_sum, BLOCK)
        p = tl.exp2(teacher)
        kept = tl.where((p * (teacher - student) < clip) | (clip == float("inf")), p, 0.0)
        grad = upstream * (unclipped_mass * tl.exp2(student) - kept)
        tl.store(out_ptr + row * out_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logprob_gradient_kernel(
    logits_ptr,
    max_ptr,
    log_sum_ptr,
    targets_ptr,
    upstream_ptr,
    out_ptr,
    logits_stride,
    out_stride,
    width,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    maximum = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(targets_ptr + row)
    upstream = 1.0
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_ptr + row)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, width), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        p = tl.exp2(_log2_p(logits_ptr + row * logits_stride, columns, mask, maximum, log_sum, BLOCK))
        grad = upstream * (tl.where(columns == target, 1.0, 0.0) - p)
        tl.store(out_ptr + row * out_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)


def row_statistics(logits_TW: Tensor) -> Tensor:
    num_rows, width = logits_TW.shape
    logits_TW = with_unit_stride(logits_TW)
    stats_NT3 = logits_TW.new_zeros(_num_splits(width), num_rows, 3, dtype=torch.float32)
    stats_NT3[:, :, 0] = torch.finfo(torch.float32).min
    if logits_TW.numel() > 0:
        _statistics_kernel[(num_rows, _num_splits(width))](
            logits_TW,
            stats_NT3,
            logits_TW.stride(0),
            num_rows,
            width,
            SPLIT=SPLIT_COLUMNS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return merge_statistics(stats_NT3)


def kl_sums(student_TW: Tensor, teacher_TW: Tensor, student: RowNorm, teacher: RowNorm, clip: float) -> Tensor:
    num_rows, width = student_TW.shape
    student_TW, teacher_TW = with_unit_stride(student_TW), with_unit_stride(teacher_TW)
    sums_NT4 = student_TW.new_zeros(_num_splits(width), num_rows, 4, dtype=torch.float32)
    if student_TW.numel() > 0:
        _kl_sums_kernel[(num_rows, _num_splits(width))](
            student_TW,
            teacher_TW,
            torch.stack([*student, *teacher]).float(),
            sums_NT4,
            student_TW.stride(0),
            teacher_TW.stride(0),
            num_rows,
            width,
            clip * LOG2_E,
            SPLIT=SPLIT_COLUMNS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    sums_T4 = sums_NT4.sum(dim=0)
    sums_T4[:, 0] *= LN_2
    sums_T4[:, 2] *= LN_2
    sums_T4[:, 3].clamp_(max=1.0)
    return sums_T4


def write_kl_gradient(
    student_TW: Tensor,
    teacher_TW: Tensor,
    student: RowNorm,
    teacher: RowNorm,
    unclipped_mass_T: Tensor,
    clip: float,
    upstream_T: Tensor | None,
    out_TW: Tensor,
) -> None:
    num_rows, width = student_TW.shape
    if student_TW.numel() == 0:
        return
    student_TW, teacher_TW = with_unit_stride(student_TW), with_unit_stride(teacher_TW)
    assert out_TW.stride(1) == 1, "gradients are written into buffers of our own"
    unclipped_mass_T = unclipped_mass_T.contiguous()
    _kl_gradient_kernel[(num_rows, _num_splits(width))](
        student_TW,
        teacher_TW,
        torch.stack([*student, *teacher]).float(),
        unclipped_mass_T,
        unclipped_mass_T if upstream_T is None else upstream_T.float().contiguous(),
        out_TW,
        student_TW.stride(0),
        teacher_TW.stride(0),
        out_TW.stride(0),
        num_rows,
        width,
        clip * LOG2_E,
        SPLIT=SPLIT_COLUMNS,
        BLOCK=BLOCK,
        HAS_UPSTREAM=upstream_T is not None,
        num_warps=NUM_WARPS,
    )


def write_logprob_gradient(
    logits_TW: Tensor, norm: RowNorm, targets_T: Tensor, upstream_T: Tensor | None, out_TW: Tensor
) -> None:
    num_rows, width = logits_TW.shape
    if logits_TW.numel() == 0:
        return
    logits_TW = with_unit_stride(logits_TW)
    assert out_TW.stride(1) == 1, "gradients are written into buffers of our own"
    max_T, log_sum_T = norm.max_T.float().contiguous(), norm.log_sum_T.float().contiguous()
    _logprob_gradient_kernel[(num_rows, _num_splits(width))](
        logits_TW,
        max_T,
        log_sum_T,
        targets_T.contiguous(),
        max_T if upstream_T is None else upstream_T.float().contiguous(),
        out_TW,
        logits_TW.stride(0),
        out_TW.stride(0),
        width,
        SPLIT=SPLIT_COLUMNS,
        BLOCK=BLOCK,
        HAS_UPSTREAM=upstream_T is not None,
        num_warps=NUM_WARPS,
    )


def _num_splits(width: int) -> int:
    return max(1, triton.cdiv(width, SPLIT_COLUMNS))
