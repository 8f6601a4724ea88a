"""Read the model of a checkpoint, without its optimizer, at any parallel layout: whole or one part at a time.

    saved = open_checkpoint(Path("runs/x/checkpoints/iter_0000100"), runtime)
    model = load_policy(saved, parallel, runtime)                       # to compute with
    for name, tensor in stream_policy(saved, parallel, runtime): ...    # to export: one layer in memory at a time

A checkpoint may be ours, or one of Megatron-Bridge or Megatron-LM that holds all weights of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_ssopd.checkpoint.checkpoint import STATE, read_about, saved_config, trained_weights
from nemo_ssopd.checkpoint.storage import CheckpointError, damage, fill_tensors, read_common, read_index
from nemo_ssopd.config.sections import Dtype, LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.megatron.lora import add_lora
from nemo_ssopd.megatron.model import DTYPES, build_model
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import InMemory, Rounding, hf_weights, load_hf_weights, peft_weights
from nemo_ssopd.models.family import HFModelConfig, read_hf_config

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class SavedPolicy:
    """A checkpoint that was opened and found undamaged.

    >>> open_checkpoint(Path("runs/tiny_cpu/checkpoints/iter_0000040"), runtime)
    SavedPolicy(folder=..., hf_folder=..., dtype="float32", lora=LoraConfig(rank=16, ...), base="assets/demo_model")
    """

    folder: Path
    hf_folder: Path
    """Folder of config.json, tokenizer and chat template."""
    dtype: str
    lora: LoraConfig | None
    """None when the checkpoint holds every weight."""
    base: str | None
    """Hugging Face directory that training started from. May be None when all weights were trained."""
    sharding: dict[str, object] | None
    """Metadata from which Megatron-Core derives the names and the split of the tensors."""

    @property
    def hf(self) -> HFModelConfig:
        return read_hf_config(self.hf_folder)


def open_checkpoint(folder: Path, runtime: Runtime, *, base: str | Path | None = None) -> SavedPolicy:
    """Open a checkpoint: check its files, and that `base` is the model that its adapters were trained on.

    Pass `base` when the base model has moved. For a checkpoint that is not ours, it is required and says what the model
    is. CheckpointError when the files are damaged.
    """
    if not (folder / STATE).is_file():
        return _open_foreign(folder, base)
    if problem := damage(folder, runtime):
        raise CheckpointError(f"{folder} is damaged: {problem}. Use another checkpoint")
    config = saved_config(folder)
    base = str(base or config.model.path)
    about = read_about(folder, base, runtime)
    has_adapters = about["base"] is not None
    return SavedPolicy(
        folder,
        hf_folder=folder / "hf",
        dtype=config.model.dtype,
        lora=config.lora if has_adapters else None,
        base=base if has_adapters or (Path(base) / "config.json").is_file() else None,
        sharding=None,
    )


def _open_foreign(folder: Path, base: str | Path | None) -> SavedPolicy:
    """Open a checkpoint of Megatron-Bridge or Megatron-LM. It has no checksums; `base` gives config and tokenizer."""
    if base is None:
        raise ValueError(
            f"{folder} is no checkpoint of ours (it has no {STATE}): give the Hugging Face directory of the model, for "
            f"its config and tokenizer, as --base"
        )
    entry = read_index(folder).state_dict_metadata.get(WORD_EMBEDDINGS)
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"{folder} does not hold {WORD_EMBEDDINGS}: only a checkpoint of all weights can be read")
    dtype = next(name for name, dtype in DTYPES.items() if dtype is entry.properties.dtype)
    return SavedPolicy(
        folder, Path(base), dtype, lora=None, base=None, sharding=read_common(folder).get("content_metadata")
    )


def load_policy(
    saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime, *, dtype: str | None = None
) -> GPTModel:
    """Load the whole model, in the type that it was trained in or with the same values in a wider `dtype`."""
    model = _build(saved, parallel, runtime, dtype or saved.dtype)
    _fill(model, saved, runtime)
    round_weights(model, DTYPES[saved.dtype])
    return model


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to its value in `dtype`, in place; the parameter keeps its own type."""
    for parameter in model.parameters():
        if parameter.dtype is not dtype:
            parameter.data.copy_(parameter.to(dtype))


def stream_policy(
    saved: SavedPolicy,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model as `hf_weights` does.

    In addition to the yielded tensor, host memory holds one layer or the embedding.
    """
    model, in_memory = _on_disk(saved, parallel, runtime)
    yield from hf_weights(model, saved.hf, runtime, dtype=dtype, rounding=rounding, in_memory=in_memory)


def stream_adapters(
    saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every adapter matrix of the model as `peft_weights` does."""
    assert saved.lora is not None
    model, in_memory = _on_disk(saved, parallel, runtime)
    for layer in model.decoder.layers:
        with in_memory(layer):
            yield from peft_weights(layer, runtime)


def _on_disk(saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime) -> tuple[GPTModel, InMemory]:
    """Build the model on the meta device; the context manager materializes one part from the checkpoint."""
    with torch.device("meta"):
        model = _build(saved, parallel, replace(runtime, device=torch.device("meta")), saved.dtype)

    @contextmanager
    def in_memory(part: nn.Module) -> Iterator[None]:
        part.to_empty(device=runtime.device)
        _fill(model, saved, runtime)
        yield
        part.to("meta")

    return model, in_memory


def _build(saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime, dtype: str) -> GPTModel:
    model = build_model(saved.hf, ModelConfig(path=str(saved.hf_folder), dtype=Dtype(dtype)), parallel, runtime)
    if saved.lora is not None:
        add_lora(model, saved.hf, saved.lora, seed=0, runtime=runtime)  # initial values are overwritten
    return model


def _fill(model: GPTModel, saved: SavedPolicy, runtime: Runtime) -> None:
    """Fill `model` from the checkpoint, and the rest from the base model. Tensors on the meta device stay there."""
    if saved.lora is not None:
        assert saved.base is not None
        load_hf_weights(model, saved.hf, saved.base, runtime)
    trained = trained_weights(model, sharding=saved.sharding)
    wanted = {name: tensor for name, tensor in trained.items() if not tensor.data.is_meta}
    fill_tensors(wanted, saved.folder)
