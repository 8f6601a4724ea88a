"""The row kernels in Numba, for CPU. `row_kernels_triton` has the same ones for CUDA.

Compiled by LLVM at first use into loops of vector instructions, and kept in `__pycache__`. A row is read once per
kernel; only the gradient that is written has the logits' size. Every core has rows of its own, and a row's sums are
taken in one order, so the same input gives the same bits on every run, on any number of threads.

T tokens, W columns of the vocabulary on this rank. Logarithms are in base 2 (the cheapest exponential on CPU and GPU
alike); logits are scaled on the way in.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from nemo_ssopd.ops.vocab_parallel import LN_2, LOG2_E, RowNorm, compute_dtype, with_unit_stride

TILE = 2048  # columns of which sums are taken in float32, in as many lanes as the CPU has, before float64 takes over
MIN_COLUMNS_FOR_THREADS = 2**17  # of all rows together; below, waking a thread costs more than it saves

# Sums may be reordered, products fused: what vector instructions need. NaN and infinities keep their meaning.
FAST = {"reassoc", "nsz", "contract", "arcp"}
_kernel = njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
# Parts are inlined into every kernel: a part that is called exists in several versions, and which one a process runs
# would depend on whether the kernel was compiled or came from the cache. They differ in the last bits.
INLINED = {"forceinline": True, "fastmath": FAST, "error_model": "numpy"}
_part = njit(**INLINED)


# ---- Elements --------------------------------------------------------------------------------------------------------


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def _float_of_half(typing_context: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fpext(builder.bitcast(values[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), build


@intrinsic
def _half_of_float(typing_context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.fptrunc(values[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), build


@intrinsic
def _larger(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the larger, or either one if one is NaN: knowing that, LLVM makes vectors of a loop over it."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *values, flags=flags), *values, flags=flags)

    return a(a, a), build


@intrinsic
def _scaled(typing_context: Any, x: Any, scale: Any, shift: Any) -> Any:
    """Return x * scale - shift, rounded once.

    It is not open to reordering: `_ - log_sum` must not become `_ - (max + log_sum)`.
    """

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fma(values[0], values[1], builder.fneg(values[2]))

    return x(x, x, x), build


def _lowest(zero: Any) -> Any:
    """Return the lowest finite number of this type."""


def _load(element: Any) -> Any:
    """Return an array's element as float32 or float64. bfloat16 comes as uint16, float16 as int16: see `_rows_of`."""


def _rounded(value: Any, array: Any) -> Any:
    """Convert a float to an array's type: round to nearest, ties to even."""


def _exp2(x: Any) -> Any:
    """Return 2^x. In float32 to 2 units in the last place, and 0 below 2^-126; there is no vector library for it."""


@overload(_lowest, jit_options=INLINED, strict=False)
def _lowest_overload(zero: Any) -> Any:
    lowest = np.finfo(str(zero)).min
    return lambda zero: lowest


@overload(_load, jit_options=INLINED, strict=False)
def _load_overload(element: Any) -> Any:
    if element == types.uint16:
        return lambda element: _float_of_bits(np.int32(element) << np.int32(16))
    if element == types.int16:
        return lambda element: _float_of_half(element)
    return lambda element: element


@overload(_rounded, jit_options=INLINED, strict=False)
def _rounded_overload(value: Any, array: Any) -> Any:
    if array.dtype == types.uint16:

        def to_bfloat16(value: Any, array: Any) -> Any:
            bits = _bits_of_float(value)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.uint16(rounded if value == value else np.uint32(0x7FC0))

        return to_bfloat16
    if array.dtype == types.int16:
        return lambda value, array: _half_of_float(value)
    return lambda value, array: value


_ONE, _HALF, _LEAST = np.float32(1.0), np.float32(0.5), np.float32(-126.0)
# Minimax polynomial of 2^f on [-1/2, 1/2] (Cephes, exp2f).
_P1, _P2, _P3 = np.float32(6.931472028550421e-1), np.float32(2.402264791363012e-1), np.float32(5.550332471162809e-2)
_P4, _P5, _P6 = np.float32(9.618437357674640e-3), np.float32(1.339887440266574e-3), np.float32(1.535336188319500e-4)


@overload(_exp2, jit_options=INLINED, strict=False)
def _exp2_overload(x: Any) -> Any:
    if x == types.float64:
        return lambda x: np.exp2(x)

    def exp2(x: Any) -> Any:
        y = _LEAST if x < _LEAST else x
        whole = np.floor(y + _HALF)
        f = y - whole
        power = _P6
        power = power * f + _P5
        power = power * f + _P4
        power = power * f + _P3
        power = power * f + _P2
        power = power * f + _P1
        power = power * f + _ONE
        scale = _float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))
        return np.float32(0.0) if x < _LEAST else power * scale

    return exp2


