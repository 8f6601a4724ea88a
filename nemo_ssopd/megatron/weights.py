"""Weights between Hugging Face names and Megatron-Core's shards, one tensor at a time.

    load_hf_weights(model, hf, "models/Qwen3-8B", runtime)   # each rank reads its own slices
    for name, tensor in hf_weights(model, hf, runtime):      # all ranks in step; adapters merged in
        ...
    for name, tensor in peft_weights(model, runtime):        # the adapters by themselves
        ...

Every Hugging Face tensor is, on each rank, a view into one Megatron parameter. The family's table says which, and is
read in both directions: loading copies into the view, exporting gathers the views.

A model may also be on the meta device, and have one part at a time in memory: see `hf_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import nn

from nemo_ssopd.megatron.lora import ColumnAdapter, adapters
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.shards import Shard, shard_of
from nemo_ssopd.models.family import HFModelConfig, Kind

InMemory: TypeAlias = Callable[[nn.Module], AbstractContextManager[object]]


class Rounding:
    """The effect of rounding to the exported type on the adapters' update d: W + d is written as W + c.

    `hf_weights` fills it; it is complete when that is exhausted. The sums run over all adapted weights.

    >>> rounding.kept, rounding.error      # after 10 steps at 5e-6 in bfloat16
    (0.21, 0.85)
    """

    _ROWS = 1024  # of a matrix at a time: no further copy of one is made

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    @property
    def has_update(self) -> bool:
        """Tell whether the adapters add anything; false also without adapters."""
        return float(self._sums[0]) > 0

    @property
    def kept(self) -> float:
        """Share of the update that is kept, <c, d> / <d, d>: 1 when it is whole, 0 when it is lost."""
        return float(self._sums[1] / self._sums[0])

    @property
    def error(self) -> float:
        """Relative error |c - d| / |d|: what rounding took away or added, in units of the update."""
        return float((self._sums[2] / self._sums[0]).sqrt())

    def add(self, weight: torch.Tensor, delta: torch.Tensor, merged: torch.Tensor) -> None:
        """Count one matrix, or this rank's part of it: W, d in float32, and W + c."""
        for w, d, m in zip(*(matrix.split(self._ROWS) for matrix in (weight, delta, merged)), strict=True):
            change = m.float() - w.float()
            products = (d * d, change * d, (change - d).square())
            self._sums = self._sums.to(d.device) + torch.stack([x.sum(dtype=torch.float64) for x in products])

    def reduce(self, runtime: Runtime) -> None:
        """Sum over the tensor-parallel ranks; all of them call it."""
        self._sums = runtime.layout.gather_tensor(self._sums.to(runtime.device)[None], dim=0).sum(0)


def load_hf_weights(model: GPTModel, hf: HFModelConfig, path: str | Path, runtime: Runtime) -> None:
    """Fill `model` from the safetensors in `path`; ValueError, with names, for missing, extra or misshapen tensors.

    Tensors on the meta device stay there.
    """
    files = tensor_files(Path(path))
    shards = list(_shards(model, hf))
    _check_names(Path(path), expected={shard.name for shard in shards}, found=set(files), hf=hf)
    shards = [shard for shard in shards if not shard.view.is_meta]
    with ExitStack() as stack, torch.no_grad():
        handles = {
            file: stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            for file in sorted({files[shard.name] for shard in shards})
        }
        for shard in shards:
            _load_shard(shard, handles[files[shard.name]].get_slice(shard.name), hf, runtime)


