"""Sequences of unequal length to padded micro-batches, and per-token results back to sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq

import torch

from nemo_ssopd.types import PackedBatch, Sequence


def micro_batches(lengths: Seq[int], token_budget: int, *, multiple: int = 1) -> list[tuple[int, ...]]:
    """Groups indices of `lengths` so that rows x padded length stays within `token_budget`.

    Longest first, so that rows of like length share a micro-batch and the largest memory use comes first. A
    sequence over the budget gets a micro-batch of its own. Lengths are padded to a multiple of `multiple`.

    >>> micro_batches([3, 9, 4, 10], token_budget=20)
    [(3, 1), (2, 0)]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[tuple[int, ...]] = []
    while order:
        padded_length = _padded(lengths[order[0]], multiple)
        rows = max(1, token_budget // padded_length)
        batches.append(tuple(order[:rows]))
        order = order[rows:]
    return batches


def pack(
    sequences: Seq[Sequence], rows: tuple[int, ...], *, pad_id: int, multiple: int = 1, device: torch.device | str
) -> PackedBatch:
    """Pads `sequences[row] for row in rows` on the right and points at their completion tokens.

    Padding needs no attention mask: it stands behind every token that is scored, and attention is causal.
    """
    chosen = [sequences[row] for row in rows]
    padded_length = _padded(max(len(sequence.tokens) for sequence in chosen), multiple)
    tokens: list[tuple[int, ...]] = []
    index: list[int] = []
    targets: list[int] = []
    offsets = [0]
    for b, sequence in enumerate(chosen):
        tokens.append(sequence.tokens + (pad_id,) * (padded_length - len(sequence.tokens)))
        before_first = b * padded_length + sequence.prompt_length - 1
        index.extend(range(before_first, before_first + sequence.completion_length))
        targets.extend(sequence.completion)
        offsets.append(len(targets))
    return PackedBatch(
        rows=rows,
        tokens_BS=torch.tensor(tokens, dtype=torch.long, device=device),
        index_T=torch.tensor(index, dtype=torch.long, device=device),
        targets_T=torch.tensor(targets, dtype=torch.long, device=device),
        offsets=tuple(offsets),
    )


def unpack(values_T: torch.Tensor, batch: PackedBatch) -> dict[int, torch.Tensor]:
    """One value per completion token -> the values of each sequence, by its number in `batch.rows`."""
    assert len(values_T) == batch.num_tokens, (len(values_T), batch.num_tokens)
    bounds = itertools.pairwise(batch.offsets)
    return {row: values_T[start:end] for row, (start, end) in zip(batch.rows, bounds, strict=True)}


def _padded(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple
