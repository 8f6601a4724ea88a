"""Common parts of the vocab-parallel operations: shards of a vocabulary, their collectives, and kernel dispatch.

T tokens, C tokens of one chunk, H hidden size, V vocabulary, W columns of V on this rank, N ranks.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
MIN_BYTES_FOR_HUGE_PAGES = 2**22  # two of them, so that at least one is whole


def row_kernels(tensor: Tensor) -> ModuleType:
    """Return the kernels for a tensor's device: Triton on CUDA, Numba on CPU. This is the only dispatch point.

    They are imported when needed: a machine may lack one of them.
    """
    if tensor.device.type == "cuda":
        if tensor.dtype == torch.float64:
            raise TypeError("float64 is for checks on CPU: the CUDA kernels compute in float32")
        from nemo_ssopd.ops import row_kernels_triton  # noqa: PLC0415

        return row_kernels_triton
    from nemo_ssopd.ops import row_kernels_cpu  # noqa: PLC0415

    return row_kernels_cpu


class RowNorm(NamedTuple):
    """The normalization of a row of logits: `log2 p = logits * log2(e) - max - log_sum`.

    The two are kept apart, since kernels subtract in fp32: one number for both would lose the small one when logits are
    near 1e4. They are float64 here, or the KL of nearly equal models would consist of their rounding errors.
    """

    max_T: Tensor
    log_sum_T: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in: float64 for float64, for gradient checks, and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask Linux to back a tensor, not written to yet, by huge pages; return it. Elsewhere, return it only.

    Memory as large as logits comes fresh from the system, which hands out a small page at each first write: on the
    machine of `docs/benchmarks.md` this takes as long as all the arithmetic on it.
    """
    if sys.platform == "linux" and fresh.device.type == "cpu" and fresh.nbytes >= MIN_BYTES_FOR_HUGE_PAGES:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (fresh.data_ptr() + fresh.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: a kernel without huge pages refuses it, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return fresh


def log2(tensor: Tensor) -> Tensor:
    """Return the base-2 logarithm without MKL, which `torch.log2` uses.

    For even one number MKL wakes its own threads and spins until all have met. That takes milliseconds when another
    process wants a core.
    """
    return torch.xlogy(LOG2_E, tensor)


def log2_p(logits_T: Tensor, norm: RowNorm) -> Tensor:
    """Return log2 p of one logit per row.

    In float64: the product with log2(e) must not be rounded before the max is subtracted.
    """
    return logits_T.double() * LOG2_E - norm.max_T - norm.log_sum_T


def merge_statistics(stats_NT3: Tensor) -> Tensor:
    """Merge `row_statistics` of N disjoint column ranges into [T, 3] of their union, summed in the order given."""
    max_NT, sum_NT, weighted_NT = stats_NT3.unbind(-1)
    max_T = max_NT.amax(dim=0)
    shift_NT = torch.where(sum_NT > 0, max_NT - max_T, 0.0)
    scale_NT = torch.exp2(shift_NT)
    sum_T = (sum_NT * scale_NT).sum(dim=0)
    weighted_T = ((weighted_NT + sum_NT * shift_NT) * scale_NT).sum(dim=0)
    return torch.stack([max_T, sum_T, weighted_T], dim=-1)


@dataclass(frozen=True)
class OutputLayer:
    """A layer that makes logits from hidden states, `hidden @ weight.T / temperature`, a chunk of tokens at a time.

    Example: temperature 1.1, two ranks of 4 columns and a vocabulary of 7: on rank 1, shard is slice(4, 7).
    """

    temperature: float
    group: dist.ProcessGroup | None
    chunk_tokens: int
    shard: slice  # global vocabulary ids of this rank's columns, without padding

    @property
    def width(self) -> int:
        return self.shard.stop - self.shard.start

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))

    def buffer(self, hidden_TH: Tensor) -> Tensor:
        """Return an uninitialized buffer for the logits of one chunk."""
        return in_huge_pages(hidden_TH.new_empty(min(self.chunk_tokens, hidden_TH.shape[0]), self.width))

    def logits(self, hidden_CH: Tensor, weight_WH: Tensor, buffer_CW: Tensor) -> Tensor:
        """Write logits [C, W] over the buffer. The division by the temperature is the matrix product's own scale."""
        out_CW = buffer_CW[: hidden_CH.shape[0]]
        return torch.addmm(
            out_CW, hidden_CH, weight_WH[: self.width].t(), beta=0.0, alpha=1.0 / self.temperature, out=out_CW
        )

    def write_hidden_gradient(self, grad_logits_CW: Tensor, weight_WH: Tensor, out_CH: Tensor) -> None:
        """Write this shard's part only: it still has to be summed over the group."""
        torch.addmm(out_CH, grad_logits_CW, weight_WH[: self.width], beta=0.0, alpha=1.0 / self.temperature, out=out_CH)


