import random

import pytest
import torch

from nemo_ssopd.data.packing import micro_batches, pack, unpack
from nemo_ssopd.types import TokenSequence


def test_longest_first_into_the_first_micro_batch_with_room_ties_by_index():
    assert micro_batches([3, 9, 4, 10], token_budget=14) == [(3, 2), (1, 0)]
    assert micro_batches([5, 5, 5, 5, 5], token_budget=10) == [(0, 1), (2, 3), (4,)]
    assert micro_batches([6, 5, 4, 4, 1], token_budget=10) == [(0, 2), (1, 3, 4)]
    assert micro_batches([], token_budget=10) == []


def test_a_sequence_over_the_budget_is_alone():
    assert micro_batches([3, 50, 4, 12], token_budget=10) == [(1,), (3,), (2, 0)]


def test_every_sequence_is_in_exactly_one_micro_batch_and_little_room_is_left():
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(101)]
    batches = micro_batches(lengths, token_budget=1000)
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    assert all(sum(lengths[index] for index in batch) <= 1000 for batch in batches)
    assert len(batches) == -(-sum(lengths) // 1000)  # no fewer would do


SEQUENCES = [
    TokenSequence((1, 2, 3), 2),  # not packed below
    TokenSequence((11, 12, 13, 14, 15), 2),
    TokenSequence((21, 22, 23), 3),  # an empty completion
    TokenSequence((31, 32, 33, 34), 1),
]


def test_pack_by_hand():
    batch = pack(SEQUENCES, (3, 1, 2), pad_id=0, multiple=8, device="cpu")
    assert batch.rows == (3, 1, 2)
    assert batch.tokens_S.tolist() == [31, 32, 33, 34, 11, 12, 13, 14, 15, 21, 22, 23, 0, 0, 0, 0]
    assert batch.bounds == (0, 4, 9, 12, 16)
    assert batch.index_T.tolist() == [0, 1, 2, 5, 6, 7]
    assert batch.token_ids_T.tolist() == [32, 33, 34, 13, 14, 15]
    assert batch.offsets == (0, 3, 6, 6)
    assert batch.num_tokens == 6


def test_without_need_there_is_no_padding():
    batch = pack(SEQUENCES, (3, 1, 2), pad_id=0, multiple=4, device="cpu")
    assert len(batch.tokens_S) == 12 and batch.bounds == (0, 4, 9, 12)
    alone = pack(SEQUENCES, (2,), pad_id=0, device="cpu")
    assert alone.tokens_S.tolist() == [21, 22, 23] and alone.bounds == (0, 3) and alone.num_tokens == 0


def test_each_target_is_the_token_after_its_index():
    batch = pack(SEQUENCES, (0, 1, 2, 3), pad_id=0, device="cpu")
    assert torch.equal(batch.tokens_S[batch.index_T + 1], batch.token_ids_T)


def test_unpack_returns_each_sequence_its_own_values():
    batch = pack(SEQUENCES, (3, 1, 2), pad_id=0, device="cpu")
    values = unpack(batch.token_ids_T, batch)
    assert {row: tuple(tensor.tolist()) for row, tensor in values.items()} == {
        row: SEQUENCES[row].completion for row in (3, 1, 2)
    }
    with pytest.raises(AssertionError):
        unpack(batch.token_ids_T[:-1], batch)
