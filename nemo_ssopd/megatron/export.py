"""Hugging Face directories from the policy: merged weights, config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_ssopd.megatron.actor import MegatronGRPOActor

SHARD_BYTES = 4 * 2**30
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def export_hf(actor: MegatronGRPOActor, base: str | Path, output: Path) -> None:
    """Write a directory that transformers and vLLM load, whole or not at all. All ranks call it; rank 0 writes.

    Tensors are gathered one at a time, and a shard is on disk before the next begins, so that host memory holds
    one shard. Everything that is not a weight is copied from `base`, the directory that training started from.
    """
    temporary = output.with_name(output.name + ".tmp")
    if actor.runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = shard_bytes = 0

    def flush() -> None:
        files.append(f"model-{len(files) + 1:05}.safetensors")
        save_file(shard, temporary / files[-1], metadata={"format": "pt"})
        weight_map.update({name: files[-1] for name in shard})
        shard.clear()

    for name, tensor in actor.weights():
        if not actor.runtime.is_main:
            continue
        size = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + size > SHARD_BYTES:
            flush()
            shard_bytes = 0
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        shard_bytes += size
        total += size
    if not actor.runtime.is_main:
        return
    flush()
    if len(files) == 1:
        (temporary / files[0]).rename(temporary / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for pattern in COPIED:
        for file in Path(base).glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, temporary / file.name)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
