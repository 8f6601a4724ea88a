"""The place of a Hugging Face tensor in the model: a view into one Megatron-Core parameter, this rank's part of it.

shard = shard_of(weight, layer, hf)     # `weight` from the family's table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nemo_ssopd.models.family import HFModelConfig, Kind, Weight


@dataclass(frozen=True)
class Shard:
    """This rank's part of one Hugging Face tensor.

    >>> Shard("model.layers.0.self_attn.q_proj.weight", Kind.QUERY, view, shape=(2048, 4096))   # tensor-parallel size 2
    """

    name: str
    kind: Kind
    view: torch.Tensor
    """View into the Megatron parameter; its leading axes, flattened, are the rows."""
    shape: tuple[int, ...]
    """Shape of this rank's part. The last rows of a vocabulary may be padding."""

    def whole_shape(self, tp_size: int) -> list[int]:
        """Return the shape of the whole tensor, with the padding of a vocabulary."""
        return [size * tp_size if axis == self.kind.axis else size for axis, size in enumerate(self.shape)]


def shard_of(weight: Weight, module: nn.Module, hf: HFModelConfig) -> Shard:
    """Look `weight` up in `module`: the layer that it belongs to or, for one outside the layers, the model."""
    parameter = module.get_parameter(weight.parameter)
    view, of_row = _view(parameter, weight.kind, hf), parameter.shape[1:]
    return Shard(weight.name, weight.kind, view, (view.numel() // of_row.numel(), *of_row))


def _view(parameter: torch.Tensor, kind: Kind, hf: HFModelConfig) -> torch.Tensor:
    if kind is Kind.GATE or kind is Kind.UP:
        gate, up = parameter.chunk(2, dim=0)
        return gate if kind is Kind.GATE else up
    if kind.is_grouped:
        queries = hf.num_heads // hf.num_kv_heads
        groups = parameter.view(-1, queries + 2, hf.head_dim, *parameter.shape[1:])
        return {Kind.QUERY: groups[:, :queries], Kind.KEY: groups[:, queries], Kind.VALUE: groups[:, queries + 1]}[kind]
    return parameter
