"""Does an exported directory compute what the trainer computes? Both in float32, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_ssopd.config import ParallelConfig
from nemo_ssopd.megatron.model import hidden_states, output_weight
from nemo_ssopd.megatron.policy import SavedPolicy, load_policy
from nemo_ssopd.megatron.runtime import Runtime

ROWS, LENGTH = 2, 64
# Largest difference between two log-probs; and, of adapters merged into bfloat16 weights, which are rounded, the mean.
EXACT, MERGED_BFLOAT16 = 1e-3, 2e-2


@dataclass(frozen=True)
class Comparison:
    """Log-probs of every token of the vocabulary at every position, in nats.

    >>> Comparison(mean=2e-7, largest=3e-6, limit=1e-3).line()
    'log-probs differ by 2.0e-07 in the mean, 3.0e-06 at the most'
    """

    mean: float
    largest: float
    limit: float
    limits_mean: bool = False

    @property
    def is_equal(self) -> bool:
        return (self.mean if self.limits_mean else self.largest) <= self.limit

    def line(self) -> str:
        return f"log-probs differ by {self.mean:.1e} in the mean, {self.largest:.1e} at the most"


def compare_with_export(
    saved: SavedPolicy, output: Path, parallel: ParallelConfig, runtime: Runtime, *, is_adapter: bool
) -> Comparison | None:
    """The checkpoint's model against what transformers, or PEFT, makes of `output`; None on all ranks but the first.

    Takes memory for the model in float32, once at a time.
    """
    tokens_BS = test_tokens(saved)
    trained = trainer_logprobs(saved, tokens_BS, parallel, runtime)
    if not runtime.is_main:
        return None
    model = _load_peft(saved, output) if is_adapter else _load(output)
    with torch.no_grad():
        exported = model(tokens_BS).logits.float().log_softmax(-1)
    difference = (exported - trained).abs()
    is_rounded = saved.lora is not None and not is_adapter and saved.dtype != "float32"
    return Comparison(
        mean=float(difference.mean()),
        largest=float(difference.max()),
        limit=MERGED_BFLOAT16 if is_rounded else EXACT,
        limits_mean=is_rounded,
    )


def test_tokens(saved: SavedPolicy) -> torch.Tensor:
    """[B, S], the same on every rank."""
    length = min(LENGTH, saved.hf.max_position_embeddings)
    return torch.randint(saved.hf.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(1))


def trainer_logprobs(
    saved: SavedPolicy, tokens_BS: torch.Tensor, parallel: ParallelConfig, runtime: Runtime
) -> torch.Tensor:
    """[B, S, V] by the trainer's own model, adapters beside the base weights, in float32. All ranks call it."""
    model = load_policy(saved, parallel, runtime, dtype="float32")
    rows, length = tokens_BS.shape
    bounds = tuple(range(0, rows * length + 1, length))
    with torch.no_grad():
        hidden_BSH = hidden_states(model, tokens_BS.flatten(), bounds).unflatten(0, (rows, length))
        weight_VH = runtime.gather_tp(output_weight(model), dim=0)[: saved.hf.vocab_size]
        return (hidden_BSH @ weight_VH.T).log_softmax(-1)


def _load(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _load_peft(saved: SavedPolicy, output: Path) -> torch.nn.Module:
    from peft import PeftModel  # noqa: PLC0415 -- needed by nothing else

    assert saved.base is not None
    return PeftModel.from_pretrained(_load(saved.base), output, autocast_adapter_dtype=False).eval()
