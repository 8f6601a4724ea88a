"""Find out what kind of model `model=PATH` points at, from the files in it, without reading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

ACCEPTED = (
    "give a Hugging Face directory (config.json, *.safetensors, tokenizer), a PEFT adapter directory "
    "(adapter_config.json), a checkpoint (.../checkpoints/iter_0000100) or the run_dir of a training run"
)


@dataclass(frozen=True)
class ModelSource:
    """A model that can be evaluated: its kind, its path and its base model.

    >>> find_model("runs/tiny_cpu")
    ModelSource(kind="checkpoint", path="runs/tiny_cpu/checkpoints/iter_0000040", base="assets/demo_model")
    """

    kind: str
    """One of hf, adapter and checkpoint."""
    path: str
    base: str | None = None
    """The Hugging Face directory that adapters belong to; None if `path` holds every weight."""

    @property
    def architecture(self) -> str:
        """Return the folder that holds the model's config.json."""
        if self.kind == "adapter":
            assert self.base is not None
            return self.base
        return f"{self.path}/hf" if self.kind == "checkpoint" else self.path


def find_model(path: str, *, base: str | None = None) -> ModelSource:
    """Return the model at `path`. ValueError if there is none, or if the base model of adapters is missing.

    `base` replaces the path of the base model that was recorded when the adapters were trained.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model: there is no directory {path}: {ACCEPTED}")
    if (folder / "adapter_config.json").is_file():
        return ModelSource("adapter", path, _base_of(path, base, _base_of_adapter(folder)))
    checkpoint = _checkpoint(folder)
    if checkpoint is not None:
        run = OmegaConf.load(checkpoint / "config.yaml")
        needs_base = run.lora.enabled
        return ModelSource("checkpoint", str(checkpoint), _base_of(path, base, run.model.path) if needs_base else None)
    for candidate in (folder, folder / "hf"):
        if _is_hugging_face(candidate):
            return ModelSource("hf", str(candidate))
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"model: {path} is no model (it holds {found}): {ACCEPTED}")


def _checkpoint(folder: Path) -> Path | None:
    """Return `folder` if it is a checkpoint, or the newest checkpoint of the run in it, or None."""
    candidates = [folder]
    for parent in (folder, folder / "checkpoints"):
        candidates += sorted((step for step in parent.glob("iter_*") if step.is_dir()), reverse=True)
    return next((step for step in candidates if (step / "state.json").is_file()), None)


def _is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _base_of_adapter(folder: Path) -> str | None:
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return None if base is None else str(base)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {folder / 'adapter_config.json'} is not an adapter's config ({error}): save the adapter again"
        ) from error


def _base_of(path: str, given: str | None, written_down: str | None) -> str:
    base = given or written_down
    if base is None or not _is_hugging_face(Path(base)):
        raise ValueError(
            f"model: {path} holds adapters only, and their base model is not at {base!r}: give the Hugging Face "
            f"directory of the base model as base=PATH"
        )
    return base
