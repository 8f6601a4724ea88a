"""Checkpoints of a run: written whole or not at all, verified by checksum, restored bit for bit, at any layout.

    state = load_checkpoint(actor, config)             # newest undamaged one of run_dir; LoopState() without any
    save_checkpoint(actor, config, state)              # all ranks; run_dir/checkpoints/iter_0000100/
    model = load_policy(checkpoint, runtime, parallel) # for export and evaluation: no optimizer

A checkpoint is a folder in Megatron-LM's layout: the tensors in Megatron-Core's distributed format (`torch_dist`),
`state.json`, the run's `config.yaml`, the base model's config and tokenizer in `hf/`, and `manifest.json` with a
checksum of every file. LoRA runs save the adapters, and a fingerprint of the base model that they belong to.
`docs/checkpoints.md` says the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_ssopd.config import Config, ParallelConfig
from nemo_ssopd.hf_config import read_hf_config
from nemo_ssopd.megatron.actor import MegatronGRPOActor
from nemo_ssopd.megatron.export import COPIED
from nemo_ssopd.megatron.lora import add_lora
from nemo_ssopd.megatron.model import build_model
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import load_hf_weights
from nemo_ssopd.metrics import Metrics

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST, STATE, COMMON, TENSOR_INDEX = "manifest.json", "state.json", "common.pt", ".metadata"
FORMAT = 1

# Of the formats that Megatron-Core has for the distributed optimizer, the one that loads at every other layout; the
# moments are gathered in host memory on the first data-parallel rank.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read. Raised on all ranks alike."""


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands. Data order and sampling seeds follow from the step, so nothing else needs saving.

    >>> LoopState(step=99, tokens=5000).after({"progress/tokens": Sum(70), "optim/skipped_steps": Max(0.0)})
    LoopState(step=100, tokens=5070, skipped=0, skipped_in_a_row=0)
    """

    step: int = 0
    """Completed steps."""
    tokens: int = 0
    """Completion tokens trained on."""
    skipped: int = 0
    """Steps with an update that was skipped since it was not finite."""
    skipped_in_a_row: int = 0

    def after(self, metrics: Metrics) -> LoopState:
        """One step later, by its metrics over all ranks."""
        skipped = metrics["optim/skipped_steps"].value() > 0
        return LoopState(
            step=self.step + 1,
            tokens=self.tokens + int(metrics["progress/tokens"].value()),
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
        )


# ---- Saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(actor: MegatronGRPOActor, config: Config, state: LoopState) -> Path:
    """Write run_dir/checkpoints/iter_STEP, then remove older ones than trainer.keep_checkpoints. All ranks call it."""
    runtime = actor.runtime
    parent = Path(config.run_dir) / "checkpoints"
    final, temporary = parent / f"iter_{state.step:07}", parent / f".iter_{state.step:07}.tmp"
    sharded = _state_dict(actor, is_loading=False) | {
        "opt_param_scheduler": actor.scheduler.state_dict(),
        "iteration": state.step,
        "checkpoint_version": 3.0,
        "content_metadata": CONTENT,
    }
    try:
        _on_main(runtime, lambda: _start(parent, temporary))
        _write_tensors(sharded, temporary, runtime)
        _on_main(runtime, lambda: _write_texts(temporary, config, state))
        _seal(temporary, runtime)
        _on_main(runtime, lambda: _publish(temporary, final))
    except CheckpointError as error:
        # Together: a rank that ends first would have the launcher end rank 0 before it is done.
        _on_main(runtime, lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise CheckpointError(
            f"step {state.step} could not be saved under run_dir={config.run_dir!r}: {error}. Older checkpoints are as "
            f"they were: make room, or lower trainer.keep_checkpoints, and start again with trainer.resume=true"
        ) from error
    if runtime.is_main:
        _remove_older(final, keep=config.trainer.keep_checkpoints)
    return final


def _start(parent: Path, temporary: Path) -> None:
    """An empty folder to write into, without what killed runs left behind."""
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*parent.glob(".iter_*.tmp"), *parent.glob(".iter_*.old")):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _write_tensors(sharded: dict[str, Any], folder: Path, runtime: Runtime) -> None:
    """What `dist_checkpointing.save` does, in the same format, with two differences.

    The tensors are written by this process: Megatron's writer starts others, which import the main script again. And a
    full disk on one rank is an error on all: there, the others would wait in a barrier.
    """
    tensors, common = save_preprocess(sharded)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    # With several threads, an error in any but the first would be lost.
    writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=1)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    _everywhere(
        runtime,
        lambda: dcp.save(
            mcore_to_pyt_state_dict(by_key), storage_writer=writer, planner=planner, process_group=runtime.cpu_group
        ),
    )

    def write_common() -> None:
        with open(folder / COMMON, "wb") as file:
            torch.save(common, file)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    _on_main(runtime, write_common)


def _write_texts(folder: Path, config: Config, state: LoopState) -> None:
    about = {"format": FORMAT, "loop": asdict(state), "base": _base(config)}
    (folder / STATE).write_text(json.dumps(about, indent=2) + "\n")
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    (folder / "hf").mkdir()
    for pattern in COPIED:
        for file in Path(config.model.path).glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / "hf" / file.name)


def _seal(folder: Path, runtime: Runtime) -> None:
    """Every file to the disk, then the manifest of their checksums; the ranks share the work."""
    names = _on_main(runtime, lambda: sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()))

    def flush_and_hash() -> dict[str, dict[str, Any]]:
        return {name: _checksum(folder / name, flush=True) for name in names[runtime.rank :: runtime.world_size]}

    parts = _everywhere(runtime, flush_and_hash)
    files = {name: entry for part in parts for name, entry in sorted(part.items())}
    _on_main(runtime, lambda: _write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=2)))


def _publish(temporary: Path, final: Path) -> None:
    """From here on, the checkpoint exists. A damaged one of the same step makes way."""
    for folder in (temporary / "hf", temporary):
        _flush(folder)
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(final.with_name(f".{final.name}.old"), ignore_errors=True)
    tracker = final.parent / TRACKER
    _write_durably(tracker.with_suffix(".tmp"), str(int(final.name.removeprefix("iter_"))))
    tracker.with_suffix(".tmp").rename(tracker)


def _remove_older(final: Path, *, keep: int) -> None:
    if keep:
        older = [folder for folder in checkpoints(final.parent) if folder.name < final.name]
        for folder in older[keep - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoints in run_dir/checkpoints, newest first, damaged ones included."""
    return sorted((folder for folder in parent.glob("iter_*") if folder.is_dir()), reverse=True)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run, unverified."""
    return next(iter(checkpoints(Path(run_dir) / "checkpoints")), None)


def load_checkpoint(actor: MegatronGRPOActor, config: Config) -> LoopState:
    """Restore weights, moments and schedule from the newest undamaged checkpoint of run_dir. All ranks call it.

    The optimizer's hyper-parameters are those of `config`, so that a run can go on with another learning rate.
    """
    runtime = actor.runtime
    folder = _newest_undamaged(Path(config.run_dir) / "checkpoints", runtime)
    if folder is None:
        return LoopState()
    about = _about(folder, config.model.path, runtime)
    _check_same_kind(folder, saved_config(folder), config)
    loaded = _read_tensors(_state_dict(actor, is_loading=True), folder)
    actor.model.load_state_dict(loaded["model"], strict=False)
    for name, average in actor.teacher_average.items():
        average.copy_(loaded["teacher_average"][name])
    _load_optimizer(actor.optimizer, loaded["optimizer"])
    actor.scheduler.num_steps = 0
    actor.scheduler.step(increment=loaded["opt_param_scheduler"]["num_steps"])
    return LoopState(**about["loop"])


def load_weights_only(model: GPTModel, checkpoint: Path, runtime: Runtime, *, base: str | Path) -> None:
    """Fill `model` from a checkpoint: its adapters, which must be attached and belong to `base`, or all its weights."""
    if problem := _damage(checkpoint, runtime):
        raise CheckpointError(f"{checkpoint} is damaged: {problem}. Use another checkpoint")
    _about(checkpoint, str(base), runtime)
    model.load_state_dict(_read_tensors({"model": _trained_weights(model)}, checkpoint)["model"], strict=False)


def load_policy(
    checkpoint: Path, runtime: Runtime, parallel: ParallelConfig, *, base: str | Path | None = None
) -> GPTModel:
    """The model of a checkpoint at any layout, without an optimizer. `base` is for a base model that has moved."""
    config = saved_config(checkpoint)
    base = base or config.model.path
    hf = read_hf_config(checkpoint / "hf")
    model = build_model(hf, config.model, parallel, runtime)
    if config.lora.enabled:
        load_hf_weights(model, hf, base, runtime)
        add_lora(model, config.lora, seed=config.trainer.seed, runtime=runtime)
    load_weights_only(model, checkpoint, runtime, base=base)
    return model


def saved_config(checkpoint: Path) -> Config:
    """The config of the run that wrote a checkpoint."""
    values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml")))
    sections = get_type_hints(Config)
    return Config(**{name: sections[name](**v) if isinstance(v, dict) else v for name, v in values.items()})


def _newest_undamaged(parent: Path, runtime: Runtime) -> Path | None:
    names = _on_main(runtime, lambda: [folder.name for folder in checkpoints(parent)])
    problems = []
    for name in names:
        problem = _damage(parent / name, runtime)
        if problem is None:
            return parent / name
        problems.append(f"{parent / name} is damaged: {problem}")
        if runtime.is_main:
            logger.warning("%s; trying the one before", problems[-1])
    if problems:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(problems)}. Restore one from a backup, or set another run_dir"
        )
    return None


def _damage(folder: Path, runtime: Runtime) -> str | None:
    """What is wrong with the files of a checkpoint by its manifest, on all ranks; None when nothing is."""

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

    return next(filter(None, _everywhere(runtime, check)), None)


def _about(folder: Path, base: str | Path, runtime: Runtime) -> dict[str, Any]:
    """state.json, after making sure that `base` is the model that the adapters were trained on."""
    about = cast(dict[str, Any], json.loads((folder / STATE).read_text()))
    if about["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {about['format']}, this version reads {FORMAT}: load it with the version it is of"
        )
    if about["base"] is not None:
        fingerprint = _on_main(runtime, lambda: base_fingerprint(str(base)))
        if fingerprint != about["base"]["fingerprint"]:
            raise ValueError(
                f"the adapters in {folder} were trained on {about['base']['path']!r}, and model.path={str(base)!r} "
                f"holds other weights (fingerprint {fingerprint[:12]}, not {about['base']['fingerprint'][:12]}): "
                f"point model.path at that model"
            )
    return about


def _check_same_kind(folder: Path, saved: Config, config: Config) -> None:
    """What decides which tensors a checkpoint has, and must be as it was."""
    fields = {
        "lora.enabled": (saved.lora.enabled, config.lora.enabled),
        "lora.rank": (saved.lora.rank, config.lora.rank),
        "lora.alpha": (saved.lora.alpha, config.lora.alpha),
        "model.dtype": (saved.model.dtype, config.model.dtype),
        "algorithm.teacher": (saved.algorithm.teacher, config.algorithm.teacher),
        "optimizer.distributed": (saved.optimizer.distributed, config.optimizer.distributed),
    }
    for name, (before, now) in fields.items():
        if before != now:
            raise ValueError(
                f"{name}={now} but {folder} was written with {name}={before}: set that, or use another run_dir"
            )


# ---- Which tensors ---------------------------------------------------------------------------------------------------


def _state_dict(actor: MegatronGRPOActor, *, is_loading: bool) -> dict[str, Any]:
    """The trained weights and the optimizer's state, by reference, with their places in the whole."""
    _complete_moments(actor.optimizer)
    weights = _trained_weights(actor.model)
    optimizer = actor.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(CONTENT))
    if optimizer.get("param_state", ...) is None:  # gathered on another rank
        del optimizer["param_state"]
    average = {name: _with_data(weights[name], tensor) for name, tensor in actor.teacher_average.items()}
    return {"model": weights, "optimizer": optimizer, "teacher_average": average}


