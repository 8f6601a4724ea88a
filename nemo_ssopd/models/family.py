"""One record per model family: everything that is particular to its architecture.

    hf = read_hf_config("models/Qwen3-8B")           # by the record whose architecture config.json names
    for weight in hf.family.layer: ...               # a Hugging Face tensor and the Megatron parameter that holds it

A module of this folder that defines FAMILY adds an architecture; there is no list of them. `llama` is a complete
record, `qwen2` and `qwen3` say how they differ from it. Checks of a config read these records before anything heavy
is loaded: they import neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from nemo_ssopd import models


@dataclass(frozen=True)
class HFModelConfig:
    """The sizes of a decoder: RMSNorm, gated MLP, grouped-query attention, rotary positions.

    >>> hf = read_hf_config("models/Qwen3-8B")
    >>> hf.architecture, hf.num_layers, hf.num_heads, hf.num_kv_heads, hf.head_dim, hf.tied
    ('Qwen3ForCausalLM', 36, 32, 8, 128, False)
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding; it may exceed the tokenizer's length. Megatron's own may be padded beyond it."""
    max_position_embeddings: int
    tied: bool
    """True when the output layer shares the embedding's weight."""
    norm_eps: float
    rope_theta: float
    rope_scaling: float | None
    """The factor of llama3's RoPE scaling; None without scaling."""

    @property
    def family(self) -> Family:
        return families()[self.architecture]


class Kind(Enum):
    """How a Hugging Face tensor lies in a Megatron parameter. Parts of one parameter lie there in this order."""

    REPLICATED = auto()
    """Every tensor-parallel rank has the whole tensor."""
    ROWS = auto()
    """Rows, that is outputs, of which each rank has equally many."""
    COLUMNS = auto()
    """Columns, that is inputs, of which each rank has equally many."""
    VOCABULARY = auto()
    """Rows, which the parameter pads to a multiple of the ranks."""
    QUERY = auto()
    """Rows of the fused projection, which has one query group after the other: query heads, key head, value head."""
    KEY = auto()
    VALUE = auto()
    GATE = auto()
    """The first half of each rank's rows."""
    UP = auto()
    """The second half."""

    @property
    def axis(self) -> int | None:
        """The axis along which the ranks split the tensor."""
        return {Kind.REPLICATED: None, Kind.COLUMNS: 1}.get(self, 0)

    @property
    def is_grouped(self) -> bool:
        """Tell whether rows interleave by query groups."""
        return self in (Kind.QUERY, Kind.KEY, Kind.VALUE)


@dataclass(frozen=True)
class Weight:
    """A Hugging Face tensor, and the Megatron-Core parameter that holds it.

    >>> Weight("model.layers.{layer}.mlp.up_proj.weight", "mlp.linear_fc1.weight", Kind.UP, adapter="lora_up")
    """

    name: str
    """Name in the safetensors files. {layer} stands for the layer's number, counted from 0."""
    parameter: str
    """Path of the parameter in the layer or, outside the layers, in the model."""
    kind: Kind
    adapter: str | None = None
    """Name of the LoRA adapter in the parameter's module; None without one. Its shape follows from the parameter's."""

    @property
    def module(self) -> str:
        """Path of the Megatron module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def projection(self) -> str:
        """Name of the Hugging Face module that owns the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """How to read, build, load, adapt and export the models of one architecture."""

    architecture: str
    """Its name in config.json."""
    read: Callable[[dict[str, Any]], HFModelConfig]
    """Turn config.json into sizes; ValueError for a model that cannot be built, KeyError for a missing entry. May
    return a subclass with fields of its own."""
    embedding: Weight
    layer: tuple[Weight, ...]
    """All weights of a decoder layer. Modules with adapters have one for each of their weight matrices."""
    final_norm: Weight
    output: Weight
    """Absent from a model that ties it to the embedding."""
    megatron: Callable[[HFModelConfig], dict[str, Any]]
    """Return the fields of Megatron-Core's TransformerConfig that describe the model, which are also fields of
    Megatron-Bridge's provider. `activation_func` is a name in torch.nn.functional."""
    fp8_modules: tuple[str, ...]
    """Modules of a Transformer Engine layer that have FP8 scales. Bridge wants a state for each."""

    def weights_of(self, layer: int) -> list[Weight]:
        """Return the table of one decoder layer, counted from 0, under the tensors' full names."""
        return [replace(weight, name=weight.name.format(layer=layer)) for weight in self.layer]

    def adapted_in(self, layer: int) -> dict[str, dict[str, Weight]]:
        """Return the layer's weights that have adapters, by module and adapter, in the order of the module's rows."""
        by_module: dict[str, dict[str, Weight]] = {}
        for weight in sorted(self.weights_of(layer), key=lambda weight: weight.kind.value):
            if weight.adapter:
                by_module.setdefault(weight.module, {})[weight.adapter] = weight
        return by_module

    @property
    def vocabulary(self) -> tuple[str, str]:
        """Names of the two tensors with a row for each token."""
        return self.embedding.name, self.output.name


def families() -> dict[str, Family]:
    """Return every record in this folder, by architecture."""
    names = [f"{models.__name__}.{module.name}" for module in pkgutil.iter_modules(models.__path__)]
    records = [vars(importlib.import_module(name)).get("FAMILY") for name in names]
    return {record.architecture: record for record in records if record is not None}


def read_hf_config(path: str | Path) -> HFModelConfig:
    """Read `path`/config.json, as transformers 4 or 5 writes it; ValueError for a model that cannot be built."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={str(path)!r} has no config.json: point it at a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    known = families()
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    if architecture not in known:
        raise ValueError(f"{file} describes {architecture!r}, which cannot be built: use one of {', '.join(known)}")
    try:
        return known[architecture].read(raw)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: is it the file that the model was saved with?") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
