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
    kl_clip: float = 0.05
    """tau, the cap on each summand p_T (log p_T - log p_S) (OPSD)."""
    prefix_tokens: int = 1024
    """K, the distilled positions at the start of a completion (ours; OPSD distills 1024 to 2048)."""
    frontier: str = "dynamic"
    """dynamic: p(1 - p); fixed: 1 for every group (both: paper)."""
    witness: str = "own"
    """What the teacher reads beside the problem. own: a correct completion of the same group (paper); solution: the
    reference solution (OPSD). Two controls (ours): shuffled: a correct completion of another prompt; none: nothing, so
    that the term is a clipped KL to the teacher's policy as it is deployed."""
    distilled: str = "wrong"
    """Distilled completions. wrong: one of each mixed group (paper); every_wrong: all wrong ones of each mixed group
    (ours); every: all completions of all groups (OPSD). Several share their group's weight equally."""
    correct_selector: str = "shortest"
    """Which correct completion is the witness: shortest, longest, max_logprob or min_logprob, by the sampler's mean
    log-prob of a token (paper)."""
    wrong_selector: str = "longest"
    """Which wrong completion is distilled: likewise (paper)."""
    teacher: str = "fixed"
    """The teacher's weights. fixed: the initial ones (paper); live: the current ones; ema: a moving average (OPSD)."""
    ema_decay: float = 0.999
    """Share of the average that stays at each optimizer step, for teacher=ema (OPSD)."""
    divergence: str = "forward_kl"
    """From teacher to student: forward_kl (paper), reverse_kl or jsd (GKD, arXiv 2306.13649)."""
    contrast: float = 0.0
    """Above 0, a second teacher reads the group's selected wrong completion as if it were correct, and contrast times
    the loss against it is subtracted (ours)."""

    # The surrogate (paper eq. 2). What follows ratio_clip_low and ratio_clip_high is off by default.
    ratio_clip_low: float = 0.2
    """The surrogate keeps the ratio above 1 - ratio_clip_low (ours)."""
    ratio_clip_high: float = 0.2
    """The surrogate keeps the ratio below 1 + ratio_clip_high (ours; a larger one is DAPO's clip-higher, arXiv
    2503.14476, there 0.28)."""
    ratio_clip_dual: float = 0.0
    """Above 1, a bound on the ratio of tokens with a negative advantage too (dual-clip PPO, arXiv 1912.09729, there 3);
    0 is off."""
    advantage: str = "std"
    """std: divided by the group's standard deviation (paper eq. 1); mean: not divided (Dr. GRPO, arXiv 2503.20783);
    leave_one_out: against the mean of the others (RLOO, arXiv 2402.14740)."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation of a group's rewards (ours)."""
    normalization: str = "token"
    """What the loss averages over. token: the batch's tokens (paper eq. 2; DAPO); sequence: each completion's tokens,
    then completions (GRPO, arXiv 2402.03300); constant: rollout.max_new_tokens, then completions (Dr. GRPO)."""
    importance_cap: float | None = None
    """Above 0, weigh tokens by min(pi_old / pi_sampler, importance_cap) (truncated importance sampling: Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", there 2); 0 is off. Null takes
    IMPORTANCE_CAPS of config.py: off in float32, 2 in bfloat16 and float16 (ours)."""
    refills: int = 0
    """How often a step may sample other prompts in the place of its uniform groups, which it drops (dynamic sampling of
    DAPO); what is still missing then is filled with uniform groups. 0 keeps every group."""
    overlong_mask: bool = False
    """Leave completions that were cut at the length limit out of the surrogate and its count (overlong filtering of
    DAPO)."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which the reward falls by up to 1 (soft overlong punishment of DAPO)."""
    reference_kl: float = 0.0
    """beta, the weight of the penalty against the reference (OPSD)."""
    reference_penalty: str = "k3"
    """Its estimator, k1, k2 or k3 (k3: GRPO, arXiv 2402.03300; all: Schulman 2020, "Approximating KL divergence")."""

    @property
    def distills(self) -> bool:
        """Whether a teacher is read at all."""
        return self.name in ("ssopd", "opsd") and self.lambda_0 > 0

    @property
    def rewards(self) -> bool:
        """Whether the surrogate is part of the loss."""
        return self.name in ("ssopd", "grpo")


SELECTORS = ("shortest", "longest", "max_logprob", "min_logprob")
CHOICES = {
    "name": ("ssopd", "grpo", "opsd", "sft"),
    "frontier": ("dynamic", "fixed"),
    "witness": ("own", "solution", "shuffled", "none"),
    "distilled": ("wrong", "every_wrong", "every"),
    "correct_selector": SELECTORS,
    "wrong_selector": SELECTORS,
    "teacher": ("fixed", "live", "ema"),
    "divergence": ("forward_kl", "reverse_kl", "jsd"),
    "advantage": ("std", "mean", "leave_one_out"),
    "normalization": ("token", "sequence", "constant"),
    "reference_penalty": ("k1", "k2", "k3"),
}
"""What the fields with a choice may be."""