def hf_weights(
    model: GPTModel,
    hf: HFModelConfig,
    runtime: Runtime,
    *,
    merged: bool = True,
    dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
    in_memory: InMemory = nullcontext,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of this pipeline stage, whole, under its Hugging Face name, in `dtype` or the model's own.

    `merged` adds the adapters, W + alpha / r B A, in float32; `rounding` counts what is lost after that. All ranks
    must iterate to the end. Yielded tensors may share memory with the parameters: clone those that are kept over an
    optimizer step, and write to none of them.

    `in_memory` wraps the use of each part of the model, at most one layer: it may load the part and drop it.
    """
    deltas = {f"{adapter.hf_name}.weight": adapter for adapter in adapters(model)} if merged else {}
    for shard in _shards(model, hf, in_memory):
        local = shard.view.detach().reshape(shard.shape)
        if shard.name in deltas:
            weight, delta = local, deltas[shard.name].delta()
            local = (weight.float() + delta).to(dtype or weight.dtype)
            if rounding is not None:
                rounding.add(weight, delta, local)
        local = local.to(dtype or local.dtype)
        whole = local if shard.kind.axis is None else runtime.layout.gather_tensor(local, shard.kind.axis)
        yield shard.name, whole[: hf.vocab_size] if shard.kind is Kind.VOCABULARY else whole
    if rounding is not None:
        rounding.reduce(runtime)


def peft_weights(model: nn.Module, runtime: Runtime) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every adapter matrix in a model or a part, whole, by PEFT's name. All ranks must iterate to the end."""
    for adapter in adapters(model):
        is_column = isinstance(adapter, ColumnAdapter)
        a, b = adapter.A.detach(), adapter.B.detach()
        prefix = f"base_model.model.{adapter.hf_name}"
        yield f"{prefix}.lora_A.weight", a if is_column else runtime.layout.gather_tensor(a, dim=1)
        yield f"{prefix}.lora_B.weight", runtime.layout.gather_tensor(b, dim=0) if is_column else b


def _shards(model: GPTModel, hf: HFModelConfig, in_memory: InMemory = nullcontext) -> Iterator[Shard]:
    """Yield every tensor of this pipeline stage, in the order of the layers."""
    family = hf.family
    if model.pre_process:
        with in_memory(model.embedding):
            yield shard_of(family.embedding, model, hf)
    for layer in model.decoder.layers:
        with in_memory(layer):
            for weight in family.weights_of(layer.layer_number - 1):
                yield shard_of(weight, layer, hf)
    if model.post_process:
        with in_memory(model.decoder.final_layernorm):
            yield shard_of(family.final_norm, model, hf)
        if not hf.tied:
            with in_memory(model.output_layer):
                yield shard_of(family.output, model, hf)


def _load_shard(shard: Shard, source: Any, hf: HFModelConfig, runtime: Runtime) -> None:
    """Copy this rank's part of `source`, a safetensors slice: indexing it reads just that part of the file."""
    expected, axis = shard.whole_shape(runtime.layout.tensor.size), shard.kind.axis
    if shard.kind is Kind.VOCABULARY:
        expected[0] = hf.vocab_size
    if source.get_shape() != expected:
        raise ValueError(f"{shard.name} has shape {source.get_shape()} in the file, config.json asks for {expected}")
    if axis is None:
        shard.view.copy_(source[:])
    elif axis == 1:
        columns = shard.shape[1]
        shard.view.copy_(source[:, runtime.layout.tensor.rank * columns : (runtime.layout.tensor.rank + 1) * columns])
    else:
        rows = shard.shape[0]
        start = min(runtime.layout.tensor.rank * rows, expected[0])
        stop = min(start + rows, expected[0])
        if stop - start < rows:
            shard.view.zero_()
            shard.view[: stop - start].copy_(source[start:stop])
        else:
            shard.view.copy_(source[start:stop].view(shard.view.shape))


def tensor_files(path: Path) -> dict[str, str]:
    """Return, for each tensor name, the safetensors file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: str(path / file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise ValueError(
            f"{path} holds neither model.safetensors nor model.safetensors.index.json: save the model as safetensors"
        )
    with safe_open(single, framework="pt", device="cpu") as tensors:
        return {name: str(single) for name in tensors.keys()}


def _check_names(path: Path, *, expected: set[str], found: set[str], hf: HFModelConfig) -> None:
    missing = expected - found
    # Older files carry a rotary buffer, or a second copy of a tied embedding.
    ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    if hf.tied:
        ignored.add(hf.family.output.name)
    extra = found - expected - ignored
    if missing or extra:
        raise ValueError(
            f"the tensors in {path} do not fit its config.json: missing {sorted(missing) or 'none'}, "
            f"unknown {sorted(extra) or 'none'}"
        )
