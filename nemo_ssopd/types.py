"""Frozen records that the stages of a training step pass on.

Tensor names end in shape letters: S tokens of a micro-batch, its sequences laid end to end, T completion tokens among
them, K prefix positions, H hidden size, V vocabulary, W a rank's shard of V.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """A problem. `solution` is a written-out reference solution, used by the SFT and OPSD recipes only.

    `columns` is the dataset's row as JSON text, kept only when the run has a reward function, which reads it. Only then
    may `answer` be empty.

    >>> Prompt(id="train-7", problem="6*3 8*6", answer="88", solution="<think>6*3=18 8*6=48</think>\\\\boxed{88}")
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None
    columns: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """Return the columns plus `id`, `problem`, `answer` and `solution`, which replace columns unless empty.

        >>> Prompt("train-7", "6*3", "8", columns='{"question": "6*3", "answer": 8, "level": 2}').row
        {'id': 'train-7', 'problem': '6*3', 'answer': '8', 'solution': None, 'question': '6*3', 'level': 2}
        """
        own = {"id": self.id, "problem": self.problem, "answer": self.answer, "solution": self.solution}
        return own | json.loads(self.columns or "{}") | {name: value for name, value in own.items() if value}


@dataclass(frozen=True)
class RenderedPrompt:
    """A problem and the tokens that the student reads.

    >>> RenderedPrompt(prompt=Prompt("eval-1", "6*3", "8"), tokens=(1, 5, 9))
    """

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class SentTensor:
    """A sample of a tensor that was sent to the engine, for comparison with what the engine holds.

    For a matrix it holds columns `first`, `first` + `step` and so on; for a vector, all values.

    >>> SentTensor(name="model.layers.0.mlp.up_proj.weight", shape=(512, 1024), first=5, step=64, values=columns)
    """

    name: str
    shape: tuple[int, ...]
    first: int
    step: int
    values: torch.Tensor

    is_vocabulary: bool = False
    """True for the embedding and the output layer, which have a row for each token."""


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
    """A completion as the engine returned it.

    `logprobs` are those of the sampler, at the sampling temperature, one per token; `finish_reason` is "stop"
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
    """A graded completion of a training prompt. `answer` is the text of its last box, or None.

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
    threshold: float = 0.5
    """Reward above which a completion is correct."""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.reward for rollout in self.rollouts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the completion lengths, in tokens."""
        return tuple(rollout.sequence.completion_length for rollout in self.rollouts)


@dataclass(frozen=True)
class Pair:
    """Indices of two completions of a group: the witness `y+`, and `y-`, the attempt to correct.

    >>> Pair(correct=2, wrong=0)
    """

    correct: int
    wrong: int


@dataclass(frozen=True)
class TeacherContext:
    """The text that the teacher reads to correct one completion, and the weight of that completion's loss.

    `sequence` is the teacher's prompt followed by the completion's first K tokens. `contrast` is the same for a second
    teacher, whose loss is subtracted.

    >>> TeacherContext(TokenSequence((1, 5, 9, 7, 9, 2), prompt_length=4), weight=0.1875)
    """

    sequence: TokenSequence
    weight: float
    contrast: TokenSequence | None = None


@dataclass(frozen=True)
class TrainExample:
    """A sequence to train on, with everything that the losses need to know about it.

    A rank's examples form one list, the input of scoring, the teacher's pass, packing and the update. An example
    does not depend on its place in that list.

    >>> TrainExample(TokenSequence((1, 5, 9, 2), 2), token_weights=(1.0, 1.0), group=0, advantage=0.5)
    """

    sequence: TokenSequence
    token_weights: tuple[float, ...]
    """One weight per completion token; 0 leaves the token out of the token loss and of its denominator."""
    group: int
    """Label shared by the completions of one prompt."""
    advantage: float = 0.0
    sampler_logprobs: tuple[float, ...] | None = None
    """Log-probs from the engine, one per completion token."""
    teacher: TeacherContext | None = None
    """The teacher's context; None if this completion is not distilled."""

    # Results of model passes without gradients; None before the pass, or if the recipe does not need it.
    old_logprobs: torch.Tensor | None = None
    """[completion length], log-probs under the policy that sampled. None means that it has not changed since."""
    reference_logprobs: torch.Tensor | None = None
    """[completion length], log-probs under the initial policy."""
    teacher_states: torch.Tensor | None = None
    """[K, H], the teacher's final hidden states that predict the first K completion tokens."""
    contrast_states: torch.Tensor | None = None
    """[K, H], those of the contrast teacher."""

    def __post_init__(self) -> None:
        assert len(self.token_weights) == self.sequence.completion_length, (len(self.token_weights), self.sequence)


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: sequences laid end to end, and their completion tokens laid end to end.

    Sequence `rows[b]` of the list that was packed owns S-range bounds[b] : bounds[b + 1] and T-range
    offsets[b] : offsets[b + 1]. Padding after the last one has its own bounds and no offsets. `starts` holds the
    bounds on the device, int32. Completion token t is `token_ids_T[t]`; position `index_T[t]` of the hidden states
    [S, H] predicts it.

    >>> PackedBatch((4, 0), tokens_S, bounds=(0, 3, 9), starts=..., index_T=..., token_ids_T=..., offsets=(0, 2, 5))
    """

    rows: tuple[int, ...]
    tokens_S: torch.Tensor
    bounds: tuple[int, ...]
    starts: torch.Tensor
    index_T: torch.Tensor
    token_ids_T: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]