# ---- Kernels ---------------------------------------------------------------------------------------------------------
# Rows lie in a flat array, `stride` elements apart, so that LLVM sees neighbors as neighbors.


@_part
def _statistics_of(x: Any, log2_e: Any, zero: Any) -> tuple[float, float, float]:
    """Return max, sum of powers and weighted sum of one row."""
    lowest = _lowest(zero)
    maximum = lowest
    for i in range(x.size):
        maximum = _larger(_load(x[i]), maximum)
    maximum = _larger(maximum * log2_e, lowest)
    total, weighted = 0.0, 0.0
    for start in range(0, x.size, TILE):
        tile = x[start : start + TILE]
        tile_total, tile_weighted = 0.0, zero
        for i in range(tile.size):
            z = _scaled(_load(tile[i]), log2_e, maximum)
            power = _exp2(z)
            tile_total += np.float64(power)  # or the KL of nearly equal models would consist of its rounding errors
            tile_weighted += power * z if power > zero else zero  # not 0 * inf
        total += tile_total
        weighted += tile_weighted
    return maximum, total, weighted


@_part
def _kl_sums_of(
    s: Any, t: Any, s_max: Any, t_max: Any, t_log_sum: Any, log_ratio: Any, clip: Any, log2_e: Any, zero: Any
) -> tuple[float, float, float, bool]:
    """Return the sums of one row. `log_ratio`: the student's log-sum-exp minus the teacher's, without their maxima."""
    clipped, mass, whole, most = 0.0, 0.0, 0.0, zero
    for start in range(0, s.size, TILE):
        s_tile, t_tile = s[start : start + TILE], t[start : start + TILE]
        tile_clipped, tile_mass, tile_whole = zero, zero, zero
        for i in range(s_tile.size):
            z_s = _scaled(_load(s_tile[i]), log2_e, s_max)
            z_t = _scaled(_load(t_tile[i]), log2_e, t_max)
            p = _exp2(z_t - t_log_sum)
            kl = p * ((z_t - z_s) + log_ratio)
            kl = zero if p == zero else kl  # what has no mass contributes nothing, not 0 * inf; NaN stays NaN
            over = kl >= clip
            tile_whole += kl
            tile_clipped += clip if over else kl
            tile_mass += zero if over else p
            most = _larger(kl, most)
        clipped += tile_clipped
        mass += tile_mass
        whole += tile_whole
    return clipped * LN_2, mass, whole * LN_2, most >= clip


@_kernel
def _statistics_kernel(logits: Any, stride: int, width: int, out: Any) -> None:
    dtype = out.dtype.type
    for row in range(out.shape[0]):
        x = logits[row * stride : row * stride + width]
        out[row, 0], out[row, 1], out[row, 2] = _statistics_of(x, dtype(LOG2_E), dtype(0.0))


@_kernel
def _kl_sums_kernel(
    student: Any, student_stride: int, teacher: Any, teacher_stride: int, width: int, norms: Any, clip: Any, out: Any
) -> None:
    dtype = out.dtype.type
    for row in range(out.shape[0]):
        s = student[row * student_stride : row * student_stride + width]
        t = teacher[row * teacher_stride : row * teacher_stride + width]
        s_max, t_max, t_log_sum = dtype(norms[row, 0]), dtype(norms[row, 2]), dtype(norms[row, 3])
        log_ratio = dtype(norms[row, 1] - norms[row, 3])
        out[row, 0], out[row, 1], out[row, 2], out[row, 3] = _kl_sums_of(
            s, t, s_max, t_max, t_log_sum, log_ratio, clip, dtype(LOG2_E), dtype(0.0)
        )


@_kernel
def _whole_rows_kernel(
    student: Any, student_stride: int, teacher: Any, teacher_stride: int, width: int, clip: Any, stats: Any, sums: Any
) -> None:
    dtype = stats.dtype.type
    log2_e, zero = dtype(LOG2_E), dtype(0.0)
    for row in range(stats.shape[0]):
        s = student[row * student_stride : row * student_stride + width]
        t = teacher[row * teacher_stride : row * teacher_stride + width]
        s_max, s_total, s_weighted = _statistics_of(s, log2_e, zero)
        t_max, t_total, t_weighted = _statistics_of(t, log2_e, zero)
        stats[row, 0], stats[row, 1], stats[row, 2] = s_max, s_total, s_weighted
        stats[row, 3], stats[row, 4], stats[row, 5] = t_max, t_total, t_weighted
        s_log_sum, t_log_sum = np.log2(s_total), np.log2(t_total)
        log_ratio = dtype(s_log_sum - t_log_sum)
        sums[row, 0], sums[row, 1], sums[row, 2], sums[row, 3] = _kl_sums_of(
            s, t, s_max, t_max, dtype(t_log_sum), log_ratio, clip, log2_e, zero
        )


