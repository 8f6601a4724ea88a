"""The settings of the objective: which terms it has, and what each of them is made of.

The origin of a default stands next to it: (paper), (OPSD: the public implementation whose set-up the paper follows,
arXiv 2601.18734), (ours), or the project or paper that an option comes from. `docs/recipes.md` has the four recipes on
one page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nemo_ssopd.config.checks import check_function_name, checked, require


class Recipe(StrEnum):
    """The terms of the loss."""

    ssopd = "ssopd"
    """Surrogate and distillation."""
    grpo = "grpo"
    """Surrogate."""
    opsd = "opsd"
    """Distillation."""
    sft = "sft"
    """Cross-entropy on written solutions."""


class Frontier(StrEnum):
    """How much a group of accuracy p weighs."""

    dynamic = "dynamic"
    """p(1 - p) (paper)."""
    fixed = "fixed"
    """1 (paper, ablation; OPSD)."""


class Witness(StrEnum):
    """What the teacher reads in addition to the problem."""

    own = "own"
    """A correct completion of the same group (paper)."""
    solution = "solution"
    """The reference solution (OPSD)."""
    shuffled = "shuffled"
    """A control (ours): a correct completion of another prompt."""
    none = "none"
    """A control (ours): nothing, so that the term is a clipped KL to the teacher's policy as it is deployed."""


class Distilled(StrEnum):
    """Completions that are distilled. Several of one group share its weight equally."""

    wrong = "wrong"
    """One of each mixed group (paper)."""
    every_wrong = "every_wrong"
    """All wrong ones of each mixed group (ours)."""
    every = "every"
    """All completions of all groups (OPSD)."""


class Selector(StrEnum):
    """Which of several completions: by tokens, or by the sampler's mean log-prob of a token."""

    shortest = "shortest"
    longest = "longest"
    max_logprob = "max_logprob"
    min_logprob = "min_logprob"


class Teacher(StrEnum):
    """The teacher's weights."""

    fixed = "fixed"
    """The initial ones (paper)."""
    live = "live"
    """The current ones (OPSD)."""
    ema = "ema"
    """A moving average (OPSD)."""


class DivergenceKind(StrEnum):
    """From teacher to student (the others than forward_kl: GKD, arXiv 2306.13649)."""

    forward_kl = "forward_kl"
    """(paper)"""
    reverse_kl = "reverse_kl"
    jsd = "jsd"


class Advantage(StrEnum):
    """How rewards of a group become advantages."""

    std = "std"
    """Divided by the group's standard deviation (paper eq. 1)."""
    mean = "mean"
    """Not divided (Dr. GRPO, arXiv 2503.20783)."""
    leave_one_out = "leave_one_out"
    """Against the mean of the others (RLOO, arXiv 2402.14740)."""


class Normalization(StrEnum):
    """What the token loss averages over."""

    token = "token"
    """The batch's tokens (paper eq. 2; DAPO)."""
    sequence = "sequence"
    """Each completion's tokens, then completions (GRPO, arXiv 2402.03300)."""
    constant = "constant"
    """rollout.max_new_tokens, then completions (Dr. GRPO)."""


class Penalty(StrEnum):
    """Estimators of the KL to the reference (k3: GRPO; all: Schulman 2020, "Approximating KL divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective: GRPO's clipped surrogate, plus the distillation of a teacher into own completions."""

    name: Recipe = Recipe.ssopd

    # The distillation: how much of it, from whom, into what.
    lambda_0: float = checked(1.0, at_least=0)
    """Weight of the distillation of one prompt, lambda_0 times its frontier weight (ours; paper eq. 12)."""
    kl_clip: float = checked(0.05, above=0)
    """tau, the cap on each summand p_T (log p_T - log p_S) (OPSD)."""
    prefix_tokens: int = checked(1024, at_least=1)
    """K, the distilled positions at the start of a completion (ours; OPSD distills 1024 to 2048)."""
    frontier: Frontier = Frontier.dynamic
    witness: Witness = Witness.own
    distilled: Distilled = Distilled.wrong
    correct_selector: Selector = Selector.shortest
    """Which correct completion is the witness (paper)."""
    wrong_selector: Selector = Selector.longest
    """Which wrong completion is distilled (paper)."""
    teacher: Teacher = Teacher.fixed
    ema_decay: float = checked(0.999, at_least=0, below=1)
    """Share of the average that stays at each optimizer step, for teacher=ema (OPSD)."""
    divergence: DivergenceKind = DivergenceKind.forward_kl
    contrast: float = checked(0.0, at_least=0)
    """Above 0, a second teacher reads the group's selected wrong completion as if it were correct, and contrast times
    the loss against it is subtracted (after RLCSD, arXiv 2606.11709)."""
    aux_losses: list[str] = field(default_factory=list)
    """More auxiliary losses, each package.module:function of your own: see docs/auxiliary_losses.md."""

    # The surrogate (paper eq. 2). The options after ratio_clip_low and ratio_clip_high are off by default.
    ratio_clip_low: float = checked(0.2, at_least=0)
    """The surrogate keeps the ratio above 1 - ratio_clip_low (ours)."""
    ratio_clip_high: float = checked(0.2, at_least=0)
    """The surrogate keeps the ratio below 1 + ratio_clip_high (ours; a larger one is DAPO's clip-higher, arXiv
    2503.14476, there 0.28)."""
    ratio_clip_dual: float = checked(0.0, at_least=0)
    """Above 1, a bound on the ratio of tokens with a negative advantage too (dual-clip PPO, arXiv 1912.09729, there 3);
    0 is off."""
    advantage: Advantage = Advantage.std
    advantage_eps: float = checked(1e-4, at_least=0)
    """Added to the standard deviation of a group's rewards (ours)."""
    normalization: Normalization = Normalization.token
    importance_cap: float | None = checked(None, at_least=0)
    """Above 0, weigh tokens by min(pi_old / pi_sampler, importance_cap) (truncated importance sampling: Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", there 2); 0 is off. Null takes
    IMPORTANCE_CAPS: off in float32, 2 in bfloat16 and float16 (ours)."""
    refills: int = checked(0, at_least=0)
    """How often a step may sample other prompts in the place of its uniform groups, which it drops (dynamic sampling of
    DAPO); what is still missing then is filled with uniform groups. 0 keeps every group."""
    overlong_mask: bool = False
    """Leave completions that were cut at the length limit out of the surrogate and its count (overlong filtering of
    DAPO)."""
    overlong_buffer: int = checked(0, at_least=0)
    """Tokens before the length limit over which the reward falls by up to 1 (soft overlong punishment of DAPO)."""
    reference_kl: float = checked(0.0, at_least=0)
    """beta, the weight of the penalty against the reference (OPSD)."""
    reference_penalty: Penalty = Penalty.k3

    @property
    def distills(self) -> bool:
        """Whether a teacher is read at all."""
        return self.name in (Recipe.ssopd, Recipe.opsd) and self.lambda_0 > 0

    @property
    def rewards(self) -> bool:
        """Whether the surrogate is part of the loss."""
        return self.name in (Recipe.ssopd, Recipe.grpo)

    def check(self) -> None:
        """Check what ranges alone do not say."""
        for name in self.aux_losses:
            check_function_name("algorithm.aux_losses", name)
        require(
            self.ratio_clip_dual == 0 or self.ratio_clip_dual > 1,
            f"algorithm.ratio_clip_dual={self.ratio_clip_dual}: give a bound on the ratio above 1, or 0 for none",
        )
