"""The scaling model against brute force and closed forms: what must be conserved, and what its limits are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from scripts.scaling import rates_with
from tools.counts import adapters, parameters
from tools.memory_plan import load
from tools.scaling import (
    Decoding,
    Hardware,
    Rates,
    Step,
    Work,
    all_reduce_s,
    continuous_seconds,
    decoding,
    engine_seconds,
    reduce_scatter_s,
    simulate,
)

pytestmark = pytest.mark.heavy

DECODE = Decoding(fixed=3.0, per_request=0.5, per_context_token=0.01, slots=1000, prompt_tokens=7.0)
CONSTANT = Rates(length_sigma=0.0)


def token_by_token(lengths: list[int], decode: Decoding) -> float:
    """The same engine, one decoding step at a time."""
    waiting, active, seconds = list(lengths), [], 0.0
    while waiting or active:
        while waiting and len(active) < decode.slots:
            active.append([waiting.pop(0), 0])
        context = sum(decode.prompt_tokens + done for _, done in active)
        seconds += decode.fixed + decode.per_request * len(active) + decode.per_context_token * context
        active = [[length, done + 1] for length, done in active if done + 1 < length]
    return seconds


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_events_equal_token_by_token(slots: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 60, size=17).tolist()
    decode = replace(DECODE, slots=slots)
    assert engine_seconds(lengths, decode) == pytest.approx(token_by_token(lengths, decode), rel=1e-12)


def test_closed_forms_of_an_engine() -> None:
    """All at once, the fixed part counts the longest completion; one after the other, all of them."""
    lengths = [5, 40, 13]
    tokens, reads = sum(lengths), sum(7 * n + n * (n - 1) / 2 for n in lengths)
    rest = 0.5 * tokens + 0.01 * reads
    assert engine_seconds(lengths, DECODE) == pytest.approx(3 * max(lengths) + rest)
    assert engine_seconds(lengths, replace(DECODE, slots=1)) == pytest.approx(3 * tokens + rest)
    assert continuous_seconds(lengths, DECODE) == pytest.approx(3 * tokens / 3 + rest)
    assert engine_seconds([9] * 4, DECODE) == pytest.approx(continuous_seconds([9] * 4, DECODE))


def test_collectives() -> None:
    assert all_reduce_s(1e9, 1, 1e9, 1e-3) == 0
    assert reduce_scatter_s(8e9, 4, 1e9, 1e-3) == pytest.approx(2e-3 + 6)
    assert all_reduce_s(1e9, 2**20, 1e9, 0.0) == pytest.approx(2.0, rel=1e-5)


def test_operations_of_a_sequence() -> None:
    _, hf = load("qwen3_8b_tp2", [])
    matrices = parameters(hf, 1) - hf.vocab_size * hf.hidden_size
    scores = (
        36 * 32 * 128 * 1000**2
    )  # layers x heads x head size x s^2, twice: queries by keys, probabilities by values
    assert Work(hf, None, recompute=False).forward(1000) == 2 * matrices * 1000 + 2 * scores
    assert Work(hf, None, recompute=False).update(1000) == pytest.approx(
        2 * (2 * matrices * 1000 + 2 * scores) + 2 * scores + 2 * parameters(hf, 1) * 1000
    )
    adapted = matrices + adapters(hf, 1, 64)
    recomputing = Work(hf, 64, recompute=True).update(1000)
    assert recomputing == pytest.approx(6 * adapted * 1000 + 8 * scores + 2 * adapters(hf, 1, 64) * 1000)


def step(gpus: int, prompts: int, rates: Rates, seed: int = 0, *overrides: str) -> Step:
    config, hf = load("qwen3_8b_tp2", list(overrides))
    return simulate(config, hf, gpus=gpus, prompts=prompts, rates=rates, rng=np.random.default_rng(seed))


def test_one_rank_with_equal_lengths_is_the_exact_sum() -> None:
    config, hf = load("qwen3_8b_tp2", [])
    hardware, rates = Hardware(), replace(CONSTANT, mixed_fraction=1.0)
    result = step(2, 1, rates)
    decode = decoding(config, hf, rates, hardware)
    read = 8 * (200 * 6000 + 6000 * 5999 / 2)
    rollout = 6000 * (decode.fixed + 8 * decode.per_request) + read * decode.per_context_token
    assert result.tokens == 8 * 6000
    assert result.stages["rollout"] == pytest.approx(rollout)
    assert result.balanced_rollout == pytest.approx(rollout)
    assert result.stages["verify"] == pytest.approx(8 / (8 * 137))
    assert result.stages["gradients"] == 0, "one replica reduces nothing"
    hidden_s = 4096 * 2 / (450e9 * 0.8)  # an all-reduce over two ranks: half of it there, half of it back
    update = 8 * Work(hf, 64, recompute=True).update(6200) / (2 * 989e12 * 0.35)
    assert result.stages["update"] == pytest.approx(update + 8 * 6200 * 36 * 6 * hidden_s)
    teacher = Work(hf, None, recompute=False).forward(200 + 6000 + 1024) / (2 * 989e12 * 0.45)
    assert result.stages["teacher"] == pytest.approx(teacher + 7224 * 36 * 2 * hidden_s)
    assert result.seconds == pytest.approx(sum(result.stages.values()))


def test_limits_of_weak_and_strong_scaling_without_stragglers() -> None:
    rates = replace(CONSTANT, mixed_fraction=1.0)
    few, many = step(16, 64, rates), step(256, 1024, rates)
    for stage in ("rollout", "verify", "teacher", "update", "refit"):
        assert many.stages[stage] == pytest.approx(few.stages[stage]), "each rank does the same as before"
    assert many.stages["gradients"] < 2 * few.stages["gradients"], "bounded: twice the bytes over the bandwidth"
    halved = step(32, 64, rates)
    assert halved.stages["update"] == pytest.approx(few.stages["update"] / 2)
    config, hf = load("qwen3_8b_tp2", [])
    fixed = decoding(config, hf, rates, Hardware()).fixed * 6000
    assert halved.stages["rollout"] - fixed == pytest.approx((few.stages["rollout"] - fixed) / 2), "but not its floor"


def test_tokens_are_conserved_and_the_longest_completion_sets_the_rollout() -> None:
    rates = Rates()
    assert len({step(gpus, 64, rates).tokens for gpus in (2, 8, 32, 128)}) == 1, "the same draws, split otherwise"
    rollouts = [
        np.mean([step(gpus, 2 * gpus, rates, seed).stages["rollout"] for seed in range(5)]) for gpus in (2, 16, 128)
    ]
    assert rollouts[0] < rollouts[1] < rollouts[2], "a maximum over more engines"
    result = step(16, 64, rates)
    assert result.stages["rollout"] > result.balanced_rollout
    assert result.asynchronous < result.seconds


def test_an_uneven_split_and_an_unknown_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        step(16, 3, Rates())
    with pytest.raises(ValueError, match="'speed' is no rate"):
        rates_with(["speed=3"])
    assert rates_with(["decode_fixed_s=0.009"]).decode_fixed_s == 0.009
    config, hf = load("qwen3_8b_tp2", [])
    assert math.isclose(decoding(config, hf, Rates(decode_fixed_s=0.009), Hardware()).fixed, 0.009)
