"""Reward completions with 1 or 0 by comparing them with gold answers, by math-verify in processes that can be killed.

String code decides most answers here. The rest go to the workers of a `GradingPool`, one answer at a time. Every answer
gets a `Verdict`. See `docs/verifier.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_ssopd.rollout import answers
from nemo_ssopd.rollout.grading_pool import GradingPool

REASONS = {
    "correct": "equal to the gold answer: the only reason with reward 1",
    "wrong": "not equal to the gold answer, or not mathematics",
    "no_box": r"no balanced, non-empty \boxed{...}",
    "too_long": "every box holds more than 512 characters",
    "refused": "control characters, a dangerous form (huge powers, deep nesting), or a restated sum or integral",
    "timeout": "ran past the CPU limit or the wall-clock deadline; the process was killed",
    "memory": "ran out of the address space it may use",
    "crash": "the process died on this answer",
}


@dataclass(frozen=True)
class Verdict:
    r"""The reward of one completion, the reason for it, and the answer that was read.

    Example: by math-verify, the completion `so \boxed{\frac{2}{4}}` against the gold `0.5` gives
    `Verdict(reward=1.0, reason="correct", answer="\\frac{2}{4}")`.
    """

    reward: float
    reason: str  # from math-verify, a key of REASONS
    answer: str | None  # the text of the last balanced box, None when there is none


class MathVerifier:
    """A grader of answers by a pool of `workers` processes. Any thread may call it.

    timeout_s: wall-clock seconds one answer may take before its process is killed.
    cpu_s: CPU seconds one answer may take. Normally this limit ends a hang.
    memory_gb: address space of one process.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_gb: float = 3.0, cpu_s: float = 1.5) -> None:
        self._pool = GradingPool("math_verify", workers=workers, timeout_s=timeout_s, memory_gb=memory_gb, cpu_s=cpu_s)

    def grade(self, completions: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """Return one verdict per completion. Equal answers to equal golds are graded once."""
        _check_texts(completions, golds)
        extracted = [answers.last_box(completion) for completion in completions]
        canonical_golds = {gold: answers.canonical(gold_text(gold)) for gold in set(golds)}
        sides = [
            answers.aligned(answers.canonical(answer), canonical_golds[gold])
            for (answer, _), gold in zip(extracted, golds, strict=True)
            if answer is not None
        ]
        reasons = {pair: answers.decide(*pair) for pair in dict.fromkeys(sides)}
        undecided = [pair for pair, reason in reasons.items() if not reason]
        reasons.update(zip(undecided, self._compare(undecided), strict=True))
        remaining = iter(sides)
        return [
            _verdict(reason if answer is None else reasons[next(remaining)], answer) for answer, reason in extracted
        ]

    def check_golds(self, golds: Sequence[str]) -> list[int]:
        """Return the indices of golds that sympy cannot use: only an answer with the same spelling can be correct."""
        _check_texts(golds, golds)
        sides = [answers.canonical(gold_text(gold)) for gold in golds]
        to_parse = [side for side in dict.fromkeys(sides) if side and not answers.is_dangerous(side)]
        reasons = self._compare([(side, side) for side in to_parse])
        usable = {side for side, reason in zip(to_parse, reasons, strict=True) if reason == "correct"}
        return [index for index, side in enumerate(sides) if side not in usable]

    def close(self) -> None:
        """End the processes, after the answers of other threads are graded."""
        self._pool.close()

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Return the reason for each pair of an answer and a gold, by math-verify."""
        return [reply["reason"] for reply in self._pool.ask([{"answer": a, "gold": g} for a, g in pairs])]


def gold_text(gold: str) -> str:
    r"""Return the gold without a surrounding `\boxed{}`, if the dataset kept one."""
    return answers.last_box(gold)[0] or gold


def _verdict(reason: str, answer: str | None) -> Verdict:
    return Verdict(reward=1.0 if reason == "correct" else 0.0, reason=reason, answer=answer)


def _check_texts(completions: Sequence[str], golds: Sequence[str]) -> None:
    for name, texts in (("completions", completions), ("golds", golds)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one string, {texts[:40]!r}; pass a list of strings")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{index}] is {text!r}, a {type(text).__name__}; pass strings")
    if len(completions) != len(golds):
        raise ValueError(f"completions has {len(completions)} items and golds has {len(golds)}; pass one gold each")
    for index, gold in enumerate(golds):
        if not gold.strip():
            raise ValueError(f"golds[{index}] is {gold!r}; drop the problems that have no answer")
