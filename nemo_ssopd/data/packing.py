"""Pack sequences of unequal length into micro-batches, and split per-token results back into sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from nemo_ssopd.types import PackedBatch, TokenSequence


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[tuple[int, ...]]:
    """Group the indices of `lengths` so that the sum of each group stays within `token_budget` tokens.

    First-fit decreasing (Johnson 1973): the longest first, each into the first group with room for it. Ties go by
    index. A sequence over the budget gets a micro-batch of its own.

    >>> micro_batches([3, 9, 4, 10], token_budget=14)
    [(3, 2), (1, 0)]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = (number for number, free in enumerate(room) if lengths[index] <= free)
        number = next(fitting, len(batches))
        if number == len(batches):
            batches.append([])
            room.append(token_budget)
        batches[number].append(index)
        room[number] -= lengths[index]
    return [tuple(batch) for batch in batches]


def pack(
    sequences: Sequence[TokenSequence],
    rows: tuple[int, ...],
    *,
    pad_id: int,
    multiple: int = 1,
    device: torch.device | str,
) -> PackedBatch:
    """Lay `sequences[row] for row in rows` end to end, and index their completion tokens.

    The total is padded to a multiple of `multiple`. The padding counts as one more sequence.
    """
    tokens: list[int] = []
    bounds = [0]
    index: list[int] = []
    token_ids: list[int] = []
    offsets = [0]
    for sequence in (sequences[row] for row in rows):
        before_first = len(tokens) + sequence.prompt_length - 1
        index.extend(range(before_first, before_first + sequence.completion_length))
        token_ids.extend(sequence.completion)
        offsets.append(len(token_ids))
        tokens.extend(sequence.tokens)
        bounds.append(len(tokens))
    if missing := -len(tokens) % multiple:
        tokens.extend([pad_id] * missing)
        bounds.append(len(tokens))
    return PackedBatch(
        rows=rows,
        tokens_S=send(torch.tensor(tokens, dtype=torch.long), device),
        bounds=tuple(bounds),
        starts=send(torch.tensor(bounds, dtype=torch.int32), device),
        index_T=send(torch.tensor(index, dtype=torch.long), device),
        token_ids_T=send(torch.tensor(token_ids, dtype=torch.long), device),
        offsets=tuple(offsets),
    )


def send(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a CPU tensor to `device`. For a GPU, copy from pinned memory and do not wait."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def unpack(values_T: torch.Tensor, batch: PackedBatch) -> dict[int, torch.Tensor]:
    """Split one value per completion token into the values of each sequence, by its number in `batch.rows`."""
    assert len(values_T) == batch.num_tokens, (len(values_T), batch.num_tokens)
    bounds = itertools.pairwise(batch.offsets)
    return {row: values_T[start:end] for row, (start, end) in zip(batch.rows, bounds, strict=True)}