@_kernel
def _kl_gradient_kernel(
    student: Any,
    student_stride: int,
    teacher: Any,
    teacher_stride: int,
    width: int,
    norms: Any,
    unclipped_mass: Any,
    clip: Any,
    upstream: Any,
    out: Any,
    out_stride: int,
) -> None:
    dtype = upstream.dtype.type
    log2_e, zero = dtype(LOG2_E), dtype(0.0)
    z_s = np.empty(TILE, upstream.dtype)  # LLVM makes no vectors of a loop whose output may be its input
    for row in range(norms.shape[0]):
        s = student[row * student_stride : row * student_stride + width]
        t = teacher[row * teacher_stride : row * teacher_stride + width]
        grad = out[row * out_stride : row * out_stride + width]
        s_max, s_log_sum = dtype(norms[row, 0]), dtype(norms[row, 1])
        t_max, t_log_sum = dtype(norms[row, 2]), dtype(norms[row, 3])
        log_ratio = dtype(norms[row, 1] - norms[row, 3])
        pull = upstream[row]
        push = pull * unclipped_mass[row]
        for start in range(0, width, TILE):
            s_tile, t_tile = s[start : start + TILE], t[start : start + TILE]
            grad_tile = grad[start : start + TILE]
            for i in range(s_tile.size):
                z_s[i] = _scaled(_load(s_tile[i]), log2_e, s_max)
            for i in range(t_tile.size):
                z_t = _scaled(_load(t_tile[i]), log2_e, t_max)
                p = _exp2(z_t - t_log_sum)
                over = p * ((z_t - z_s[i]) + log_ratio) >= clip
                grad_tile[i] = _rounded(push * _exp2(z_s[i] - s_log_sum) - pull * (zero if over else p), grad_tile)


@_kernel
def _logprob_gradient_kernel(
    logits: Any, stride: int, width: int, norm: Any, targets: Any, upstream: Any, out: Any, out_stride: int
) -> None:
    dtype = upstream.dtype.type
    log2_e = dtype(LOG2_E)
    z = np.empty(TILE, upstream.dtype)
    for row in range(norm.shape[0]):
        x = logits[row * stride : row * stride + width]
        grad = out[row * out_stride : row * out_stride + width]
        row_max, row_log_sum = dtype(norm[row, 0]), dtype(norm[row, 1])
        scale = upstream[row]
        target = targets[row]
        owned = 0 <= target and target < width
        # 1 - p from its logarithm, in float64: as a difference, a p near 1 would leave rounding errors only.
        target_log2 = np.float64(_load(x[target])) * LOG2_E - norm[row, 0] - norm[row, 1] if owned else 0.0
        for start in range(0, width, TILE):
            tile, grad_tile = x[start : start + TILE], grad[start : start + TILE]
            for i in range(tile.size):
                z[i] = _scaled(_load(tile[i]), log2_e, row_max)
            for i in range(grad_tile.size):
                grad_tile[i] = _rounded(-scale * _exp2(z[i] - row_log_sum), grad_tile)
        if owned:
            grad[target] = _rounded(dtype(-scale * math.expm1(target_log2 * LN_2)), grad)


# ---- What the operations call ----------------------------------------------------------------------------------------


def row_statistics(logits_TW: Tensor) -> Tensor:
    """Return [T, 3] of this shard: max m, sum 2^(z - m), sum 2^(z - m) * (z - m) of each row, z = logits * log2(e).

    The entropy needs the last one. A row without any finite logit has sum 0 and the lowest finite max: it takes no mass
    when shards are merged.
    """
    stats_T3 = logits_TW.new_empty(logits_TW.shape[0], 3, dtype=compute_dtype(logits_TW.dtype))

    def statistics_of(rows: slice) -> None:
        _statistics_kernel(*_rows_of(logits_TW, rows), logits_TW.shape[1], stats_T3[rows].numpy())

    _on_all_cores(statistics_of, logits_TW)
    return stats_T3


def kl_sums(student_TW: Tensor, teacher_TW: Tensor, student: RowNorm, teacher: RowNorm, clip: float) -> Tensor:
    """Return [T, 4] sums over this shard's columns: clipped KL, teacher mass on U, KL, and 1 if any is clipped.

    Both KL are in nats. U = {v : p_T log(p_T / p_S) < clip}; without a clip, U is everything, even where the summand is
    infinite.
    """
    norms_T4 = torch.stack([*student, *teacher], dim=1)
    sums_T4 = norms_T4.new_empty(norms_T4.shape, dtype=compute_dtype(student_TW.dtype))

    def sums_of(rows: slice) -> None:
        _kl_sums_kernel(
            *_rows_of(student_TW, rows),
            *_rows_of(teacher_TW, rows),
            student_TW.shape[1],
            norms_T4[rows].numpy(),
            _limit(clip, student_TW),
            sums_T4[rows].numpy(),
        )

    _on_all_cores(sums_of, student_TW)
    return sums_T4


