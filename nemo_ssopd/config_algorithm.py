"""The settings of the objective: which terms it has, and what each of them is made of. Part of `config.py`'s tree.

Origins stand beside the defaults, as there: (paper), (OPSD: arXiv 2601.18734), (ours), or the project or paper that an
option comes from. `docs/recipes.md` has the four recipes on one page.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective: GRPO's clipped surrogate, plus the distillation of a teacher into own completions."""

    name: str = "ssopd"
    """The terms: ssopd (surrogate and distillation), grpo (surrogate), opsd (distillation), sft (cross-entropy)."""

    # The distillation: how much of it, from whom, into what.
    lambda_0: float = 1.0
    """Weight of the distillation of one prompt, lambda_0 times its frontier weight (ours; paper eq. 12)."""
    clip: float = 0.05
    """tau, the cap on each summand p_T (log p_T - log p_S) (OPSD)."""
    prefixes: int = 1024
    """K, the distilled positions at the start of a completion (ours; OPSD distils 1024 to 2048)."""
    frontier: str = "dynamic"
    """dynamic: p(1 - p) (paper); dynamic_peak1: 4p(1 - p) (ours); sqrt: sqrt(p(1 - p)) (ours); fixed: 1 (paper)."""
    witness: str = "own"
    """What the teacher reads beside the problem. own: a correct completion of the same group (paper); solution: the
    reference solution (OPSD). Two controls (ours): shuffled: a correct completion of another prompt; none: nothing, so
    that the term is a clipped KL to the teacher's policy as it is deployed."""
    targets: str = "wrong"
    """Distilled completions. wrong: one of each mixed group (paper); every_wrong: all wrong ones of each mixed group
    (ours); every: all completions of all groups (OPSD). Several share their group's weight equally."""
    correct_selector: str = "shortest"
    """Which correct completion is the witness: shortest, longest, max_logprob or min_logprob, by the sampler's mean
    log-prob of a token (paper)."""
    wrong_selector: str = "longest"
    """Which wrong completion is distilled: likewise (paper)."""
    teacher: str = "fixed"
    """The teacher's weights. fixed: the initial ones (paper); live: the current ones; ema: a moving average (ours)."""
    ema_decay: float = 0.99
    """Share of the average that stays at each optimizer step, for teacher=ema (ours)."""

    # The surrogate (paper eq. 2).
    clip_ratio_low: float = 0.2
    """The surrogate keeps the ratio above 1 - clip_ratio_low (ours)."""
    clip_ratio_high: float = 0.2
    """The surrogate keeps the ratio below 1 + clip_ratio_high (ours)."""
    reference_kl: float = 0.0
    """beta, the weight of the k3 penalty against the reference (OPSD)."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation of a group's rewards (ours)."""

    @property
    def distils(self) -> bool:
        """Whether a teacher is read at all."""
        return self.name in ("ssopd", "opsd") and self.lambda_0 > 0

    @property
    def rewards(self) -> bool:
        """Whether the surrogate is part of the loss."""
        return self.name in ("ssopd", "grpo")


SELECTORS = ("shortest", "longest", "max_logprob", "min_logprob")
CHOICES = {
    "name": ("ssopd", "grpo", "opsd", "sft"),
    "frontier": ("dynamic", "dynamic_peak1", "sqrt", "fixed"),
    "witness": ("own", "solution", "shuffled", "none"),
    "targets": ("wrong", "every_wrong", "every"),
    "correct_selector": SELECTORS,
    "wrong_selector": SELECTORS,
    "teacher": ("fixed", "live", "ema"),
}
"""What the fields with a choice may be."""
