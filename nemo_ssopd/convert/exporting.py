"""Write Hugging Face and PEFT directories: weights or adapters, config, tokenizer, chat template, model card.

    export_hf(policy.weights(), "models/Qwen3-8B", Path("out"), runtime, dtype=torch.bfloat16, card=make_card)
    export_adapter(peft_weights(policy.model, runtime), config.lora, "models/Qwen3-8B", Path("out"), runtime)

Tensors go to disk one at a time: host memory holds one of them, and no other part of a shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_ssopd.config.sections import LoraConfig
from nemo_ssopd.megatron.runtime import Runtime

SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 256 * 2**10
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Weights = Iterable[tuple[str, torch.Tensor]]
Card = Callable[[], str]


def export_hf(
    weights: Weights, base: str | Path, output: Path, runtime: Runtime, *, dtype: torch.dtype, card: Card | None = None
) -> None:
    """Write a directory that transformers and vLLM load, whole or not at all. All ranks call it; rank 0 writes.

    Everything that is not a weight is copied from `base`, the directory that training started from; config.json then
    names `dtype`, the type of `weights`. `card` is called once the weights are written; its text becomes README.md.
    OSError, with what to do, when the disk is full.
    """
    if not runtime.is_main:
        _only_take_part(weights)
        return
    with _whole_or_nothing(output) as folder:
        copy_companions(Path(base), folder)
        _name_dtype(folder / "config.json", str(dtype).removeprefix("torch."))
        write_safetensors(weights, folder, "model")
        _write_card(folder, card)


def export_adapter(
    weights: Weights, lora: LoraConfig, base: str | Path, output: Path, runtime: Runtime, *, card: Card | None = None
) -> None:
    """Write an adapter directory that PEFT and vLLM load on `base`, whole or not at all. All ranks call it."""
    if not runtime.is_main:
        _only_take_part(weights)
        return
    with _whole_or_nothing(output) as folder:
        for file in _companions(Path(base)):
            if file.name not in ("config.json", "generation_config.json"):  # an adapter is no model
                shutil.copyfile(file, folder / file.name)
        write_adapter(weights, lora, str(base), folder)
        _write_card(folder, card)


def write_adapter(weights: Weights, lora: LoraConfig, base: str, folder: Path) -> None:
    """Write the two files of an adapter; `weights` have PEFT's names, which say what it adapts."""
    projections: dict[str, None] = {}

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            projections[name.split(".")[-3]] = None  # ...self_attn.q_proj.lora_A.weight
            yield name, tensor

    write_safetensors(noted(), folder, "adapter_model", shard_bytes=None)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(projections),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face directory other than weights: configs, tokenizer, chat template, license."""
    for file in _companions(source):
        shutil.copyfile(file, target / file.name)


def _name_dtype(file: Path, dtype: str) -> None:
    """Set, in config.json, the type that transformers and vLLM load weights in. transformers 4 wrote `torch_dtype`."""
    config = json.loads(file.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if any(config.get(key) != dtype for key in keys):
        file.write_text(json.dumps({**config, **dict.fromkeys(keys, dtype)}, indent=2) + "\n")


def _companions(source: Path) -> list[Path]:
    files = {file for pattern in COMPANIONS for file in source.glob(pattern)}
    return sorted(file for file in files if not file.name.endswith(".index.json"))


def write_safetensors(weights: Weights, folder: Path, stem: str, *, shard_bytes: int | None = SHARD_BYTES) -> None:
    """Write STEM.safetensors or, with more than `shard_bytes`, numbered shards and their index."""
    shards: list[_Shard] = []
    for name, tensor in weights:
        if not shards or not shards[-1].has_room(name, tensor, shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"{stem}-{len(shards) + 1:05}.part"))
        shards[-1].add(name, tensor)
    shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(folder / name)
        weight_map |= dict.fromkeys(shard.entries, name)
    index = {"metadata": {"total_size": sum(shard.bytes for shard in shards)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _Shard:
    """A safetensors file that grows by one tensor at a time.

    The format puts the header first, but it is known last. Room for it is left, and filled up with spaces.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.entries: dict[str, Any] = {}
        self._header_bytes = len(self._header())
        self._file = path.open("wb")
        self._file.seek(HEADER_BYTES)

    def has_room(self, name: str, tensor: torch.Tensor, shard_bytes: int | None) -> bool:
        longest_entry = len(name) + 200
        fits = shard_bytes is None or self.bytes + tensor.nbytes <= shard_bytes
        return fits and self._header_bytes + longest_entry <= HEADER_BYTES - 8

    def add(self, name: str, tensor: torch.Tensor) -> None:
        entry = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.bytes, self.bytes + tensor.nbytes],
        }
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self.entries[name] = entry
        self.bytes += tensor.nbytes
        self._header_bytes += len(json.dumps({name: entry}))

    def close(self) -> None:
        header = self._header().ljust(HEADER_BYTES - 8)
        assert len(header) == HEADER_BYTES - 8
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()

    def _header(self) -> bytes:
        return json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """Yield a folder next to `output` that replaces it at the end; after an error, remove it."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(output, ignore_errors=True)
        temporary.rename(output)
    except OSError as error:
        raise OSError(
            error.errno, f"{output} could not be written ({error.strerror}): make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _only_take_part(weights: Weights) -> None:
    """Iterate without using the tensors: the ranks gather each one together."""
    for _ in weights:
        pass


def _write_card(folder: Path, card: Card | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card(), encoding="utf-8")