def statistics_and_sums(student_TW: Tensor, teacher_TW: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return `row_statistics` of both models, [T, 6], and `kl_sums`, for a shard of the whole vocabulary.

    Each row is read from memory once: the sums find it in the cache.
    """
    stats_T6 = student_TW.new_empty(student_TW.shape[0], 6, dtype=compute_dtype(student_TW.dtype))
    sums_T4 = stats_T6.new_empty(student_TW.shape[0], 4)

    def both_of(rows: slice) -> None:
        _whole_rows_kernel(
            *_rows_of(student_TW, rows),
            *_rows_of(teacher_TW, rows),
            student_TW.shape[1],
            _limit(clip, student_TW),
            stats_T6[rows].numpy(),
            sums_T4[rows].numpy(),
        )

    _on_all_cores(both_of, student_TW)
    return stats_T6, sums_T4


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
    """Write out = upstream * (P_U * p_S(v) - p_T(v) * [v in U]).

    `out_TW` may be `student_TW`. No upstream counts as 1.
    """
    norms_T4 = torch.stack([*student, *teacher], dim=1)
    unclipped_mass_T = unclipped_mass_T.contiguous()
    upstream_T = _upstream(upstream_T, student_TW)

    def gradient_of(rows: slice) -> None:
        _kl_gradient_kernel(
            *_rows_of(student_TW, rows),
            *_rows_of(teacher_TW, rows),
            student_TW.shape[1],
            norms_T4[rows].numpy(),
            unclipped_mass_T[rows].numpy(),
            _limit(clip, student_TW),
            upstream_T[rows].numpy(),
            *_rows_of(out_TW, rows),
        )

    _on_all_cores(gradient_of, student_TW)


def write_logprob_gradient(
    logits_TW: Tensor, norm: RowNorm, targets_T: Tensor, upstream_T: Tensor | None, out_TW: Tensor
) -> None:
    """Write out = upstream * ([v == target] - p(v)).

    `out_TW` may be `logits_TW` itself. No upstream counts as 1. Targets are column numbers of this shard; one outside
    of [0, W) lies on another shard.
    """
    norm_T2 = torch.stack([*norm], dim=1)
    upstream_T, targets_T = _upstream(upstream_T, logits_TW), targets_T.contiguous()

    def gradient_of(rows: slice) -> None:
        _logprob_gradient_kernel(
            *_rows_of(logits_TW, rows),
            logits_TW.shape[1],
            norm_T2[rows].numpy(),
            targets_T[rows].numpy(),
            upstream_T[rows].numpy(),
            *_rows_of(out_TW, rows),
        )

    _on_all_cores(gradient_of, logits_TW)


def _rows_of(tensor_TW: Tensor, rows: slice) -> tuple[np.ndarray, int]:
    """Return a flat view of these rows, and their distance in it. NumPy has no bfloat16, and Numba no float16."""
    part = with_unit_stride(tensor_TW.detach()[rows])
    size = (part.shape[0] - 1) * part.stride(0) + part.shape[1] if part.numel() else 0
    flat = part.as_strided((size,), (1,))
    as_numbers = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(flat.dtype, flat.dtype)
    return flat.view(as_numbers).numpy(), part.stride(0)


def _limit(clip: float, logits_TW: Tensor) -> Any:
    """Return the clip in base 2, in the kernels' own precision. No clip becomes NaN, which no number reaches."""
    limit = math.nan if clip == math.inf else clip * LOG2_E
    return torch.tensor(limit, dtype=compute_dtype(logits_TW.dtype)).numpy()[()]


def _upstream(upstream_T: Tensor | None, logits_TW: Tensor) -> Tensor:
    dtype = compute_dtype(logits_TW.dtype)
    if upstream_T is None:
        return logits_TW.new_ones(logits_TW.shape[0], dtype=dtype)
    return upstream_T.detach().to(dtype).contiguous()


def _on_all_cores(work: Callable[[slice], None], logits_TW: Tensor) -> None:
    """Call `work(rows)` for slices that cover the rows, one for each of torch's threads."""
    num_tokens, width = logits_TW.shape
    if num_tokens == 0:
        return
    num_threads = min(torch.get_num_threads(), num_tokens) if num_tokens * width >= MIN_COLUMNS_FOR_THREADS else 1
    share = -(-num_tokens // num_threads)
    slices = [slice(first, min(first + share, num_tokens)) for first in range(0, num_tokens, share)]
    if num_threads == 1:
        work(slices[0])
    else:
        list(_threads(num_threads).map(work, slices))


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number)


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork
