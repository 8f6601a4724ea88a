"""Identify an evaluation by what decides its samples: weights, problems and how they are asked, sampling, reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from nemo_ssopd.checkpoint.fingerprint import base_fingerprint
from nemo_ssopd.config.evaluation import EvalConfig
from nemo_ssopd.evaluation.data import EvalData
from nemo_ssopd.evaluation.models import ModelSource
from nemo_ssopd.types import RenderedPrompt

Identity: TypeAlias = dict[str, dict[str, Any]]
"""A mapping section -> key -> value, as evaluation.json has it."""


def identities(config: EvalConfig, source: ModelSource, data: EvalData) -> dict[str, Identity]:
    """Return the identity of a model's evaluation on each set. Process count and batching are not part of it."""
    model = {
        "path": source.path,
        "kind": source.kind,
        "fingerprint": fingerprint(source),
        "dtype": config.dtype,
    }
    evaluation = {**asdict(config.evaluation), "stop_token_ids": list(data.stop_token_ids)}
    return {
        name: {
            "model": model,
            "data": {"source": chosen.source, "problems": len(data.sets[name]), "digest": _digest(data.sets[name])},
            "evaluation": evaluation,
            "reward": asdict(config.reward),
        }
        for name, chosen in config.chosen_sets.items()
    }


def fingerprint(source: ModelSource) -> str:
    """Return the SHA-256 of a model: of its weights' values and of the files that say what they mean."""
    digest = hashlib.sha256()
    if source.kind == "checkpoint":
        digest.update((Path(source.path) / "manifest.json").read_bytes())  # it holds a checksum of every file
    else:
        digest.update(base_fingerprint(source.path).encode())
        for name in ("config.json", "adapter_config.json"):
            if (Path(source.path) / name).is_file():
                digest.update((Path(source.path) / name).read_bytes())
    if source.base is not None:
        digest.update(base_fingerprint(source.base).encode())
    return digest.hexdigest()


def _digest(prompts: Sequence[RenderedPrompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt.id, prompt.tokens, prompt.prompt.answer]).encode())
        digest.update(prompt.prompt.columns.encode())  # empty without a reward function
    return digest.hexdigest()
