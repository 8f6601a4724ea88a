"""Low-rank adapters on Megatron-Core's linear layers, one per Hugging Face projection, tensor-parallel.

    add_lora(model, hf, config.lora, seed=config.trainer.seed, runtime=runtime)   # freezes the base
    with adapters_disabled(model):                                            # the base model: teacher and reference
        ...

A projection's output becomes W x + alpha / r B A x. B starts at zero, so that step 0 equals the base. Parameters of the
base keep their names; the adapters are called `...linear_qkv.lora_q.A` and so on. Sharded checkpoints know their whole
shapes, so that they load at another tensor-parallel size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from nemo_ssopd.config.sections import LoraConfig
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.shards import shard_of
from nemo_ssopd.models.family import HFModelConfig, Weight


def add_lora(model: GPTModel, hf: HFModelConfig, lora: LoraConfig, *, seed: int, runtime: Runtime) -> None:
    """Freeze `model` and give every projection an adapter; initial values depend on seed and projection only."""
    model.requires_grad_(False)
    make = partial(_adapter, hf=hf, lora=lora, seed=seed, runtime=runtime, config=model.config)
    for layer in model.decoder.layers:
        for module, weights in hf.family.adapted_in(layer.layer_number - 1).items():
            named = {name: make(weight, layer) for name, weight in weights.items()}
            is_grouped = any(weight.kind.is_grouped for weight in weights.values())
            _attach(layer, module, named, groups=hf.num_kv_heads // runtime.layout.tensor.size if is_grouped else 1)
    if model.pre_process:
        model.embedding.register_forward_hook(_require_grad)


def _adapter(
    weight: Weight,
    layer: nn.Module,
    *,
    hf: HFModelConfig,
    lora: LoraConfig,
    seed: int,
    runtime: Runtime,
    config: TransformerConfig,
) -> Adapter:
    shard = shard_of(weight, layer, hf)
    split_as = ColumnAdapter if shard.kind.axis == 0 else RowAdapter
    out_features, in_features = shard.whole_shape(runtime.layout.tensor.size)
    return split_as(weight.projection, in_features, out_features, lora=lora, seed=seed, runtime=runtime, config=config)


@contextmanager
def adapters_disabled(model: GPTModel) -> Iterator[None]:
    """Disable the adapters: inside, `model` is the frozen base, bit for bit. May be nested."""
    layers = [module for module in model.modules() if isinstance(module, _AdaptedLinear)]
    before = [layer.adapters_enabled for layer in layers]
    for layer in layers:
        layer.adapters_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled


def adapters_enabled(model: GPTModel) -> bool:
    """Tell whether all adapters are enabled; they are not inside `adapters_disabled` or after `merge_adapters`."""
    return all(module.adapters_enabled for module in model.modules() if isinstance(module, _AdaptedLinear))


def merge_adapters(model: GPTModel) -> None:
    """Add each adapter to the weight that it adapts, in place, and disable it."""
    for layer in model.modules():
        if isinstance(layer, _AdaptedLinear):
            deltas = [adapter.delta().unflatten(0, (layer.groups, -1)) for adapter in adapters(layer)]
            layer.weight.data += torch.cat(deltas, dim=1).flatten(0, 1)
            layer.adapters_enabled = False


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Iterate over the adapters in the order of the layers; empty without adapters."""
    return (module for module in model.modules() if isinstance(module, Adapter))


