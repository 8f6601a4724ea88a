"""The row kernels in plain torch, blocked for cache. `clipped_kl_triton` has the same ones for CUDA.

Each walks over [T, W] logits in blocks of a few whole rows: the operations on a block run out of the cache, logits are
read from memory once per kernel, and scratch is a few blocks, whatever T is. Every core has rows of its own: torch's
own threads meet at a barrier after each operation, which costs many times the work itself as soon as another process
wants a core.

T tokens, W columns of the vocabulary on this rank, R rows of one block. Logarithms are in base 2 (`exp2` is the
cheapest exponential on CPU and GPU alike); logits are scaled on the way in.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

MAX_BLOCK_BYTES = 2**21  # a few of these stay in a last-level cache
MIN_BLOCK_BYTES = 2**17  # below, calling the operations costs more than they do
SCRATCH_SHARE = 0.04  # in between, of all threads together, relative to the two logits tensors
MIN_BYTES_FOR_HUGE_PAGES = 2**22  # two of them, so that at least one is whole
MIN_BYTES_FOR_THREADS = 2**25  # below, threads spend their time handing each other the interpreter lock


class RowNorm(NamedTuple):
    """What turns a row of logits into log-probabilities: `log2 p = logits * log2(e) - max - log_sum`.

    The two are kept apart: rounded to one fp32 number they would lose the small one when logits are near 1e4.
    """

    max_T: Tensor
    log_sum_T: Tensor


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Its argument, not written to yet, with Linux asked to back it by huge pages. Elsewhere it does nothing.

    Memory as large as logits comes fresh from the system, which hands out a small page at each first write: on the
    machine of `docs/benchmarks.md` this takes as long as all the arithmetic on it.
    """
    if sys.platform == "linux" and fresh.device.type == "cpu" and fresh.nbytes >= MIN_BYTES_FOR_HUGE_PAGES:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (fresh.data_ptr() + fresh.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: a kernel without huge pages refuses it, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return fresh


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, for gradient checks; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log2(tensor: Tensor) -> Tensor:
    """Not through MKL as `torch.log2` goes: for even one number MKL wakes its own threads and spins until all have
    met, which takes milliseconds when another process wants a core."""
    return torch.xlogy(LOG2_E, tensor)


def log2_p(logits_T: Tensor, norm: RowNorm) -> Tensor:
    """Of one logit per row. In float64: the product with log2(e) must not be rounded before the max is subtracted."""
    return (logits_T.double() * LOG2_E - norm.max_T - norm.log_sum_T).to(norm.max_T.dtype)


def merge_statistics(stats_NT3: Tensor) -> Tensor:
    """`row_statistics` of N disjoint column ranges -> [T, 3] of their union, summed in the order given."""
    max_NT, sum_NT, weighted_NT = stats_NT3.unbind(-1)
    max_T = max_NT.amax(dim=0)
    shift_NT = torch.where(sum_NT > 0, max_NT - max_T, 0.0)
    scale_NT = torch.exp2(shift_NT)
    sum_T = (sum_NT * scale_NT).sum(dim=0)
    weighted_T = ((weighted_NT + sum_NT * shift_NT) * scale_NT).sum(dim=0)
    return torch.stack([max_T, sum_T, weighted_T], dim=-1)


def row_statistics(logits_TW: Tensor, with_entropy: bool) -> Tensor:
    """[T, 3] of this shard: the row's max m, sum 2^(z - m), and sum 2^(z - m) * (z - m), with z = logits * log2(e).

    The last one is what the entropy needs; it is zero when not asked for. A row without any finite logit has sum 0 and
    the lowest finite max: it takes no mass when shards are merged.
    """
    stats_T3 = logits_TW.new_zeros(logits_TW.shape[0], 3, dtype=compute_dtype(logits_TW.dtype))
    stats_T3[:, 0] = torch.finfo(stats_T3.dtype).min

    def statistics_of_block(rows: slice, z_RW: Tensor, power_RW: Tensor) -> None:
        max_R1 = _write_shifted(logits_TW[rows], z_RW)
        sum_R1 = torch.exp2(z_RW, out=power_RW).sum(dim=1, keepdim=True)
        weighted_R1 = _weighted_sum(z_RW, power_RW) if with_entropy else torch.zeros_like(sum_R1)
        stats_T3[rows] = torch.cat([max_R1, sum_R1, weighted_R1], dim=1)

    _for_row_blocks(statistics_of_block, logits_TW, scratch=2)
    return stats_T3


def write_logprob_gradient(
    logits_TW: Tensor, norm: RowNorm, targets_T: Tensor, upstream_T: Tensor | None, out_TW: Tensor
) -> None:
    """out = upstream * ([v == target] - p(v)); `out_TW` may be `logits_TW` itself. No upstream counts as 1.

    Targets are column numbers of this shard; one outside of [0, W) lies on another shard.
    """
    if logits_TW.numel() == 0:
        return
    owned_T = (targets_T >= 0) & (targets_T < logits_TW.shape[1])
    columns_T1 = targets_T.clamp(0, logits_TW.shape[1] - 1).unsqueeze(1)
    # 1 - p from its logarithm: read back from `out`, a p near 1 would be rounded to the dtype of the logits.
    target_grad_T = -torch.expm1(log2_p(logits_TW.gather(1, columns_T1).squeeze(1), norm) * LN_2)

    def gradient_of_block(rows: slice, p_RW: Tensor) -> None:
        _write_log2_p(logits_TW[rows], norm, rows, p_RW)
        p_RW.exp2_().mul_(-1.0 if upstream_T is None else -upstream_T[rows, None])
        out_TW[rows] = p_RW

    _for_row_blocks(gradient_of_block, logits_TW, scratch=1)
    if upstream_T is not None:
        target_grad_T = target_grad_T * upstream_T
    target_grad_T = torch.where(owned_T, target_grad_T.to(out_TW.dtype), out_TW.gather(1, columns_T1).squeeze(1))
    out_TW.scatter_(1, columns_T1, target_grad_T.unsqueeze(1))


def kl_sums(
    student_TW: Tensor, teacher_TW: Tensor, student: RowNorm, teacher: RowNorm, clip: float, with_stats: bool
) -> Tensor:
    """[T, 4] sums over this shard's columns: clipped KL, teacher mass on U, KL (both KL in nats), 1 if any is clipped.

    U = {v : p_T log(p_T / p_S) < clip}. The last is zero when statistics are not asked for.
    """
    sums_T4 = student_TW.new_zeros(student_TW.shape[0], 4, dtype=compute_dtype(student_TW.dtype))

    def sums_of_block(rows: slice, student_RW: Tensor, teacher_RW: Tensor, p_RW: Tensor) -> None:
        _write_log2_p(student_TW[rows], student, rows, student_RW)
        _write_log2_p(teacher_TW[rows], teacher, rows, teacher_RW)
        torch.exp2(teacher_RW, out=p_RW)
        minus_kl_RW = student_RW.sub_(teacher_RW).mul_(p_RW)
        sums_T4[rows] = torch.cat(_reduce_block(minus_kl_RW, p_RW, clip, with_stats), dim=1)

    _for_row_blocks(sums_of_block, student_TW, scratch=3)
    return _to_kl_sums(sums_T4, clip)


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
    """out = upstream * (P_U * p_S(v) - p_T(v) * [v in U]); `out_TW` may be `student_TW`. No upstream counts as 1."""

    def gradient_of_block(rows: slice, student_RW: Tensor, teacher_RW: Tensor, p_RW: Tensor) -> None:
        _write_log2_p(student_TW[rows], student, rows, student_RW)
        _write_log2_p(teacher_TW[rows], teacher, rows, teacher_RW)
        torch.exp2(teacher_RW, out=p_RW)
        minus_kl_RW = torch.sub(student_RW, teacher_RW, out=teacher_RW).mul_(p_RW)
        _zero_where_clipped(p_RW, minus_kl_RW, clip)
        student_RW.exp2_().mul_(unclipped_mass_T[rows, None]).sub_(p_RW)
        if upstream_T is not None:
            student_RW.mul_(upstream_T[rows, None])
        out_TW[rows] = student_RW

    _for_row_blocks(gradient_of_block, student_TW, scratch=3)


def sweep_whole_rows(
    student_TW: Tensor, teacher_TW: Tensor, clip: float, with_stats: bool, grad_TW: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All of the above at once, where one rank holds whole rows: `row_statistics` of both models, and `kl_sums`.

    Writes the gradient for an upstream gradient of 1 into `grad_TW`, which may be `student_TW`. Exponentials are what
    a CPU spends its time on: while a block is in cache each is taken once, where the separate kernels take it thrice.
    """
    dtype = compute_dtype(student_TW.dtype)
    rows_T10 = student_TW.new_zeros(student_TW.shape[0], 10, dtype=dtype)

    in_gradient = grad_TW is not None and grad_TW.dtype == dtype  # the gradient's own memory is one of the buffers

    def sweep_block(rows: slice, teacher_z_RW: Tensor, minus_kl_RW: Tensor, *more: Tensor) -> None:
        grad_RW = None if grad_TW is None else grad_TW[rows]
        student_z_RW = grad_RW if grad_RW is not None and in_gradient else more[-1]
        teacher_max_R1 = _write_shifted(teacher_TW[rows], teacher_z_RW)
        student_max_R1 = _write_shifted(student_TW[rows], student_z_RW)
        torch.sub(teacher_z_RW, student_z_RW, out=minus_kl_RW)

        power_RW = torch.exp2(teacher_z_RW, out=more[0] if with_stats else teacher_z_RW)
        teacher_sum_R1 = teacher_weighted_R1 = power_RW.sum(dim=1, keepdim=True)
        if with_stats:
            teacher_weighted_R1 = _weighted_sum(teacher_z_RW, power_RW)
        student_power_RW = torch.exp2(student_z_RW, out=teacher_z_RW if with_stats else student_z_RW)
        student_sum_R1 = student_weighted_R1 = student_power_RW.sum(dim=1, keepdim=True)
        if with_stats:
            student_weighted_R1 = _weighted_sum(student_z_RW, student_power_RW)

        minus_p_RW = power_RW.div_(-teacher_sum_R1)  # with this sign the gradient below is one operation
        minus_kl_RW.add_(log2(student_sum_R1 / teacher_sum_R1)).mul_(minus_p_RW)
        sums = _reduce_block(minus_kl_RW, minus_p_RW, clip, with_stats)
        sums = sums._replace(unclipped_mass_R1=-sums.unclipped_mass_R1)
        if grad_RW is not None:
            scale_R1 = sums.unclipped_mass_R1 / student_sum_R1
            torch.addcmul(minus_p_RW, student_power_RW, scale_R1, out=grad_RW if in_gradient else minus_p_RW)
            if not in_gradient:
                grad_RW.copy_(minus_p_RW)
        student_stats = (student_max_R1, student_sum_R1, student_weighted_R1)
        teacher_stats = (teacher_max_R1, teacher_sum_R1, teacher_weighted_R1)
        rows_T10[rows] = torch.cat([*student_stats, *teacher_stats, *sums], dim=1)

    _for_row_blocks(sweep_block, student_TW, scratch=2 + with_stats + (not in_gradient))
    return rows_T10[:, :3], rows_T10[:, 3:6], _to_kl_sums(rows_T10[:, 6:], clip)


def scale_rows(tensor_TW: Tensor, scale_T: Tensor) -> None:
    """In place, by blocks: at once, torch would make two fp32 copies of a whole low-precision tensor."""

    def scale_block(rows: slice, scratch_RW: Tensor) -> None:
        if tensor_TW.dtype == scratch_RW.dtype:
            tensor_TW[rows].mul_(scale_T[rows, None])
        else:
            tensor_TW[rows] = scratch_RW.copy_(tensor_TW[rows]).mul_(scale_T[rows, None])

    _for_row_blocks(scale_block, tensor_TW, scratch=1)


def _for_row_blocks(work: Callable[..., None], logits_TW: Tensor, scratch: int) -> None:
    """`work(rows, *buffers)` for blocks of whole rows that cover [T, W], with `scratch` buffers of the block's shape.

    The rows are dealt out to torch's number of threads once, so the same input gives the same bits on every run.
    """
    num_tokens, width = logits_TW.shape
    if num_tokens == 0 or width == 0:
        return
    num_threads = torch.get_num_threads()
    dtype = compute_dtype(logits_TW.dtype)
    bytes_of_logits = num_tokens * width * logits_TW.element_size()
    num_workers = min(num_threads, num_tokens) if bytes_of_logits > MIN_BYTES_FOR_THREADS else 1
    share = int(SCRATCH_SHARE * 2 * bytes_of_logits) // (num_workers * scratch)
    block_bytes = min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, share))
    rows_of_worker = -(-num_tokens // num_workers)
    block_rows = min(max(1, block_bytes // (width * dtype.itemsize)), rows_of_worker)

    def work_through(first: int) -> None:
        buffers = logits_TW.new_empty(scratch, block_rows, width, dtype=dtype)
        last = min(first + rows_of_worker, num_tokens)
        for start in range(first, last, block_rows):
            rows = slice(start, min(start + block_rows, last))
            work(rows, *buffers[:, : rows.stop - start].unbind(0))

    def work_on_one_core(first: int) -> None:
        with torch.no_grad():
            work_through(first)

    if num_workers == 1:
        work_through(0)
        return
    try:
        list(_threads(num_workers).map(work_on_one_core, range(0, num_tokens, rows_of_worker)))
    finally:
        torch.set_num_threads(num_threads)  # what threads born later start with


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Threads on which torch uses one core each. They are kept: a new one has all its memory to fault in."""
    return ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def _write_shifted(logits_RW: Tensor, out_RW: Tensor) -> Tensor:
    """out = logits * log2(e) - max. Returns that max, [R, 1], times log2(e).

    Kept finite: a max of -inf would turn a row of -inf into inf - inf.
    """
    if logits_RW.dtype != out_RW.dtype:
        logits_RW = out_RW.copy_(logits_RW)
    max_R1 = logits_RW.amax(dim=1, keepdim=True).mul_(LOG2_E).clamp_(min=torch.finfo(out_RW.dtype).min)
    _write_scaled(logits_RW, max_R1, out_RW)
    return max_R1


def _write_scaled(logits_RW: Tensor, max_R1: Tensor, out_RW: Tensor) -> None:
    """out = logits * log2(e) - max, as one fused multiply-add."""
    if logits_RW.dtype != out_RW.dtype:
        logits_RW = out_RW.copy_(logits_RW)
    torch.add(-max_R1, logits_RW, alpha=LOG2_E, out=out_RW)


def _write_log2_p(logits_RW: Tensor, norm: RowNorm, rows: slice, out_RW: Tensor) -> None:
    _write_scaled(logits_RW, norm.max_T[rows, None], out_RW)
    out_RW.sub_(norm.log_sum_T[rows, None])


def _weighted_sum(z_RW: Tensor, power_RW: Tensor) -> Tensor:
    """[R, 1]: sum of 2^z * z. Overwrites z. 2^-2000 is 0 even in float64, and 0 * -2000 is 0 where 0 * -inf is not."""
    return z_RW.clamp_(min=-2000.0).mul_(power_RW).sum(dim=1, keepdim=True)


class _BlockSums(NamedTuple):
    minus_clipped_kl_R1: Tensor
    unclipped_mass_R1: Tensor
    minus_kl_R1: Tensor
    least_R1: Tensor


def _reduce_block(minus_kl_RW: Tensor, p_RW: Tensor, clip: float, with_stats: bool) -> _BlockSums:
    """Of a block in base 2. Overwrites both arguments: p becomes p * [v in U]. Given -p, the mass too is negative."""
    minus_kl_R1 = minus_kl_RW.sum(dim=1, keepdim=True)
    if minus_kl_R1.isnan().any():  # 0 * inf, from logits of -inf: what the teacher gives no mass contributes nothing
        minus_kl_RW.masked_fill_(p_RW == 0, 0.0)
        minus_kl_R1 = minus_kl_RW.sum(dim=1, keepdim=True)
    least_R1 = minus_kl_RW.amin(dim=1, keepdim=True) if with_stats else torch.full_like(minus_kl_R1, torch.inf)
    unclipped_mass_R1 = _zero_where_clipped(p_RW, minus_kl_RW, clip).sum(dim=1, keepdim=True)
    minus_clipped_kl_R1 = minus_kl_RW.clamp_(min=-clip * LOG2_E).sum(dim=1, keepdim=True)
    return _BlockSums(minus_clipped_kl_R1, unclipped_mass_R1, minus_kl_R1, least_R1)


def _to_kl_sums(block_sums_T4: Tensor, clip: float) -> Tensor:
    """`_BlockSums` of all rows -> what `kl_sums` returns."""
    minus_clipped_T, unclipped_mass_T, minus_kl_T, least_T = block_sums_T4.unbind(1)
    was_clipped_T = (least_T <= -clip * LOG2_E).to(least_T.dtype) if clip < math.inf else torch.zeros_like(least_T)
    return torch.stack([minus_clipped_T * -LN_2, unclipped_mass_T, minus_kl_T * -LN_2, was_clipped_T], dim=1)


def _zero_where_clipped(p_RW: Tensor, minus_kl_RW: Tensor, clip: float) -> Tensor:
    """p where -kl > -clip, else 0, in place. The backward of relu is the one masked select that torch vectorises.

    Without a clip nothing is zeroed, not even where the student's logit is -inf and the summand infinite.
    """
    if clip == math.inf:
        return p_RW
    return torch.ops.aten.threshold_backward.grad_input(p_RW, minus_kl_RW, -clip * LOG2_E, grad_input=p_RW)
