"""Generate and grade completions of prompts, for training and for evaluation.

Rank agreement: a tensor-parallel group works on the same prompts. Its engines divide the prompts among them. Then every
rank holds all completions, and the first rank grades them and broadcasts the verdicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nemo_ssopd.rollout.graders import Grader
from nemo_ssopd.rollout.verifier import Verdict
from nemo_ssopd.types import Completion, Prompt

if TYPE_CHECKING:  # vLLM takes many seconds to import, and code that only reads samples does not need it
    from nemo_ssopd.rollout.engine import RolloutEngine


@dataclass(frozen=True)
class Sampling:
    """The sampling options of completions. Training uses the temperature alone: the policy ratio stays unbiased.

    >>> Sampling(temperature=1.1, max_new_tokens=16000)
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def request_seed(*parts: object) -> int:
    """Return the seed of one request, computed from what identifies it: the same on every rank and after a restart.

    >>> request_seed(1, "train", 17, "p-3", 0) == request_seed(1, "train", 17, "p-3", 0)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1  # a non-negative signed 32-bit integer: every vLLM version takes it


class RolloutCollector:
    """The engines and the grader of one tensor-parallel group, on each of its ranks.

    `grader` is None on all ranks of the group except the first.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        grader: Grader | None,
        tokenizer: Any,
        *,
        stop_token_ids: tuple[int, ...],
        engine_tensor: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.engine = engine
        self._grader = grader
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._engine_tensor = engine_tensor
        self._group = group

    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Return one completion per seed for each prompt, with its text. All ranks of the group get the same list."""
        engines = self._group.size() // self._engine_tensor
        mine = range(self._group.rank() // self._engine_tensor, len(prompts), engines)
        requests = [(prompts[p], seed) for p in mine for seed in seeds[p]]
        completions = iter(
            self.engine.generate(
                [prompt for prompt, _ in requests],
                seeds=[seed for _, seed in requests],
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                stop_token_ids=self._stop_token_ids,
            )
        )
        local = {p: [self._decoded(next(completions)) for _ in seeds[p]] for p in mine}
        gathered: list[dict[int, list[Completion]]] = [{} for _ in range(self._group.size())]
        dist.all_gather_object(gathered, local, group=self._group)
        by_prompt = {p: group for part in gathered for p, group in part.items()}
        return [by_prompt[p] for p in range(len(prompts))]

    def _decoded(self, completion: Completion) -> Completion:
        return replace(completion, text=self._tokenizer.decode(completion.tokens, skip_special_tokens=True))

    def grade(self, completions: Sequence[Completion], problems: Sequence[Prompt]) -> list[Verdict]:
        """Return one verdict per completion. All ranks of the group get the same list."""
        verdicts: list[Any] = [None]
        if self._grader is not None:
            verdicts = [self._grader.grade([completion.text for completion in completions], problems)]
        dist.broadcast_object_list(verdicts, src=dist.get_global_rank(self._group, 0), group=self._group)
        return verdicts[0]

    def close(self) -> None:
        """Close the engine and the grader. Use no process group afterwards: see `RolloutEngine.close`."""
        self.engine.close()
        if self._grader is not None:
            self._grader.close()
