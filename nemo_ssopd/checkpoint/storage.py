"""Checkpoint folders on disk: sealed by checksums, visible only once whole, read without running code in them.

Tensors are in Megatron-Core's distributed format (`torch_dist`). All ranks call the functions that take a `runtime`
together. An error on one rank is a `CheckpointError` on all.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_ssopd.megatron.runtime import Runtime

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST, COMMON, TENSOR_INDEX = "manifest.json", "common.pt", ".metadata"

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read. Raised on all ranks."""


# ---- Folders ---------------------------------------------------------------------------------------------------------


def checkpoints(parent: Path) -> list[Path]:
    """Return the checkpoints in run_dir/checkpoints, newest first, including damaged ones."""
    return sorted((folder for folder in parent.glob("iter_*") if folder.is_dir()), reverse=True)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the newest checkpoint of a run, unverified; None without any."""
    return next(iter(checkpoints(Path(run_dir) / "checkpoints")), None)


def write_checkpoint(final: Path, snapshot: Snapshot, write_texts: Callable[[Path], None], runtime: Runtime) -> None:
    """Write the folder `final`, whole or not at all; on rank 0, `write_texts` adds what is not a tensor."""
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        on_main(runtime, lambda: _start(temporary))
        _write_tensors(snapshot, temporary, runtime)
        on_main(runtime, lambda: write_texts(temporary))
        _seal(temporary, runtime)
        on_main(runtime, lambda: _publish(temporary, final))
    except CheckpointError:
        # All ranks wait here: if one exited first, the launcher would kill rank 0 before it is done.
        on_main(runtime, lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def _start(temporary: Path) -> None:
    """Make an empty folder to write into, and remove what killed runs left behind."""
    parent = temporary.parent
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*parent.glob(".iter_*.tmp"), *parent.glob(".iter_*.old")):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _seal(folder: Path, runtime: Runtime) -> None:
    """Flush every file to disk, then write the manifest of their checksums; the ranks share the work."""
    names = on_main(runtime, lambda: sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()))

    def flush_and_hash() -> dict[str, dict[str, Any]]:
        return {name: _checksum(folder / name, flush=True) for name in names[runtime.rank :: runtime.world_size]}

    parts = everywhere(runtime, flush_and_hash)
    files = {name: entry for part in parts for name, entry in sorted(part.items())}
    on_main(runtime, lambda: _write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=2)))


def _publish(temporary: Path, final: Path) -> None:
    """Make the checkpoint visible under its final name, in place of a damaged one of the same step."""
    for folder in (*(f for f in temporary.iterdir() if f.is_dir()), temporary):
        _flush(folder)
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(final.with_name(f".{final.name}.old"), ignore_errors=True)
    write_tracker(final.parent / TRACKER, final)


def write_tracker(tracker: Path, checkpoint: Path) -> None:
    """Write a file that names a checkpoint by its step."""
    temporary = tracker.with_suffix(".tmp")
    _write_durably(temporary, str(int(checkpoint.name.removeprefix("iter_"))))
    temporary.rename(tracker)


def damage(folder: Path, runtime: Runtime) -> str | None:
    """Return how the files of a checkpoint differ from its manifest, on all ranks; None when they do not."""

    def check() -> str | None:
        try:
            files = json.loads((folder / MANIFEST).read_text())["files"]
            for name in sorted(files)[runtime.rank :: runtime.world_size]:
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if (folder / name).stat().st_size != files[name]["bytes"]:
                    return f"{name} has {(folder / name).stat().st_size} bytes, not {files[name]['bytes']}"
                if _checksum(folder / name) != files[name]:
                    return f"{name} has another checksum than {MANIFEST} says"
        except OSError as error:
            return str(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{MANIFEST} is not a manifest: {error}"
        return None

    return next(filter(None, everywhere(runtime, check)), None)


# ---- Writing tensors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint except its text files: tensors by key, and other data."""

    tensors: dict[str, Any]
    common: dict[str, Any]
    value_of: Callable[[MetadataIndex], torch.Tensor] | None = None
    """Function that returns the values of one shard, when the tensors have none yet."""


def take_snapshot(sharded: dict[str, Any], *, copy: bool) -> Snapshot:
    """Take a snapshot of a sharded state dict. A copy, in host memory, stays unchanged while training continues."""
    tensors, common = save_preprocess(sharded)
    if copy:
        common = deepcopy(common)
        for tensor in nested_values(tensors):
            if isinstance(tensor, ShardedTensor):
                tensor.data = tensor.data.detach().to("cpu", copy=True)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    return Snapshot(mcore_to_pyt_state_dict(by_key), common)


