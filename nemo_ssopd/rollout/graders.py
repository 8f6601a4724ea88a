"""Graders, which turn completions into rewards: the protocol, one by math-verify and one by the user's function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from nemo_ssopd.algo.selection import is_correct
from nemo_ssopd.rollout.answers import last_box
from nemo_ssopd.rollout.grading_pool import GradingPool
from nemo_ssopd.rollout.verifier import MathVerifier, Verdict
from nemo_ssopd.types import Prompt

if TYPE_CHECKING:
    from nemo_ssopd.config.evaluation import EvalConfig
    from nemo_ssopd.config.run import Config

    AnyConfig = TypeVar("AnyConfig", Config, EvalConfig)


class Grader(Protocol):
    """An object that rewards completions. The first rank of each tensor-parallel group holds one."""

    def grade(self, completions: Sequence[str], problems: Sequence[Prompt]) -> list[Verdict]:
        """Return one verdict per completion, which is paired with the problem of the same index. A failure gets 0."""
        ...

    def close(self) -> None: ...


def build_grader(config: Config | EvalConfig) -> Grader:
    """Start the grader that `reward.function` asks for. ValueError when the function cannot be used."""
    limits = config.verifier
    options = {"timeout_s": limits.timeout_s, "memory_gb": limits.memory_gb, "cpu_s": limits.cpu_s}
    if config.reward.function is None:
        return MathGrader(MathVerifier(limits.workers, **options))
    pool = GradingPool("user_function", config.reward.function, workers=limits.workers, **options)
    return FunctionGrader(pool, config.reward.function, threshold=config.reward.threshold)


def check_grader(config: AnyConfig) -> None:
    """Import the user's function in one process, before anything expensive starts. ValueError when that fails."""
    if config.reward.function is not None:
        build_grader(replace(config, verifier=replace(config.verifier, workers=1))).close()


class MathGrader:
    """A grader that gives 1 when the last box equals the problem's answer, else 0."""

    def __init__(self, verifier: MathVerifier) -> None:
        self._verifier = verifier

    def grade(self, completions: Sequence[str], problems: Sequence[Prompt]) -> list[Verdict]:
        return self._verifier.grade(completions, [problem.answer for problem in problems])

    def close(self) -> None:
        self._verifier.close()


class FunctionGrader:
    """A grader that gives what the user's function returns. The answer, which votes in maj@k, is the last box."""

    def __init__(self, pool: GradingPool, function: str, *, threshold: float) -> None:
        self._pool, self._threshold = pool, threshold
        try:
            pool.wait_until_ready()
        except RuntimeError as error:
            pool.close()
            raise ValueError(f"reward.function={function!r}: {error}") from error

    def grade(self, completions: Sequence[str], problems: Sequence[Prompt]) -> list[Verdict]:
        pairs = zip(completions, problems, strict=True)
        replies = self._pool.ask([{"completion": completion, "row": problem.row} for completion, problem in pairs])
        return [
            self._verdict(reply.get("reward", 0.0), reply["reason"], completion)
            for reply, completion in zip(replies, completions, strict=True)
        ]

    def close(self) -> None:
        self._pool.close()

    def _verdict(self, reward: float, reason: str, completion: str) -> Verdict:
        passed = "correct" if is_correct(reward, self._threshold) else "wrong"
        return Verdict(reward, reason or passed, last_box(completion)[0])
