"""The model of a checkpoint without its optimizer, at any parallel layout: whole, or a part at a time.

    saved = open_checkpoint(Path("runs/x/checkpoints/iter_0000100"), runtime)
    model = load_policy(saved, parallel, runtime)                       # for whoever computes with it
    for name, tensor in stream_policy(saved, parallel, runtime): ...    # for export: a layer in memory, not the model

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
    """A checkpoint that was looked at, and is undamaged.

    >>> open_checkpoint(Path("runs/tiny_cpu/checkpoints/iter_0000040"), runtime)
    SavedPolicy(folder=..., hf_folder=..., dtype="float32", lora=LoraConfig(rank=16, ...), base="assets/demo_model")
    """

    folder: Path
    hf_folder: Path
    """config.json, tokenizer, chat template."""
    dtype: str
    lora: LoraConfig | None
    """None where the checkpoint holds every weight."""
    base: str | None
    """The Hugging Face directory that training started from. May be None where all weights were trained."""
    sharding: dict[str, object] | None
    """How Megatron-Core was told to name and cut the tensors."""

    @property
    def hf(self) -> HFModelConfig:
        return read_hf_config(self.hf_folder)


def open_checkpoint(folder: Path, runtime: Runtime, *, base: str | Path | None = None) -> SavedPolicy:
    """Check the files of a checkpoint, and that `base` is the model that its adapters were trained on.

    `base` is for a base model that has moved; for a checkpoint that is not ours, it says what the model is.
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
    """Of Megatron-Bridge or Megatron-LM: no checksums, and `base` for what only Hugging Face's files say."""
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
    """The model, whole; in the type that it was trained in, or with the same values in a wider `dtype`."""
    model = _build(saved, parallel, runtime, dtype or saved.dtype)
    _fill(model, saved, runtime)
    round_weights(model, DTYPES[saved.dtype])
    return model


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter, in place, the value that it has in `dtype`."""
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
    """As `hf_weights` of the whole model. Host memory holds one layer, or the embedding, beside what is yielded."""
    model, in_memory = _on_disk(saved, parallel, runtime)
    yield from hf_weights(model, saved.hf, runtime, dtype=dtype, rounding=rounding, in_memory=in_memory)


def stream_adapters(
    saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `peft_weights` of the whole model."""
    assert saved.lora is not None
    model, in_memory = _on_disk(saved, parallel, runtime)
    for layer in model.decoder.layers:
        with in_memory(layer):
            yield from peft_weights(layer, runtime)


def _on_disk(saved: SavedPolicy, parallel: ParallelConfig, runtime: Runtime) -> tuple[GPTModel, InMemory]:
    """The model without memory, and what gives memory and values to a part of it for a while."""
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
        add_lora(model, saved.hf, saved.lora, seed=0, runtime=runtime)  # what they are drawn as is overwritten
    return model


def _fill(model: GPTModel, saved: SavedPolicy, runtime: Runtime) -> None:
    """From the checkpoint, and from the base model what it does not hold. What is on the meta device is left there."""
    if saved.lora is not None:
        assert saved.base is not None
        load_hf_weights(model, saved.hf, saved.base, runtime)
    trained = trained_weights(model, sharding=saved.sharding)
    wanted = {name: tensor for name, tensor in trained.items() if not tensor.data.is_meta}
    fill_tensors(wanted, saved.folder)
