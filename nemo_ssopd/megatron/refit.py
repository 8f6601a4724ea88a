"""Copy the trainer's weights into the rollout engine, in place, at the start and after every step; check the copy.

    refit(policy, engine, config, policy_version=7)

Merged: every weight is sent, adapters added. Adapter: the engine keeps the base model, and gets A and B as a LoRA
adapter of its own. That is rank / hidden of the bytes, and the engine rounds as the trainer does.

In bfloat16 a few steps change log-probs by less than rounding does, so log-probs cannot show a stale engine. Therefore
the engine's tensors are compared, bit for bit, with what was sent: adapters whole; of every weight some columns, other
ones at each version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import LoraConfig
from nemo_ssopd.megatron.lora import adapters_enabled
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.weights import peft_weights
from nemo_ssopd.run.alarms import UnhealthyRun
from nemo_ssopd.types import SentTensor

Weights = Iterable[tuple[str, torch.Tensor]]

COLUMNS = 16
"""Columns of a matrix that are compared, at least: two for each of 8 tensor-parallel ranks."""


class Engine(Protocol):
    """A receiver of weights: `rollout.engine.RolloutEngine`."""

    def load_weights(self, weights: Weights, *, policy_version: int) -> None: ...

    def load_adapter(self, weights: Weights, *, policy_version: int) -> None: ...

    def drop_adapter(self, *, policy_version: int) -> None: ...

    def differing(self, sent: Mapping[str, SentTensor]) -> list[str]: ...


def refit(policy: MegatronPolicy, engine: Engine, config: Config, *, policy_version: int) -> None:
    """Make the engine sample from the current policy or, inside `reference` or `teacher`, from that one.

    All ranks call it; config.rollout.refit says how. UnhealthyRun on all of them when an engine holds something else.
    """
    sent: dict[str, SentTensor] = {}
    if config.rollout.refit == "merged":
        engine.load_weights(_sampled(policy, sent, turn=policy_version), policy_version=policy_version)
    elif adapters_enabled(policy.model):
        matrices = list(_scaled(peft_weights(policy.model, policy.runtime), config.lora))
        sent |= {name: SentTensor(name, tuple(matrix.shape), 0, 1, matrix) for name, matrix in matrices}
        engine.load_adapter(matrices, policy_version=policy_version)
    else:
        engine.drop_adapter(policy_version=policy_version)
    everywhere: list[Any] = [None] * policy.runtime.world_size
    dist.all_gather_object(everywhere, engine.differing(sent), group=policy.runtime.cpu_group)
    stale = [(rank, name) for rank, names in enumerate(everywhere) for name in names]
    if stale:
        rank, name = stale[0]
        more = f", and {len(stale) - 1} more tensors" if len(stale) > 1 else ""
        raise UnhealthyRun(
            f"refit to version {policy_version}: the engine of rank {rank} does not hold {name} as it was sent{more}. "
            "It would sample from another policy than the trainer's: this is an error in the engine or in its version"
        )


def _sampled(policy: MegatronPolicy, sent: dict[str, SentTensor], *, turn: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the policy's weights; keep in `sent` the part of each that will be compared."""
    vocabulary = policy.hf.family.vocabulary
    for name, tensor in policy.weights():
        step = max(1, tensor.shape[-1] // COLUMNS) if tensor.dim() == 2 else 1
        values = tensor[..., turn % step :: step].clone()
        sent[name] = SentTensor(name, tuple(tensor.shape), turn % step, step, values, name in vocabulary)
        yield name, tensor


def _scaled(weights: Weights, lora: LoraConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Multiply B by alpha / r, so that the engine need not know them."""
    for name, tensor in weights:
        yield name, tensor * (lora.alpha / lora.rank) if ".lora_B." in name else tensor
