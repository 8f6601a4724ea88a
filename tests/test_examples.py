"""Training examples from graded groups, and the denominators of one step on two data-parallel ranks, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_ssopd.algo.losses import Distillation
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig, ParallelConfig, RolloutConfig
from nemo_ssopd.data.demo import CorpusExample
from nemo_ssopd.data.templates import load_tokenizer
from nemo_ssopd.examples import rollout_examples, sft_examples
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.types import Completion, Prompt, Rollout, RolloutGroup, TokenSequence, TrainExample
from tests.distributed import run_distributed

pytestmark = pytest.mark.heavy

DP2 = ParallelConfig(world_size=2)
CONFIG = Config(
    data=DataConfig(),
    algorithm=AlgorithmConfig(name="grpo", advantage="mean", overlong_mask=True),
    rollout=RolloutConfig(max_new_tokens=8),
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


def examples_of(groups: list[RolloutGroup]) -> list[TrainExample]:
    tokenizer: Any = None  # only a teacher's context needs one
    examples, metrics = rollout_examples(groups, CONFIG, tokenizer, max_length=100)
    assert metrics == {}
    return examples


def test_each_completion_is_an_example_with_its_own_advantage() -> None:
    """Advantages are r - mean. The second completion was cut off: its place stays, its tokens do not count."""
    examples = examples_of(GROUPS[0])
    assert [example.sequence for example in examples] == [r.sequence for group in GROUPS[0] for r in group.rollouts]
    assert [example.advantage for example in examples] == [0.5, -0.5, 0.0, 0.0, -0.5, 0.5, 0.0, 0.0]
    assert [example.group for example in examples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [example.token_weights for example in examples] == [
        (float(i != 1),) * length for i, length in enumerate((2, 8, 4, 1, 3, 5, 1, 1))
    ]
    assert [example.sampler_logprobs[0] for example in examples] == pytest.approx([0.0, -0.1] * 4)
    assert all(example.teacher is None and example.old_logprobs is None for example in examples)


def counts_of_rank(parallel: ParallelConfig, first: int, last: int) -> list[float]:
    runtime = initialize(parallel, seed=1)
    aux = Distillation(0.05, 1.0, 4, 10, None)
    examples = examples_of(GROUPS[runtime.layout.data.rank][first:last])
    policy: Any = SimpleNamespace(runtime=runtime)
    counts = MegatronPolicy._denominators(policy, examples, [aux])
    return [float(count) for count in (counts.tokens, counts.completions, *counts.aux)]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 4, (17 + 32, 7 + 8, 8)), (0, 2, (7 + 16, 3 + 4, 4)), (2, 4, (10 + 16, 4 + 4, 4)), (0, 0, (1, 1, 1))],
)
def test_denominators_are_those_of_all_ranks(first: int, last: int, expected: tuple[int, ...]) -> None:
    """Tokens and completions without the one that was cut off, and prompts. Nothing to count is 1, which divides 0."""
    for counts in run_distributed(counts_of_rank, 2, DP2, first, last):
        assert counts == list(expected)


def test_written_solutions_weigh_their_targets() -> None:
    tokenizer = load_tokenizer("assets/demo_model")
    data = replace(DataConfig(), student_template="{problem}")
    solved = [Prompt("p", "3*4", "12", solution="12"), CorpusExample("2*2", "4 4", masked_spans=((0, 1),))]
    (plain, masked) = sft_examples(solved, data, tokenizer)
    assert tokenizer.decode(plain.sequence.completion) == f"12{tokenizer.eos_token}"
    assert set(plain.token_weights) == {1.0}
    # Its first character is read, so the completion starts behind it; the rest is learned.
    assert tokenizer.decode(masked.sequence.completion).endswith(f"4{tokenizer.eos_token}")
    assert masked.sequence.prompt_length > plain.sequence.prompt_length - 1
    assert (plain.group, masked.group) == (0, 1)
