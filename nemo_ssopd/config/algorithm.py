"""Settings of the objective: its terms, and what each of them is made of.

The origin of a default stands next to it: (paper), (OPSD: the public implementation whose setup the paper follows,
arXiv 2601.18734), (ours), or the project or paper that an option comes from. `docs/recipes.md` shows the four recipes
on one page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nemo_ssopd.config.checks import check_function_name, checked, require


class Recipe(StrEnum):
    """The terms of the loss."""

    ssopd = "ssopd"
    """GRPO's surrogate and distillation."""
    grpo = "grpo"
    """GRPO's surrogate only."""
    opsd = "opsd"
    """Distillation only."""
    sft = "sft"
    """Cross-entropy on written solutions."""


class Frontier(StrEnum):
    """Weight of a group of accuracy p in the distillation."""

    dynamic = "dynamic"
    """p(1 - p) (paper)."""
    fixed = "fixed"
    """1 (paper, ablation; OPSD)."""


class Witness(StrEnum):
    """Text that the teacher reads in addition to the problem."""

    own = "own"
    """A correct completion of the same group (paper)."""
    solution = "solution"
    """The reference solution (OPSD)."""
    shuffled = "shuffled"
    """A control (ours): a correct completion of another prompt."""
    none = "none"
    """A control (ours): nothing. The term is then a clipped KL to the teacher's policy on the plain prompt."""


class Distilled(StrEnum):
    """Completions that are distilled. Several in one group share its weight equally."""

    wrong = "wrong"
    """One wrong completion of each mixed group (paper)."""
    every_wrong = "every_wrong"
    """All wrong completions of each mixed group (ours)."""
    every = "every"
    """All completions of all groups (OPSD)."""


class Selector(StrEnum):
    """Choice among several completions, by length in tokens or by the sampler's mean log-prob of a token."""

    shortest = "shortest"
    longest = "longest"
    max_logprob = "max_logprob"
    min_logprob = "min_logprob"


class Teacher(StrEnum):
    """Weights of the teacher."""

    fixed = "fixed"
    """The initial weights (paper)."""
    live = "live"
    """The current weights (OPSD)."""
    ema = "ema"
    """A moving average of the weights (OPSD)."""


class DivergenceKind(StrEnum):
    """Divergence between teacher and student (all except forward_kl: GKD, arXiv 2306.13649)."""

    forward_kl = "forward_kl"
    """KL from teacher to student (paper)."""
    reverse_kl = "reverse_kl"
    jsd = "jsd"


class Advantage(StrEnum):
    """Rule by which the rewards of a group become advantages."""

    std = "std"
    """Reward minus the group's mean, divided by its standard deviation (paper eq. 1)."""
    mean = "mean"
    """Reward minus the group's mean (Dr. GRPO, arXiv 2503.20783)."""
    leave_one_out = "leave_one_out"
    """Reward minus the mean of the other completions (RLOO, arXiv 2402.14740)."""


class Normalization(StrEnum):
    """Denominator of the token loss."""

    token = "token"
    """Average over the tokens of the batch (paper eq. 2; DAPO)."""
    sequence = "sequence"
    """Average over each completion's tokens, then over completions (GRPO, arXiv 2402.03300)."""
    constant = "constant"
    """Divide each completion's sum by rollout.max_new_tokens, then average over completions (Dr. GRPO)."""


class Penalty(StrEnum):
    """Estimator of the KL to the reference (k3: GRPO; all: Schulman 2020, "Approximating KL divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective: GRPO's clipped surrogate, plus the distillation of a teacher into the policy's own completions."""

    name: Recipe = Recipe.ssopd

    # The distillation: its weight, its teacher, and the completions that it changes.
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
    """Choice of the correct completion that is the witness (paper)."""
    wrong_selector: Selector = Selector.longest
    """Choice of the wrong completion that is distilled (paper)."""
    teacher: Teacher = Teacher.fixed
    ema_decay: float = checked(0.999, at_least=0, below=1)
    """Share of the average that remains at each optimizer step, for teacher=ema (OPSD)."""
    divergence: DivergenceKind = DivergenceKind.forward_kl
    contrast: float = checked(0.0, at_least=0)
    """Above 0, a second teacher reads the group's selected wrong completion as if it were correct, and contrast times
    the loss against it is subtracted (after RLCSD, arXiv 2606.11709)."""
    aux_losses: list[str] = field(default_factory=list)
    """More auxiliary losses, each a function of yours, package.module:name. See docs/auxiliary_losses.md."""

    # The surrogate (paper eq. 2). The options after ratio_clip_low and ratio_clip_high are off by default.
    ratio_clip_low: float = checked(0.2, at_least=0)
    """The surrogate keeps the ratio above 1 - ratio_clip_low (ours)."""
    ratio_clip_high: float = checked(0.2, at_least=0)
    """The surrogate keeps the ratio below 1 + ratio_clip_high (ours; a larger one is DAPO's clip-higher, arXiv
    2503.14476, there 0.28)."""
    ratio_clip_dual: float = checked(0.0, at_least=0)
    """Above 1, also a bound on the ratio of tokens with a negative advantage (dual-clip PPO, arXiv 1912.09729, there
    3); 0 disables it."""
    advantage: Advantage = Advantage.std
    advantage_eps: float = checked(1e-4, at_least=0)
    """Added to the standard deviation of a group's rewards (ours)."""
    normalization: Normalization = Normalization.token
    importance_cap: float | None = checked(None, at_least=0)
    """Above 0, weigh tokens by min(pi_old / pi_sampler, importance_cap) (truncated importance sampling: Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", there 2); 0 disables it. Null
    takes IMPORTANCE_CAPS: 0 in float32, 2 in bfloat16 and float16 (ours)."""
    refills: int = checked(0, at_least=0)
    """Times that a step may drop its uniform groups and sample other prompts instead (dynamic sampling of DAPO). When
    groups are still missing after that, uniform groups fill the batch. 0 keeps every group."""
    overlong_mask: bool = False
    """Leave completions that were cut at the length limit out of the surrogate and of its denominator (overlong
    filtering of DAPO)."""
    overlong_buffer: int = checked(0, at_least=0)
    """Tokens before the length limit over which the reward falls by up to 1 (soft overlong punishment of DAPO)."""
    reference_kl: float = checked(0.0, at_least=0)
    """beta, the weight of the penalty against the reference (OPSD)."""
    reference_penalty: Penalty = Penalty.k3

    @property
    def distills(self) -> bool:
        """Tell whether the loss has a distillation term."""
        return self.name in (Recipe.ssopd, Recipe.opsd) and self.lambda_0 > 0

    @property
    def rewards(self) -> bool:
        """Tell whether the loss has a surrogate term."""
        return self.name in (Recipe.ssopd, Recipe.grpo)

    def check(self) -> None:
        """Check settings against each other; ValueError names field, value and remedy."""
        for name in self.aux_losses:
            check_function_name("algorithm.aux_losses", name)
        require(
            self.ratio_clip_dual == 0 or self.ratio_clip_dual > 1,
            f"algorithm.ratio_clip_dual={self.ratio_clip_dual}: give a bound on the ratio above 1, or 0 for none",
        )
