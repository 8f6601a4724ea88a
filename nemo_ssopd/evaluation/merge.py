"""From adapters and checkpoints to the Hugging Face directory that the engine starts from, one tensor at a time."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nemo_ssopd.config import ParallelConfig
from nemo_ssopd.evaluation.models import ModelSource
from nemo_ssopd.hf_config import read_hf_config
from nemo_ssopd.megatron.actor import MegatronGRPOActor
from nemo_ssopd.megatron.checkpoint import load_policy
from nemo_ssopd.megatron.export import export_hf
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import hf_weights

_LORA_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Options of PEFT that change what an adapter adds, and the value at which they do nothing.
_PLAIN = {"fan_in_fan_out": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def as_hugging_face(source: ModelSource, output: Path, parallel: ParallelConfig, runtime: Runtime) -> Path:
    """The directory itself, or `output` with the merged weights, made where it is not there yet. All ranks call it.

    No weight stays in memory: the engine, which comes next, holds the only copy.
    """
    if source.kind == "hf":
        return Path(source.path)
    if not output.exists():
        _export(source, output, parallel, runtime)
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier(group=runtime.cpu_group)
    return output


def remove_merged(folder: Path) -> None:
    """The weights of `as_hugging_face`, when nothing is left to be evaluated with them."""
    shutil.rmtree(folder, ignore_errors=True)


def _export(source: ModelSource, output: Path, parallel: ParallelConfig, runtime: Runtime) -> None:
    weights: Iterable[tuple[str, torch.Tensor]]
    if source.kind == "checkpoint":
        model = load_policy(Path(source.path), runtime, parallel, base=source.base)
        weights = hf_weights(model, read_hf_config(source.architecture), runtime)
    else:
        weights = merged_adapter(source) if runtime.is_main else ()
    export_hf(cast(MegatronGRPOActor, _Exported(runtime, weights)), source.architecture, output)


@dataclass(frozen=True)
class _Exported:
    """As much of an actor as `export_hf` asks for."""

    runtime: Runtime
    tensors: Iterable[tuple[str, torch.Tensor]]

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.tensors


def merged_adapter(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the base model, with W + scale B A where a PEFT LoRA adapter has one; in float32, then cast.

    ValueError for an adapter that adds anything else, or to tensors that the base model has not.
    """
    assert source.base is not None
    folder = Path(source.path)
    options = json.loads((folder / "adapter_config.json").read_text())
    special = {name: options[name] for name, plain in _PLAIN.items() if options.get(name, plain) not in (plain, None)}
    if options.get("peft_type") != "LORA" or special:
        raise ValueError(
            f"model: {folder} is not a plain LoRA adapter ({special or options.get('peft_type')}): merge "
            f"it with PEFT's merge_and_unload, and give the merged directory"
        )
    rank = options["r"]
    scale = options["lora_alpha"] / (math.sqrt(rank) if options.get("use_rslora") else rank)
    pairs = _lora_pairs(folder)
    with ExitStack() as stack:
        for file in sorted(Path(source.base).glob("*.safetensors")):
            tensors = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                pair = pairs.pop(name.removesuffix(".weight"), None)
                if pair is not None:
                    tensor = (tensor.float() + scale * pair["B"].float() @ pair["A"].float()).to(tensor.dtype)
                yield name, tensor
    if pairs:
        raise ValueError(
            f"model: {folder} adapts {', '.join(sorted(pairs)[:3])}, which {source.base} has not: give the model that "
            f"the adapter was trained on as base=PATH"
        )


def _lora_pairs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> its matrices A and B."""
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model: {file} cannot be read ({error}): save the adapter as safetensors") from error
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"model: {file} holds {name}, which is not a LoRA matrix: merge it with PEFT's merge_and_unload, and "
                f"give the merged directory"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    return pairs
