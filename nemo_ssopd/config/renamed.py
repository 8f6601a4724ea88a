"""Settings under the names that they had before: accepted in overrides, and read from the configs of older runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "algorithm.clip": "algorithm.kl_clip",
    "algorithm.prefixes": "algorithm.prefix_tokens",
    "algorithm.targets": "algorithm.distilled",
    "algorithm.clip_ratio_low": "algorithm.ratio_clip_low",
    "algorithm.clip_ratio_high": "algorithm.ratio_clip_high",
    "algorithm.dual_clip": "algorithm.ratio_clip_dual",
    "optimizer.clip_grad": "optimizer.grad_clip",
}
REMOVED = {"algorithm.clip_unit": "summand", "algorithm.position_decay": 1.0}
"""Settings that are gone, with the one value that is still what happens."""


def with_present_names(overrides: list[str]) -> list[str]:
    """Rename the keys of KEY=VALUE overrides; other arguments stay as they are.

    >>> with_present_names(["--config-name", "tiny_cpu", "algorithm.clip=0.1"])
    ['--config-name', 'tiny_cpu', 'algorithm.kl_clip=0.1']
    """
    pairs = [override.partition("=") for override in overrides]
    return [f"{RENAMED.get(key, key)}{equals}{value}" for key, equals, value in pairs]


def read_old_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a saved config, as nested dictionaries; ValueError where a setting that is gone was used."""
    sections: dict[str, Any] = {}
    for section, fields in values.items():
        if not isinstance(fields, Mapping):
            sections[section] = fields
            continue
        named = {f"{section}.{key}": value for key, value in fields.items()}
        if used := [f"{name}={named[name]}" for name, usual in REMOVED.items() if named.get(name, usual) != usual]:
            raise ValueError(f"the saved config has {', '.join(used)}, which no longer exists: use an older version")
        present = {RENAMED.get(name, name): value for name, value in named.items() if name not in REMOVED}
        sections[section] = {name.partition(".")[2]: value for name, value in present.items()}
    return sections