class _SavePlanner(MCoreSavePlanner):
    """Megatron's planner, except that `Snapshot.value_of` may supply a value when it is written."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False)
        self._value_of = snapshot.value_of

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return self._value_of(index) if self._value_of and isinstance(found, torch.Tensor) else found


def _write_tensors(snapshot: Snapshot, folder: Path, runtime: Runtime) -> None:
    """Write tensors as `dist_checkpointing.save` does, in the same format, with two differences.

    This process writes the tensors: Megatron's writer starts others, which import the main script again. A full disk on
    one rank is an error on all: with Megatron's writer, the others would wait in a barrier.
    """
    # With several threads, an error in any except the first would be lost.
    writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=1)
    planner = _SavePlanner(snapshot)
    everywhere(
        runtime,
        lambda: dcp.save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=runtime.cpu_group),
    )

    def write_common() -> None:
        with open(folder / COMMON, "wb") as file:
            torch.save(snapshot.common, file)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    on_main(runtime, write_common)


# ---- Reading tensors without running what is in the file -------------------------------------------------------------

# Two files of Megatron-Core's format are pickles. Each is first read by an unpickler that knows only the names below,
# or by torch's own for weights. Only then does Megatron read it.
ALLOWED_IN_INDEX = {
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_IN_INDEX:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _CheckedLoad(TorchDistLoadShardedStrategy):
    """Megatron's loader, with a check of the tensors' index first."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str, *strategy: str) -> dict[str, Any]:
        """Fill `sharded_state_dict`. Since 0.17, megatron-core also passes the name of an async save strategy."""
        index = read_index(Path(checkpoint_dir))
        for tensor in nested_values(sharded_state_dict):
            assert isinstance(tensor, ShardedTensor)
            _saved_tensor(index, tensor.key, checkpoint_dir)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about torch's names for itself
            return cast(dict[str, Any], super().load(sharded_state_dict, checkpoint_dir, *strategy))


def read_tensors(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill `sharded` and return it, with the checkpoint's data other than tensors added."""
    read_common(folder)
    return cast(dict[str, Any], dist_checkpointing.load(sharded, str(folder), sharded_strategy=_CheckedLoad()))


def fill_tensors(sharded: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `sharded` in place from the checkpoint; read only the parts that they need.

    Megatron's own loader reads all layers of a stack or none. The padding of a vocabulary becomes zero.
    """
    apply_factories(sharded)
    index, targets, items = read_index(folder), {}, []
    for tensor in nested_values(sharded):
        assert isinstance(tensor, ShardedTensor)
        saved = _saved_tensor(index, tensor.key, folder)
        if saved.size != torch.Size(tensor.global_shape) and not tensor.allow_shape_mismatch:
            raise ValueError(
                f"{folder} has {tensor.key} as {tuple(saved.size)}, the model as {tuple(tensor.global_shape)}: it was "
                f"written for another model"
            )
        data = tensor.data.detach().view(*(1,) * tensor.prepend_axis_num, *tensor.local_shape)
        if tensor.allow_shape_mismatch:
            data.zero_()
        chunk = ChunkStorageMetadata(torch.Size(tensor.global_offset), data.shape)
        targets[MetadataIndex(tensor.key, chunk.offsets)] = data
        items += create_read_items_for_chunk_list(tensor.key, saved, [chunk])
    reader = dcp.FileSystemReader(folder)
    reader.set_up_storage_reader(index, is_coordinator=True)
    reader.read_data(LoadPlan(items), _Into(targets))


class _Into(DefaultLoadPlanner):
    """A planner that makes torch's reader copy into the given tensors, by name and place."""

    def __init__(self, targets: dict[MetadataIndex, torch.Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[read_item.dest_index]
        return narrow_tensor_by_index(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it is a view of the target


def _saved_tensor(index: Metadata, key: str, folder: str | Path) -> TensorStorageMetadata:
    """Return a tensor's entry in the index; ValueError for an entry of another kind, which would be unpickled."""
    saved = index.state_dict_metadata.get(key)
    if type(saved) is not TensorStorageMetadata:
        raise ValueError(f"{folder} has no tensor {key}: it was written for another model")
    return saved


def read_common(folder: Path) -> dict[str, Any]:
    """Read common.pt, which Megatron-Core 0.19 does not write. ValueError when it is more than data."""
    if not (folder / COMMON).is_file():
        return {}
    try:
        common = torch.load(folder / COMMON, map_location="cpu", weights_only=True)  # noqa: TID251 -- data alone
        return cast(dict[str, Any], common)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / COMMON} is not data only, and was not loaded: {error}") from error


def read_index(folder: Path) -> Metadata:
    """Read the index of tensors; ValueError when it is more than data, or names files outside its folder."""
    try:
        with open(folder / TENSOR_INDEX, "rb") as file:
            index = cast(Metadata, _IndexUnpickler(file).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / TENSOR_INDEX} is not an index of tensors, and was not loaded: {error}") from error
    outside = {i.relative_path for i in index.storage_data.values() if Path(i.relative_path).name != i.relative_path}
    if outside:
        raise ValueError(f"{folder / TENSOR_INDEX} points outside its folder: {sorted(outside)}")
    return index


# ---- Files, and agreement between ranks ------------------------------------------------------------------------------


def everywhere(runtime: Runtime, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank, and return all results. An error on one is raised on all, so that none waits."""
    result: T | None = None
    failure: str | None = None
    cause: BaseException | None = None
    try:
        result = action()
    except CheckpointException as error:  # from torch's writer, on all ranks
        failure = "; ".join(f"rank {rank}: {what!r}" for rank, (what, _) in sorted(error.failures.items()))
        cause = error
    except Exception as error:
        # torch's writer hides a full disk behind an error of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        failure = f"rank {runtime.rank}: {cause!r}"
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, (result, failure), group=runtime.cpu_group)
    if failures := dict.fromkeys(failure for _, failure in gathered if failure):
        raise CheckpointError("; ".join(failures)) from cause
    return [result for result, _ in gathered]


def on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result on every rank."""
    return cast(T, everywhere(runtime, lambda: action() if runtime.is_main else None)[0])


def _checksum(file: Path, *, flush: bool = False) -> dict[str, Any]:
    with open(file, "rb") as opened:
        if flush:
            os.fsync(opened.fileno())
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _write_durably(file: Path, text: str) -> None:
    with open(file, "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _flush(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
