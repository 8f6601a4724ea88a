"""Configs from the files in `conf/` and from overrides, by Hydra; unknown keys and wrong types raise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_ssopd.config.renamed import with_present_names

_PACKAGE = Path(__file__).parents[1]
# Next to the package in a checkout, inside it when installed.
CONF = next(folder for folder in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if folder.is_dir())


def compose_run(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose conf/NAME.yaml with KEY=VALUE overrides, as the training command does."""
    return compose_in(CONF, name, overrides)


def compose_in(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose folder/NAME.yaml with KEY=VALUE overrides, former keys included."""
    with initialize_config_dir(str(folder), version_base=None):
        return compose(name, with_present_names(overrides))


def open_schema(tree: type) -> DictConfig:
    """Turn a dataclass into Hydra's schema. OmegaConf makes frozen dataclasses read-only; this undoes it."""
    schema = OmegaConf.structured(tree)
    for node in (schema, *(schema._get_node(key) for key in schema)):
        if isinstance(node, DictConfig):
            node._set_flag("readonly", None)
    return schema


def as_dataclasses(composed: DictConfig) -> Any:
    """Turn the composed tree into dataclasses, unchecked except for values that are missing."""
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: give each a value in the config or as KEY=VALUE")
    return OmegaConf.to_object(composed)
