"""Write a Hugging Face directory as a distributed checkpoint of all weights, for Megatron-LM and Megatron-Bridge.

    import_hf("models/Qwen3-8B", Path("out"), parallel, runtime)     # out/iter_0000000/

The whole model is never in memory: each rank reads and writes one matrix of one layer after another.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_ssopd.checkpoint.checkpoint import CONTENT, LoopState, trained_weights, write_texts
from nemo_ssopd.checkpoint.storage import CheckpointError, take_snapshot, write_checkpoint
from nemo_ssopd.config.run import Config, check_tensor
from nemo_ssopd.config.sections import DataConfig, Dtype, LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.convert.bridge import extra_states
from nemo_ssopd.megatron.model import DTYPES, build_model
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import load_hf_weights, tensor_files
from nemo_ssopd.models.family import HFModelConfig, read_hf_config


def import_hf(path: str, output: Path, parallel: ParallelConfig, runtime: Runtime, *, dtype: str | None = None) -> Path:
    """Write `output`/iter_0000000 and its tracker; return that folder. All ranks call it.

    ValueError when `path` is not a model that can be built; CheckpointError when the disk is full.
    """
    hf = read_hf_config(path)
    check_tensor(parallel, hf, path)
    config = Config(
        run_dir=str(output),
        model=ModelConfig(path=path, dtype=Dtype(dtype or stored_dtype(path))),
        lora=LoraConfig(enabled=False),
        parallel=parallel,
        data=DataConfig(train="none: imported from Hugging Face"),
    )
    with torch.device("meta"):
        model = build_model(hf, config.model, parallel, replace(runtime, device=torch.device("meta")))
    load_hf_weights(model, hf, path, runtime)  # for its checks: nothing of the model is in memory
    snapshot = take_snapshot(
        {
            "model": trained_weights(model),
            "iteration": 0,
            "checkpoint_version": 3.0,
            "content_metadata": CONTENT,
            "extra_states": extra_states(hf) if runtime.is_main else {},
        },
        copy=False,
    )
    final = output / "iter_0000000"
    snapshot = replace(snapshot, value_of=_FromHuggingFace(model, hf, path, runtime))
    try:
        write_checkpoint(final, snapshot, lambda folder: write_texts(folder, config, LoopState(), score=None), runtime)
    except CheckpointError as error:
        raise CheckpointError(f"{final} could not be written: {error}. Make room, or give another folder") from error
    return final


def stored_dtype(path: str) -> str:
    """Return the type of the weights in a Hugging Face directory; ValueError for a type that no model here has."""
    name, file = next(iter(tensor_files(Path(path)).items()))
    with safe_open(file, framework="pt", device="cpu") as tensors:
        dtype = tensors.get_slice(name).get_dtype()
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    if dtype not in names:
        raise ValueError(f"{path} holds {dtype} weights: say what they are to become, --dtype {' or '.join(DTYPES)}")
    return names[dtype]


class _FromHuggingFace:
    """The values of shards on the meta device: each is read when it is written, and then dropped."""

    def __init__(self, model: GPTModel, hf: HFModelConfig, path: str, runtime: Runtime) -> None:
        self._model, self._hf, self._path, self._runtime = model, hf, path, runtime
        self._owners = {name: module for name, module in model.named_modules() if module._parameters}
        self._owner_of = {
            place: owner for owner in self._owners for place in self._shards({owner}, trained_weights(model))
        }

    def __call__(self, index: MetadataIndex) -> torch.Tensor:
        place = (index.fqn, tuple(index.offset or ()))
        name = self._owner_of[place]
        owner: nn.Module = self._owners[name]
        owner.to_empty(device=self._runtime.device, recurse=False)
        load_hf_weights(self._model, self._hf, self._path, self._runtime)
        value = self._shards({name}, trained_weights(self._model))[place].clone()
        owner.to("meta")
        return value

    def _shards(self, owners: set[str], weights: dict[str, Any]) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
        """Return the shards of some modules' own parameters, as they are stored, by key and place in the whole."""
        chosen = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] in owners}
        apply_factories(chosen)
        shards = {}
        for tensor in nested_values(chosen):
            assert isinstance(tensor, ShardedTensor)
            data = tensor.data.detach().view(*(1,) * tensor.prepend_axis_num, *tensor.local_shape)
            shards[tensor.key, tuple(tensor.global_offset)] = data
        return shards
