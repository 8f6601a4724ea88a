"""Former names of settings: accepted in overrides and in the configs of older runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = {
    "algorithm.clip": "algorithm.kl_clip",
    "algorithm.prefixes": "algorithm.prefix_tokens",
    "algorithm.targets": "algorithm.distilled",
    "algorithm.clip_ratio_low": "algorithm.ratio_clip_low",
    "algorithm.clip_ratio_high": "algorithm.ratio_clip_high",
    "algorithm.dual_clip": "algorithm.ratio_clip_dual",
    "optimizer.clip_grad": "optimizer.grad_clip",
    **{f"rollout.{n}": f"engine.{n}" for n in ("tensor", "gpu_memory_utilization", "cpu_cache_gib", "max_sequences")},
    # In an evaluation.
    **{f"engine.{name}": name for name in ("dtype", "max_prompt_tokens", "trust_remote_code")},
}
REMOVED = {"algorithm.clip_unit": "summand", "algorithm.position_decay": 1.0}
"""Removed settings, each with the only value that still describes what the code does."""


def with_present_names(overrides: Sequence[str]) -> list[str]:
    """Rename the keys of KEY=VALUE overrides; other arguments stay as they are.

    >>> with_present_names(["--config-name", "tiny_cpu", "algorithm.clip=0.1"])
    ['--config-name', 'tiny_cpu', 'algorithm.kl_clip=0.1']
    """
    pairs = [override.partition("=") for override in overrides]
    return [f"{RENAMED.get(key, key)}{equals}{value}" for key, equals, value in pairs]


def read_old_sections(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a saved config, as nested dictionaries; ValueError if a removed setting was used."""
    sections: dict[str, Any] = {}
    for section, values in saved.items():
        if not isinstance(values, Mapping):
            sections[section] = values
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in REMOVED:
                present_section, _, present_key = RENAMED.get(name, name).partition(".")
                sections.setdefault(present_section, {})[present_key] = value
            elif value != REMOVED[name]:
                raise ValueError(f"the saved config has {name}={value}, which no longer exists: use an older version")
    return sections
