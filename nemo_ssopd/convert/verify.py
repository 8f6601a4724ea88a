"""Check that an exported directory is the trained policy, by log-probs of the same tokens, computed in float32.

Distances are in units of the update: the policy's own distance from the model that it was trained from. The check finds
two problems. An export that does not compute what rounding makes of the policy is wrong. One that does may still have
lost the update to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_ssopd.checkpoint.saved_model import SavedPolicy, load_policy, round_weights
from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.megatron.lora import merge_adapters
from nemo_ssopd.megatron.model import hidden_states, output_weight
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import load_hf_weights

ROWS, LENGTH = 2, 64
LAST_PLACE = 2.0**-24
UNMEASURED_NOISE = 1e-5
"""Nats of float32 noise, assumed when there is no base model to measure it on."""
NOISE_LIMIT, UPDATE_LIMIT = 10.0, 1e-3
"""A right export is at most NOISE_LIMIT * noise + UPDATE_LIMIT * update away from what is expected."""
MEASURABLE = 3.0
"""An update is measurable when it is over this many times what a right export may be off."""
KEPT_LIMIT = 0.5
"""Largest distance of `kept` from 1. With less of the update, an export is nearer to the base than to the policy."""


class TrainerLogprobs(NamedTuple):
    """Log-probs by the trainer's model, [B, S, V] each."""

    policy: torch.Tensor
    """Adapters apart from the base weights: nothing merged, nothing rounded."""
    expected: torch.Tensor
    """Merged and rounded, as the weights of an export should be; equal to `policy` when nothing is rounded."""
    base: torch.Tensor | None
    """The model before training; None when it is not known."""


@dataclass(frozen=True)
class Comparison:
    """Root mean squares over the log-probs of every token of the vocabulary at every position, in nats.

    >>> Comparison(update=0.32, error=3e-6, unexplained=3e-6, noise=4e-7, kept=1.0).line()
    'keeps 100.00% of the update, with errors of 0.00% (update 3.2e-01 nats, error 3.0e-06, noise of float32 4.0e-07)'
    """

    update: float | None
    """Distance from the base to the policy; None when the base is not known."""
    error: float
    """Distance from the policy to the export."""
    unexplained: float
    """Distance from what the export must be, the policy merged and rounded, to the export."""
    noise: float
    """Noise of float32: distance from the base by the trainer to the base by transformers, plus half a last place of
    the log-probs."""
    kept: float
    """Share of the update in the export: <export - base, policy - base> / <policy - base, policy - base>."""

    @property
    def limit(self) -> float:
        """Largest `unexplained` of a right export, in nats."""
        return NOISE_LIMIT * self.noise + UPDATE_LIMIT * (self.update or 0.0)

    @property
    def is_measurable(self) -> bool:
        """Tell whether the update stands out of the noise.

        If so, an export without it would be over the limit, or known to be rounded.
        """
        return self.update is not None and self.update > MEASURABLE * self.limit

    def problem(self) -> str | None:
        """Return why the export is not a copy of the policy, or None. Log-probs that are not finite are a problem."""
        if not self.unexplained <= self.limit:
            return (
                f"is not the trained model: log-probs are {self.unexplained:.1e} nats from what they must be, over "
                f"{self.limit:.1e}; it {self._measures()}"
            )
        if self.is_measurable and not (abs(self.kept - 1) <= KEPT_LIMIT and self.error <= (self.update or 0.0)):
            return f"is what rounding makes of the trained model, and no longer that model: it {self.line()}"
        return None

    def line(self) -> str:
        """Describe what a right export holds, and how to lose less."""
        if self.is_measurable and self.error > self.limit:
            return f"{self._measures()}. Rounding did that: --dtype float32 and --adapter-only keep all"
        return self._measures()

    def _measures(self) -> str:
        error = f"error {self.error:.1e}, noise of float32 {self.noise:.1e}"
        if self.update is None:
            return f"equals the trained model ({error} nats; give its base as --base to measure the update)"
        distances = f"update {self.update:.1e} nats, {error}"
        if not self.is_measurable:
            return f"holds an update too small to be seen: it is within the noise ({distances})"
        return f"keeps {self.kept:.2%} of the update, with errors of {self.error / self.update:.2%} ({distances})"


def compare_with_export(
    saved: SavedPolicy,
    output: Path,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    is_adapter: bool,
    dtype: str,
) -> Comparison | None:
    """Compare the checkpoint's policy with what transformers, or PEFT, makes of `output`.

    Returns None on all ranks except the first. `dtype` is the type of merged weights. Needs memory for one model in
    float32 at a time.
    """
    tokens_BS = test_tokens(saved)
    trained = trainer_logprobs(saved, tokens_BS, parallel, runtime, rounded_to=None if is_adapter else dtype)
    if not runtime.is_main:
        return None
    exported = _logprobs(_load_peft(saved, output) if is_adapter else _load(output), tokens_BS)
    update, kept = None, math.nan
    noise = UNMEASURED_NOISE
    if trained.base is not None:
        step = trained.policy - trained.base
        update = _rms(step)
        noise = LAST_PLACE * _rms(trained.base) + _rms(_logprobs(_load_base(saved), tokens_BS) - trained.base)
        kept = float(((exported - trained.base) * step).sum() / step.square().sum())
    return Comparison(
        update=update,
        error=_rms(exported - trained.policy),
        unexplained=_rms(exported - trained.expected),
        noise=noise,
        kept=kept,
    )


def test_tokens(saved: SavedPolicy) -> torch.Tensor:
    """Return random token ids [B, S], the same on every rank."""
    length = min(LENGTH, saved.hf.max_position_embeddings)
    return torch.randint(saved.hf.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(1))


def trainer_logprobs(
    saved: SavedPolicy,
    tokens_BS: torch.Tensor,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    rounded_to: str | None = None,
) -> TrainerLogprobs:
    """Compute log-probs with one model in float32. All ranks call it.

    `rounded_to` is the type of an export's merged weights.
    """
    model = load_policy(saved, parallel, runtime, dtype="float32")

    def logprobs() -> torch.Tensor:
        rows, length = tokens_BS.shape
        bounds = tuple(range(0, rows * length + 1, length))
        with torch.no_grad():
            hidden_BSH = hidden_states(model, tokens_BS.flatten(), bounds).unflatten(0, (rows, length))
            weight_VH = runtime.layout.gather_tensor(output_weight(model), dim=0)[: saved.hf.vocab_size]
            return (hidden_BSH @ weight_VH.T).log_softmax(-1)

    policy = expected = logprobs()
    merge_adapters(model)
    if rounded_to not in (None, "float32"):
        round_weights(model, getattr(torch, rounded_to))
        expected = logprobs()
    if saved.base is None:
        return TrainerLogprobs(policy, expected, base=None)
    load_hf_weights(model, saved.hf, saved.base, runtime)
    round_weights(model, getattr(torch, saved.dtype))
    return TrainerLogprobs(policy, expected, logprobs())


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _logprobs(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_BS).logits.log_softmax(-1)


def _load(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _load_base(saved: SavedPolicy) -> PreTrainedModel:
    """Load the base with the values that training started from: rounded to the type trained in."""
    assert saved.base is not None
    base = _load(saved.base)
    round_weights(base, getattr(torch, saved.dtype))
    return base


def _load_peft(saved: SavedPolicy, output: Path) -> torch.nn.Module:
    from peft import PeftModel  # noqa: PLC0415 -- needed by nothing else

    return PeftModel.from_pretrained(_load_base(saved), output, autocast_adapter_dtype=False).eval()
