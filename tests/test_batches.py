"""What one optimizer step minimises, written out by hand for two data-parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ssopd.batches import make_batches
from nemo_ssopd.config.run import AlgorithmConfig, Config, DataConfig, ParallelConfig, RolloutConfig, TrainerConfig
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.types import Completion, Prompt, Rollout, RolloutGroup, TokenSequence
from tests.distributed import run_distributed

DP2 = ParallelConfig(world_size=2)
CONFIG = Config(
    data=DataConfig(),
    algorithm=AlgorithmConfig(name="grpo", advantage="mean", overlong_mask=True, normalization="sequence"),
    rollout=RolloutConfig(max_new_tokens=8),
    trainer=TrainerConfig(updates_per_step=1),
)


def group(name: str, *rollouts: tuple[float, int, str]) -> RolloutGroup:
    """(reward, length, finish reason) of each completion; its tokens and log-probs say which it is."""
    made = []
    for i, (reward, length, reason) in enumerate(rollouts):
        completion = Completion((i,) * length, (-0.1 * i,) * length, "", reason, 0)
        made.append(Rollout(TokenSequence((7, 8, *completion.tokens), 2), completion, reward, "", None))
    return RolloutGroup(Prompt(name, name, "8"), tuple(made))


GROUPS = {
    0: [
        group("a", (1.0, 2, "stop"), (0.0, 8, "length")),
        group("b", (0.0, 4, "stop"), (0.0, 1, "stop")),
        group("c", (0.0, 3, "stop"), (1.0, 5, "stop")),
        group("d", (1.0, 1, "stop"), (1.0, 1, "stop")),
    ],
    1: [group(name, (0.0, 6, "stop"), (1.0, 2, "stop")) for name in "efgh"],
}


def batches_of_rank(parallel: ParallelConfig, updates: int) -> list[dict[str, Any]]:
    runtime = initialize(parallel, seed=1)
    config = replace(CONFIG, parallel=parallel, trainer=replace(CONFIG.trainer, updates_per_step=updates))
    scored = SimpleNamespace(runtime=runtime, logprobs=lambda sequences: tuple(len(s.tokens) for s in sequences))
    made = make_batches(GROUPS[runtime.dp_rank], scored, config)
    return [
        {
            "groups": [group.prompt.id for group in part],
            "lengths": [sequence.completion_length for sequence in batch.sequences],
            "weights": batch.weights,
            "counts": (batch.counts.tokens, batch.counts.prompts, batch.counts.completions),
            "scales": batch.scales,
            "sampler": [float(logprobs[0]) for logprobs in batch.sampler_logprobs],
            "old": batch.old_logprobs,
        }
        for part, batch in made
    ]


@pytest.fixture(scope="module", params=[1, 2])
def made(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    return run_distributed(batches_of_rank, 2, DP2, request.param)


def test_groups_stay_in_order_and_each_completion_keeps_its_own(made) -> None:
    """Advantages are r - mean; rank 0's second completion was cut off, and its place stays."""
    first = [batch for batch in made[0]]
    flat = {
        key: [value for batch in first for value in batch[key]] for key in ("groups", "lengths", "weights", "sampler")
    }
    assert flat["groups"] == ["a", "b", "c", "d"]
    assert flat["lengths"] == [2, 8, 4, 1, 3, 5, 1, 1]
    assert [weights[0] for weights in flat["weights"]] == [0.5, -0.5, 0.0, 0.0, -0.5, 0.5, 0.0, 0.0]
    assert [len(weights) for weights in flat["weights"]] == flat["lengths"]
    assert flat["sampler"] == pytest.approx([0.0, -0.1] * 4)


def test_denominators_are_those_of_all_ranks(made) -> None:
    """Tokens and completions without the one that was cut off; each update has its own."""
    one_update = [(17 + 32, 8, 7 + 8)]
    two_updates = [(7 + 16, 4, 3 + 4), (10 + 16, 4, 4 + 4)]
    for rank in made:
        assert [batch["counts"] for batch in rank] == (one_update if len(rank) == 1 else two_updates)


def test_tokens_of_a_sequence_share_it(made) -> None:
    """tokens / completions / length: summed over tokens and divided by `tokens`, each completion counts alike."""
    for batch in made[0]:
        tokens, _, completions = batch["counts"]
        expected = [tokens / completions / length for length in batch["lengths"]]
        if "a" in batch["groups"]:
            expected[1] = 0.0
        torch.testing.assert_close(torch.tensor(batch["scales"]), torch.tensor(expected))


def test_old_log_probs_are_scored_only_when_the_policy_will_have_moved(made) -> None:
    for batch in made[0]:
        assert batch["old"] == (None if len(made[0]) == 1 else tuple(2 + length for length in batch["lengths"]))
