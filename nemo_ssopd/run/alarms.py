"""Checks of a step's metrics: they skip a step with a gradient spike, and stop a run that cannot recover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ssopd.config.run import Config, max_logprob_mismatch

RECENT_STEPS = 16


class UnhealthyRun(RuntimeError):
    """An error in the run itself, such as weights that do not reach the engine. All ranks raise it together."""


def spike_limit(recent_norms: Sequence[float], factor: float) -> float:
    """Return the gradient norm above which a step is skipped; infinite if `factor` is 0 or fewer than
    RECENT_STEPS norms are known."""
    return factor * max(recent_norms) if factor and len(recent_norms) == RECENT_STEPS else float("inf")


def check_health(metrics: Mapping[str, Any], config: Config, *, step: int, skipped_in_a_row: int) -> None:
    """Raise UnhealthyRun after too many skipped steps, or when engine and trainer disagree on log-probs.

    `metrics` are those of all ranks, so all ranks reach the same verdict.
    """
    trainer, bound = config.trainer, max_logprob_mismatch(config)
    if skipped_in_a_row >= trainer.max_skipped_steps:
        raise UnhealthyRun(
            f"the last {skipped_in_a_row} steps, up to {step}, were skipped: loss or gradient were not finite, or the "
            f"gradient norm was over trainer.spike_factor={trainer.spike_factor:g} times the largest recent one. Lower "
            f"optimizer.lr, or look at the rollouts; checkpoints of good steps are kept"
        )
    mismatch = metrics["rollout/logprob_mismatch"].value() if "rollout/logprob_mismatch" in metrics else 0.0
    if bound and mismatch > bound:
        raise UnhealthyRun(
            f"rollout/logprob_mismatch={mismatch:.2e} at step {step} is over trainer.max_logprob_mismatch="
            f"{bound:g}: engine and trainer disagree on the same tokens, as they do when a refit "
            f"went wrong or their precision differs. Step {step} was not saved; raise the bound if this is expected"
        )
