"""The trainer's weights to the rollout engine, in place, at the start and after every step.

    refit(actor, engine, config, policy_version=7)

Merged: every weight goes over, adapters added. Adapter: the engine keeps the base model, and gets A and B as a LoRA
adapter of its own, rank / hidden of the bytes; the trainer's rounding is then the engine's too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from nemo_ssopd.config import Config
from nemo_ssopd.megatron.actor import MegatronGRPOActor
from nemo_ssopd.megatron.export import write_adapter
from nemo_ssopd.megatron.lora import adapters_enabled
from nemo_ssopd.megatron.weights import peft_weights


class Engine(Protocol):
    """What takes the weights: `rollout.engine.RolloutEngine`."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None: ...

    def load_adapter(self, folder: Path, *, policy_version: int) -> None: ...

    def drop_adapter(self, *, policy_version: int) -> None: ...


def refit(actor: MegatronGRPOActor, engine: Engine, config: Config, *, policy_version: int) -> None:
    """From here on the engine samples from the actor's policy, inside `reference` or `teacher` from that one's.

    All ranks call it, with config.rollout.refit.
    """
    if config.rollout.refit == "merged":
        engine.load_weights(actor.weights(), policy_version=policy_version)
        return
    if not adapters_enabled(actor.model):
        engine.drop_adapter(policy_version=policy_version)
        return
    # vLLM takes adapters from a folder. Each process has an engine, which reads the whole matrices, and its own folder.
    with TemporaryDirectory(prefix="adapter-") as folder:
        write_adapter(peft_weights(actor.model, actor.runtime), config.lora, config.model.path, Path(folder))
        engine.load_adapter(Path(folder), policy_version=policy_version)