def _with_data(weight: Any, average: torch.Tensor) -> Any:
    """The place of a weight, or the factory of a fused projection's places, for the teacher's average of it."""
    dtype = {"dtype": average.dtype} if isinstance(weight, ShardedTensor) else {}
    return replace(weight, key=f"teacher_average.{weight.key}", data=average, **dtype)


def _trained_weights(model: GPTModel) -> dict[str, Any]:
    """Adapters in a LoRA run, otherwise all. Modules would also save FP8 scales, as pickles; there are none."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.sharded_state_dict().items() if name in trained}


def _complete_moments(optimizer: ChainedOptimizer) -> None:
    """Adam allocates its moments at its first step; give it zeros now, which is what they then are."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _inner(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Torch's part of an optimizer's state: with bf16 weights, it is one level down."""
    return cast(dict[str, Any], state_dict.get("optimizer", state_dict))


def _load_optimizer(optimizer: ChainedOptimizer, loaded: dict[str, Any]) -> None:
    """Moments, step counts and float32 weights; hyper-parameters stay as they are.

    With torch's Adam, that is on CPU, Megatron-Core leaves the step counts to us. Its distributed optimizer looks for
    one in the saved state of each parameter, where none is, and then lets all parameters share one, which each would
    increment. Its other optimizers do not save a count of 0.
    """
    (part,) = optimizer.chained_optimizers
    hyper_parameters = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in part.param_groups]
    if isinstance(part, DistributedOptimizer):
        moments = loaded.pop("param_state")
        part.load_state_dict(loaded)
        states = part.optimizer.state.values()
        steps = [state.pop("step", None) for state in states]
        part.load_parameter_state_from_fully_reshardable(moments)
        for state, step in zip(states, steps, strict=True):
            if step is not None:
                state["step"] = step.clone()
    else:
        if isinstance(part.optimizer, torch.optim.Adam):
            _inner(loaded)["state"].setdefault("common_step", torch.tensor(0.0))
        part.load_state_dict(loaded)
    for group, values in zip(part.param_groups, hyper_parameters, strict=True):
        group.update(values)