class LinearGradients:
    """The gradients of hidden states and weight, summed over chunks, for when the weight's is also needed."""

    def __init__(self, layer: OutputLayer, hidden_TH: Tensor, weight_WH: Tensor, needs_hidden: bool):
        self.layer, self.hidden_TH, self.weight_WH = layer, hidden_TH, weight_WH
        self.grad_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        # Low-precision chunks are summed in float32, as Megatron does over micro-batches.
        self.grad_weight_WH = torch.zeros_like(weight_WH, dtype=compute_dtype(weight_WH.dtype))

    def add(self, grad_logits_CW: Tensor, rows: slice) -> None:
        if self.grad_hidden_TH is not None:
            self.layer.write_hidden_gradient(grad_logits_CW, self.weight_WH, self.grad_hidden_TH[rows])
        scale = 1.0 / self.layer.temperature
        sum_WH = self.grad_weight_WH[: self.layer.width]  # padded rows keep their zeros
        if sum_WH.dtype == grad_logits_CW.dtype:
            sum_WH.addmm_(grad_logits_CW.t(), self.hidden_TH[rows], alpha=scale)
        else:
            sum_WH.add_(grad_logits_CW.t() @ self.hidden_TH[rows], alpha=scale)

    def finish(self) -> tuple[Tensor | None, Tensor]:
        if self.grad_hidden_TH is not None:
            sum_shards(self.grad_hidden_TH, self.layer.group)
        return self.grad_hidden_TH, self.grad_weight_WH.to(self.weight_WH.dtype)


def scale_hidden_gradient(unit_grad_TH: Tensor, upstream_T: Tensor, layer: OutputLayer) -> Tensor:
    """Scale the forward's gradient, made for an upstream gradient of 1, by the real one; sum it over the group."""
    grad_TH = torch.mul(unit_grad_TH, upstream_T.unsqueeze(1), out=torch.empty_like(unit_grad_TH))
    return sum_shards(grad_TH, layer.group)


def output_layer(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    vocab_size: int | None,
) -> OutputLayer:
    """Build the output layer: check what a caller can get wrong, and find out which columns are this rank's."""
    if hidden_TH.dim() != 2 or weight_WH.dim() != 2 or hidden_TH.shape[1] != weight_WH.shape[1]:
        raise ValueError(
            f"hidden must be [T, H] and weight [W, H], got {tuple(hidden_TH.shape)} and {tuple(weight_WH.shape)}; "
            "flatten the sequence and batch dimensions first"
        )
    if hidden_TH.dtype != weight_WH.dtype:
        raise ValueError(f"hidden is {hidden_TH.dtype} but weight is {weight_WH.dtype}; cast one of them")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    return OutputLayer(temperature, group, chunk_tokens, _shard_of(weight_WH, vocab_size, group))


_SHARDS = WeakTensorKeyDictionary()


def _shard_of(weight_WH: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None) -> slice:
    """Return `shard_columns` of a weight, exchanged once in its life: the exchange makes the host wait for the device.

    All ranks hold a part of the same weight, so all of them exchange, or none does.
    """
    known = _SHARDS.setdefault(weight_WH, {})
    key = (vocab_size, group, weight_WH.shape[0])
    if key not in known:
        known[key] = shard_columns(weight_WH.shape[0], vocab_size, group, weight_WH.device)
    return known[key]


def shard_columns(width: int, vocab_size: int | None, group: dist.ProcessGroup | None, device: torch.device) -> slice:
    """Return the global vocabulary ids of this rank's columns, without padding.

    Shards may differ in width, so the ranks exchange it.
    """
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}; None means that no column is padding")
    widths_N = gather_shards(torch.tensor([width], device=device), group).flatten().tolist()
    rank = 0 if group is None else dist.get_rank(group)
    start = sum(widths_N[:rank])
    stop = start + width if vocab_size is None else min(start + width, max(start, vocab_size))
    if vocab_size is not None and vocab_size > sum(widths_N):
        raise ValueError(f"vocab_size is {vocab_size}, but the shards hold only {sum(widths_N)} columns")
    return slice(start, stop)


def has_whole_rows(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1


def gather_shards(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [...] of each rank to [N, ...] on all of them, in rank order, so that all ranks compute the same bits."""
    if has_whole_rows(group):
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return torch.stack(gathered)


def sum_shards(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce in place; return the argument."""
    if not has_whole_rows(group):
        dist.all_reduce(tensor, group=group)
    return tensor


def with_unit_stride(logits_TW: Tensor) -> Tensor:
    """Return the argument, or a copy with contiguous rows: the kernels walk along rows."""
    return logits_TW if logits_TW.stride(1) == 1 else logits_TW.contiguous()


def norm_and_entropy(stats_NT3: Tensor) -> tuple[RowNorm, Tensor]:
    """Turn `row_statistics` of all N shards into the norm of the whole rows, and their entropy [T] in nats."""
    max_T, sum_T, weighted_T = merge_statistics(stats_NT3).double().unbind(-1)
    log_sum_T = log2(sum_T)
    return RowNorm(max_T, log_sum_T), ((log_sum_T - weighted_T / sum_T) * LN_2).to(stats_NT3.dtype)
