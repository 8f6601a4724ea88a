"""The frozen records that the stages of one training step hand to each other.

Tensor names end in shape letters: S the tokens of a micro-batch, its sequences laid end to end, T the completion tokens
among them, K prefix positions, H hidden size, V vocabulary, W a rank's shard of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """One problem. `solution` is a written-out reference solution, used by the SFT and OPSD recipes only.

    >>> Prompt(id="train-7", problem="6*3 8*6", answer="88", solution="<think>6*3=18 8*6=48</think>\\\\boxed{88}")
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None


@dataclass(frozen=True)
class RenderedPrompt:
    """A problem and the tokens that the student reads.

    >>> RenderedPrompt(prompt=Prompt("eval-1", "6*3", "8"), tokens=(1, 5, 9))
    """

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class SentTensor:
    """What is kept of a tensor that went to the engine, to compare it with what the engine holds.

    Of a matrix these are columns `first`, `first` + `step` and so on; of a vector, all of it.

    >>> SentTensor(name="model.layers.0.mlp.up_proj.weight", shape=(512, 1024), first=5, step=64, values=columns)
    """

    name: str
    shape: tuple[int, ...]
    first: int
    step: int
    values: torch.Tensor

    @property
    def is_vocabulary(self) -> bool:
        return self.name in ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class TokenSequence:
    """Prompt tokens followed by completion tokens; losses and log-probs are over the completion only.

    >>> TokenSequence(tokens=(1, 5, 9, 2), prompt_length=2).completion
    (9, 2)
    """

    tokens: tuple[int, ...]
    prompt_length: int

    def __post_init__(self) -> None:
        assert 0 < self.prompt_length <= len(self.tokens), (self.prompt_length, len(self.tokens))

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.prompt_length]

    @property
    def completion(self) -> tuple[int, ...]:
        return self.tokens[self.prompt_length :]

    @property
    def completion_length(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Completion:
    """What the engine returned for one request.

    `logprobs` are the sampler's own, at the sampling temperature, one per token; `finish_reason` is "stop"
    when the model ended its turn (the stop token is then the last of `tokens`) and "length" at the limit.

    >>> Completion(tokens=(9, 2), logprobs=(-0.1, -0.02), text="88", finish_reason="stop", policy_version=3)
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    policy_version: int


@dataclass(frozen=True)
class Rollout:
    """A completion of a training prompt, graded. `answer` is the text of its last box, None without one.

    >>> Rollout(TokenSequence((1, 5, 9, 2), 2), completion, reward=1.0, reason="correct", answer="88")
    """

    sequence: TokenSequence
    completion: Completion
    reward: float
    reason: str
    answer: str | None


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one prompt.

    >>> RolloutGroup(prompt, rollouts).rewards
    (1.0, 0.0, 0.0, 1.0)
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.reward for rollout in self.rollouts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Completion lengths in tokens."""
        return tuple(rollout.sequence.completion_length for rollout in self.rollouts)


@dataclass(frozen=True)
class Pair:
    """Indices inside one group: the witness `y+` and the attempt to repair `y-`.

    >>> Pair(correct=2, wrong=0)
    """

    correct: int
    wrong: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: sequences laid end to end, and so are their completion tokens.

    Row `rows[b]` of the batch owns S-range bounds[b] : bounds[b + 1] and T-range offsets[b] : offsets[b + 1]. Padding
    behind the last one has bounds of its own and no offsets. `starts` holds the bounds on the device, int32. Completion
    token t is `targets_T[t]`; it is predicted by position `index_T[t]` of the hidden states [S, H].

    >>> PackedBatch((4, 0), tokens_S, bounds=(0, 3, 9), starts=..., index_T=..., targets_T=..., offsets=(0, 2, 5))
    """

    rows: tuple[int, ...]
    tokens_S: torch.Tensor
    bounds: tuple[int, ...]
    starts: torch.Tensor
    index_T: torch.Tensor
    targets_T: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]


@dataclass(frozen=True)
class StepCounts:
    """The global denominators of one optimizer step, over all data-parallel ranks and micro-batches.

    >>> StepCounts(tokens=5213, prompts=32)
    """

    tokens: int
    prompts: int
    completions: int = 0
    """Those that the token loss counts; needed only where it is averaged over completions."""


@dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step trains on, on one data-parallel rank: parallel tuples, one entry per sequence.

    `weights` has one value per completion token: the advantage for GRPO, 1 or 0 for supervised targets.
    The log-prob tuples hold one [completion length] tensor per sequence, or are None where the recipe has none;
    `old_logprobs` None means that the policy has not moved since sampling. `scales` has a factor for the token losses
    of each sequence; None is 1 for all.

    >>> TrainBatch(sequences=(TokenSequence((1, 5, 9, 2), 2),), weights=((0.5, 0.5),), counts=StepCounts(2, 1))
    """

    sequences: tuple[TokenSequence, ...]
    weights: tuple[tuple[float, ...], ...]
    counts: StepCounts
    old_logprobs: tuple[torch.Tensor, ...] | None = None
    reference_logprobs: tuple[torch.Tensor, ...] | None = None
    sampler_logprobs: tuple[torch.Tensor, ...] | None = None
    scales: tuple[float, ...] | None = None