# ---- Reading tensors without running what is in the file -------------------------------------------------------------

# Two files of Megatron-Core's format are pickles. Each is first read by an unpickler that knows the names below only,
# or by torch's own for weights; only then does Megatron get to read it.
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
    """Megatron's loader, after a look at the files."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> dict[str, Any]:
        index = _read_index(Path(checkpoint_dir))
        for tensor in nested_values(sharded_state_dict):
            assert isinstance(tensor, ShardedTensor)
            # An entry of another kind would be unpickled.
            kind = type(index.state_dict_metadata.get(tensor.key))
            if kind is not TensorStorageMetadata:
                raise ValueError(f"{checkpoint_dir} has no tensor {tensor.key}: it was written for another model")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about torch's names for itself
            return cast(dict[str, Any], super().load(sharded_state_dict, checkpoint_dir))


def _read_tensors(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`sharded`, filled; what the checkpoint holds beside tensors is added to it."""
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / COMMON} is not data only, and was not loaded: {error}") from error
    return cast(dict[str, Any], dist_checkpointing.load(sharded, str(folder), sharded_strategy=_CheckedLoad()))


def _read_index(folder: Path) -> Metadata:
    try:
        with open(folder / TENSOR_INDEX, "rb") as file:
            index = cast(Metadata, _IndexUnpickler(file).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder / TENSOR_INDEX} is not an index of tensors, and was not loaded: {error}") from error
    outside = {i.relative_path for i in index.storage_data.values() if Path(i.relative_path).name != i.relative_path}
    if outside:
        raise ValueError(f"{folder / TENSOR_INDEX} points outside its folder: {sorted(outside)}")
    return index


