"""Write adapters and checkpoints as the Hugging Face directory that the engine starts from, never all in memory."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_ssopd.checkpoint.saved_model import open_checkpoint, stream_policy
from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.convert.exporting import copy_companions, export_hf
from nemo_ssopd.evaluation.models import ModelSource
from nemo_ssopd.megatron.model import DTYPES
from nemo_ssopd.megatron.runtime import Runtime

_LORA_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# PEFT options that change what an adapter adds, with the value that disables each.
_PLAIN = {"fan_in_fan_out": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def as_hugging_face(source: ModelSource, output: Path, parallel: ParallelConfig, runtime: Runtime) -> Path:
    """Return the model's own directory, or `output` after writing the merged weights there. All ranks call it.

    No weight stays in memory: the engine, which starts next, holds the only copy.
    """
    if source.kind == "hf":
        return Path(source.path)
    if runtime.is_main:
        remove_merged(output)  # an interrupted call may have left another model there
    _export(source, output, parallel, runtime)
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier(group=runtime.cpu_group)
    return output


def remove_merged(folder: Path) -> None:
    """Delete the weights that `as_hugging_face` wrote, after the last evaluation that needs them."""
    shutil.rmtree(folder, ignore_errors=True)


def _export(source: ModelSource, output: Path, parallel: ParallelConfig, runtime: Runtime) -> None:
    if source.kind == "checkpoint":
        saved = open_checkpoint(Path(source.path), runtime, base=source.base)
        weights = stream_policy(saved, parallel, runtime)
        export_hf(weights, saved.hf_folder, output, runtime, dtype=DTYPES[saved.dtype])
    elif runtime.is_main:
        write_merged_adapter(source, output)


def write_merged_adapter(source: ModelSource, output: Path) -> None:
    """Copy the base model's directory, file by file, with W + scale B A for each weight that a PEFT LoRA adapter has.

    The output is written whole or not at all. The sum is taken in float32, then cast. ValueError for an adapter that
    adds anything else, or that adds to tensors that the base model does not have.
    """
    assert source.base is not None
    scale, pairs = _lora_scale(Path(source.path)), _lora_pairs(Path(source.path))
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    copy_companions(Path(source.base), temporary)
    for file in sorted(Path(source.base).iterdir()):
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name in tensors.keys() & pairs.keys():
                pair = pairs.pop(name)
                whole = tensors[name].float() + scale * pair["B"].float() @ pair["A"].float()
                tensors[name] = whole.to(tensors[name].dtype)
            save_file(tensors, temporary / file.name, metadata={"format": "pt"})
    if pairs:
        raise ValueError(
            f"model: {source.path} adapts {', '.join(sorted(pairs)[:3])}, which {source.base} has not: give the model "
            f"that the adapter was trained on as base=PATH"
        )
    temporary.rename(output)


def _lora_scale(folder: Path) -> float:
    options = json.loads((folder / "adapter_config.json").read_text())
    special = {name: options[name] for name, plain in _PLAIN.items() if options.get(name, plain) not in (plain, None)}
    if options.get("peft_type") != "LORA" or special:
        raise ValueError(
            f"model: {folder} is not a plain LoRA adapter ({special or options.get('peft_type')}): merge it with "
            f"PEFT's merge_and_unload, and give the merged directory"
        )
    rank = options["r"]
    return float(options["lora_alpha"] / (math.sqrt(rank) if options.get("use_rslora") else rank))


def _lora_pairs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the adapter. Return the name of each adapted weight -> its matrices {"A": ..., "B": ...}."""
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
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    return pairs
