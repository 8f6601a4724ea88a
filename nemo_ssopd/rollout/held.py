"""Compare the weights that vLLM's model uses, bit for bit, with those that the trainer sent.

    stale = differing_weights(model, sent, packed=True)      # names; none after a good refit

vLLM fuses projections and splits them over its tensor-parallel ranks. On CPU it also packs them for its kernels and
drops the weight itself. There we run the layer: an input that is 1 in one place and 0 elsewhere gives one column of the
weight that the layer really uses, exactly in every dtype. On a GPU nothing is packed, and we read the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ssopd.types import SentTensor

HEAD = "lm_head.weight"
"""The name of the output layer's weight, in every model of vLLM."""


def differing_weights(model: Any, sent: Mapping[str, SentTensor], *, packed: bool) -> list[str]:
    """Return the names of tensors that this rank does not hold as they were sent, or that were not sent.

    `sent` has Hugging Face names. A tied output layer must equal the embedding. `model` is vLLM's, without LoRA.
    """
    embedding = next((name for name, tensor in sent.items() if tensor.is_vocabulary and name != HEAD), None)
    sources = {HEAD: sent[embedding], **sent} if embedding else sent
    places = _places(model)
    missing = [name for name in places if name not in sources] + [name for name in sent if name not in places]
    return missing + [
        name
        for name, place in places.items()
        if name in sources and not place.holds(sources[name], packed=packed and name != embedding)
    ]


def differing_adapters(manager: Any, adapter_id: int | None, sent: Mapping[str, SentTensor]) -> list[str]:
    """Return the names of the LoRA matrices that this rank does not hold as they were sent.

    `sent` has PEFT's names and whole matrices, with B times alpha / r. `manager` is vLLM's LoRAModelManager.
    """
    if adapter_id is None or adapter_id not in manager.lora_index_to_id:
        return list(sent)
    slot, held = manager.lora_index_to_id.index(adapter_id), {}
    for module, layer in manager.modules.items():
        for part, projection in enumerate(manager.packed_modules.get(module, [module])):
            held[f"base_model.model.{projection}"] = layer, part
    return [name for name, source in sent.items() if not _holds_matrix(held, slot, name, source.values)]


def _holds_matrix(held: Mapping[str, tuple[Any, int]], slot: int, name: str, sent: torch.Tensor) -> bool:
    """Tell whether this rank holds its part of one matrix.

    vLLM's buffers are [slots, 1, rows, columns], with zeros beyond the adapter's rank.
    """
    projection, matrix, _ = name.rsplit(".", 2)
    if projection not in held:
        return False
    layer, part = held[projection]
    if matrix == "lora_A":
        found = layer.lora_a_stacked[part][slot, 0, : sent.shape[0]]
        first = _first(sent.shape[1], found.shape[1], layer)
        return torch.equal(found, sent[:, first : first + found.shape[1]])
    found = layer.lora_b_stacked[part][slot, 0, :, : sent.shape[1]]
    first = _first(sent.shape[0], found.shape[0], layer)
    return torch.equal(found, sent[first : first + found.shape[0]])


def _first(whole: int, local: int, layer: Any) -> int:
    """Return this rank's first row or column out of `whole`. If ranks outnumber parts, neighbors share one."""
    return 0 if whole == local else layer.tp_rank * (whole // local) // layer.tp_size * local


def _own_tokens(embedding: Any) -> tuple[int, int]:
    """Return the first token that this rank has a row for, and one past the last."""
    shard = embedding.shard_indices
    return shard.org_vocab_start_index, shard.org_vocab_end_index


@dataclass(frozen=True)
class _Place:
    """The place of this rank's part of a tensor in vLLM's model: some rows of a layer's weight, or of its bias.

    >>> _Place(qkv_proj, "weight", slice(1024, 1536))      # a k_proj.weight
    """

    layer: Any
    kind: str
    rows: slice

    def holds(self, sent: SentTensor, *, packed: bool) -> bool:
        if len(sent.shape) == 1:
            found = self._vector(packed=packed and self.kind == "bias", like=sent.values)
            first = _first(sent.shape[0], len(found), self.layer)
            return torch.equal(found, sent.values[first : first + len(found)])
        width = self._width(sent)
        start = _first(sent.shape[1], width, self.layer)
        sampled = range(sent.first, sent.shape[1], sent.step)
        own = [index for index, column in enumerate(sampled) if start <= column < start + width]
        found = self._columns([sampled[index] - start for index in own], width, packed=packed, like=sent.values)
        if sent.is_vocabulary:
            first, last = _own_tokens(self.layer)
            found = found[: last - first]  # the rows after these are padding
        else:
            first = _first(sent.shape[0], len(found), self.layer)
            last = first + len(found)
        return torch.equal(found, sent.values[first:last, own])

    def _width(self, sent: SentTensor) -> int:
        return sent.shape[1] if sent.is_vocabulary else self.layer.input_size_per_partition

    def _columns(self, columns: list[int], width: int, *, packed: bool, like: torch.Tensor) -> torch.Tensor:
        if not packed:
            return self.layer.get_parameter(self.kind)[self.rows, columns]
        one_hot = torch.zeros(len(columns), width, dtype=like.dtype)
        one_hot[range(len(columns)), columns] = 1
        return self.layer.quant_method.apply(self.layer, one_hot).T[self.rows]

    def _vector(self, *, packed: bool, like: torch.Tensor) -> torch.Tensor:
        if not packed:
            return self.layer.get_parameter(self.kind)[self.rows]
        zero = torch.zeros(1, self.layer.input_size_per_partition, dtype=like.dtype)
        return self.layer.quant_method.apply(self.layer, zero, self.layer.bias)[0, self.rows]


def _places(model: Any) -> dict[str, _Place]:
    """Return the place of every Hugging Face tensor. A fused layer gives one place for each of its parts."""
    places = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        parts = model.packed_modules_mapping.get(leaf)
        for kind, _ in layer.named_parameters(recurse=False):
            if parts is None:
                places[f"{path}.{kind}"] = _Place(layer, kind, slice(None))
                continue
            start = 0
            for part, size in zip(parts, layer.output_partition_sizes, strict=True):
                places[f"{parent}.{part}.{kind}"] = _Place(layer, kind, slice(start, start + size))
                start += size
    return places