# ---- The base model of adapters --------------------------------------------------------------------------------------


def _base(config: Config) -> dict[str, str] | None:
    if not config.lora.enabled:
        return None
    return {"path": config.model.path, "fingerprint": base_fingerprint(config.model.path)}


@cache
def base_fingerprint(path: str) -> str:
    """SHA-256 over names, types, shapes and values of all tensors in a Hugging Face directory, however cut into files.

    Tensors of up to 1 MiB count whole, larger ones by 16 spread blocks of 64 KiB: any training run changes those.
    """
    digest = hashlib.sha256()
    for name, description, blocks in sorted(_tensor_samples(Path(path)), key=lambda sample: sample[0]):
        digest.update(f"{name} {description}\n".encode())
        for block in blocks():
            digest.update(block)
    return digest.hexdigest()


def _tensor_samples(path: Path) -> Iterator[tuple[str, str, Callable[[], Iterator[bytes]]]]:
    block, count = 64 * 1024, 16
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])

            def blocks(file: Path = file, start: int = start, stop: int = stop) -> Iterator[bytes]:
                size = stop - start
                with open(file, "rb") as opened:
                    if size <= block * count:
                        opened.seek(start)
                        yield opened.read(size)
                    else:
                        for i in range(count):
                            opened.seek(start + i * (size - block) // (count - 1))
                            yield opened.read(block)

            yield name, f"{entry['dtype']} {entry['shape']}", blocks


# ---- Files, and agreement between ranks ------------------------------------------------------------------------------


def _everywhere(runtime: Runtime, action: Callable[[], T]) -> list[T]:
    """`action` on every rank, and what each gave. Whatever fails on one fails on all, or the others would wait."""
    result: T | None = None
    failure: str | None = None
    cause: BaseException | None = None
    try:
        result = action()
    except CheckpointException as error:  # from torch's writer, on all ranks
        failure = "; ".join(f"rank {rank}: {what!r}" for rank, (what, _) in sorted(error.failures.items()))
        cause = error
    except Exception as error:
        failure, cause = f"rank {runtime.rank}: {error!r}", error
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, (result, failure), group=runtime.cpu_group)
    if failures := dict.fromkeys(failure for _, failure in gathered if failure):
        raise CheckpointError("; ".join(failures)) from cause
    return [result for result, _ in gathered]


def _on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """`action` on rank 0, and what it gave on every rank."""
    return cast(T, _everywhere(runtime, lambda: action() if runtime.is_main else None)[0])


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
    """Its list of names, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