class Adapter(nn.Module):
    """The two matrices of one projection, this rank's part of them: x -> alpha / r B A x."""

    A: nn.Parameter
    B: nn.Parameter
    sharded_axis: ClassVar[Mapping[str, int]]
    """The matrix that the tensor-parallel ranks split, and the axis; the other matrix is the same on all of them."""

    def __init__(
        self,
        hf_name: str,
        in_features: int,
        out_features: int,
        *,
        lora: LoraConfig,
        seed: int,
        runtime: Runtime,
        config: TransformerConfig,
    ) -> None:
        super().__init__()
        self.hf_name = hf_name
        self.scale = lora.alpha / lora.rank
        self.tp_group = runtime.layout.tensor.group
        self.sequence_parallel = config.sequence_parallel
        whole = {
            "A": _kaiming_uniform((lora.rank, in_features), seed=seed, name=hf_name),
            "B": torch.zeros(out_features, lora.rank),
        }
        tensor = runtime.layout.tensor
        for name, matrix in whole.items():
            axis = self.sharded_axis.get(name)
            part = matrix if axis is None else matrix.chunk(tensor.size, dim=axis)[tensor.rank]
            parameter = nn.Parameter(part.to(runtime.device, config.params_dtype).contiguous())
            if axis is not None:
                # For Megatron's gradient norm, which counts unmarked parameters on the first rank only.
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            else:
                # It sees only this rank's part of the sequence: finalize_model_grads sums such gradients.
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def delta(self) -> torch.Tensor:
        """Return what merging adds to this rank's part of the projection's weight, in float32."""
        return self.scale * (self.B.detach().float() @ self.A.detach().float())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            dict(self.sharded_axis),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ColumnAdapter(Adapter):
    """An adapter whose output features are split: A is replicated, B holds this rank's rows."""

    sharded_axis: ClassVar[Mapping[str, int]] = {"B": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.linear(x, self.A)
        # Each rank's B sees all of u, so u's gradient is the sum over ranks.
        if self.sequence_parallel:  # x is this rank's part of the sequence
            u = gather_from_sequence_parallel_region(u, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            u = copy_to_tensor_model_parallel_region(u, group=self.tp_group)
        return self.scale * F.linear(u, self.B)


class RowAdapter(Adapter):
    """An adapter whose input features are split: A holds this rank's columns, B is replicated."""

    sharded_axis: ClassVar[Mapping[str, int]] = {"A": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.linear(x, self.A)  # this rank's summand, of width r
        if self.sequence_parallel:
            u = reduce_scatter_to_sequence_parallel_region(u, group=self.tp_group)
        else:
            u = reduce_from_tensor_model_parallel_region(u, group=self.tp_group)
        return self.scale * F.linear(u, self.B)


class _AdaptedLinear(nn.Module):
    """A mix-in that `_attach` adds to the class of a Megatron or Transformer Engine linear layer."""

    weight: nn.Parameter
    adapters_enabled: bool
    adapter_names: tuple[str, ...]
    groups: int
    """Query groups on this rank, by which the outputs interleave; 1 when they just follow each other."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)
        if self.adapters_enabled:
            outputs = [self.get_submodule(name)(x).unflatten(-1, (self.groups, -1)) for name in self.adapter_names]
            output = output + torch.cat(outputs, dim=-1).flatten(-2)
        return output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # The layer itself treats everything except its own weight as replicated; the adapters state their own split.
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        for name in self.adapter_names:
            adapter = self.get_submodule(name)
            assert isinstance(adapter, Adapter)
            sharded.update(adapter.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return sharded


def _attach(layer: nn.Module, module: str, named: Mapping[str, Adapter], *, groups: int) -> None:
    """Turn a linear module into an adapted one in place, as FSDP does: its parameters and their names stay."""
    linear = layer.get_submodule(module)
    for name, adapter in named.items():
        linear.add_module(name, adapter)
    linear.__class__ = type(f"Adapted{type(linear).__name__}", (_AdaptedLinear, type(linear)), {})
    assert isinstance(linear, _AdaptedLinear)
    linear.adapters_enabled = True
    linear.adapter_names = tuple(named)
    linear.groups = groups


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Make a frozen embedding's output require a gradient: recomputation builds a graph only for inputs that do."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _kaiming_uniform(shape: tuple[int, int], *, seed: int, name: str) -> torch.Tensor:
    """Draw PEFT's initial values for the whole matrix, so that they do not depend on how it is split."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
