"""The work of scripts/export_hf.py and scripts/import_hf.py in each of their processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from nemo_ssopd.checkpoint.checkpoint import saved_config, saved_step
from nemo_ssopd.checkpoint.saved_model import SavedPolicy, open_checkpoint, stream_adapters, stream_policy
from nemo_ssopd.checkpoint.storage import CheckpointError
from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.convert.exporting import export_adapter, export_hf
from nemo_ssopd.convert.importing import import_hf
from nemo_ssopd.convert.verify import compare_with_export
from nemo_ssopd.megatron.runtime import Runtime, initialize, shutdown
from nemo_ssopd.megatron.weights import Rounding
from nemo_ssopd.observe.model_card import model_card

__all__ = ["CheckpointError", "export_checkpoint", "find_checkpoint", "import_model"]


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write a checkpoint as a Hugging Face or PEFT directory.

    ValueError for what cannot be exported and, with --verify, for an export that is not the trained model.
    """
    output: Path = arguments.output
    _check_is_new(output)
    if arguments.verify and arguments.adapter_only and find_spec("peft") is None:
        raise ValueError("--verify reloads adapters with PEFT, which is not installed: pip install peft")
    if arguments.dtype and arguments.adapter_only:
        raise ValueError("--dtype is for merged weights, adapters stay in the type they were trained in: leave it out")
    folder = find_checkpoint(arguments.checkpoint)
    parallel, runtime = _start()
    saved = open_checkpoint(folder, runtime, base=arguments.base)
    dtype, rounding = arguments.dtype or saved.dtype, Rounding()
    if arguments.adapter_only:
        if saved.lora is None:
            raise ValueError(f"{folder} holds all weights and no adapters: leave --adapter-only out")
        assert saved.base is not None
        weights = stream_adapters(saved, parallel, runtime)
        export_adapter(weights, saved.lora, saved.base, output, runtime, card=_card(saved, dtype, None))
    else:
        weights = stream_policy(saved, parallel, runtime, dtype=getattr(torch, dtype), rounding=rounding)
        card = _card(saved, dtype, rounding)
        export_hf(weights, saved.hf_folder, output, runtime, dtype=getattr(torch, dtype), card=card)
    _say(runtime, f"{folder} -> {output}")
    if arguments.verify:
        _verify(saved, output, parallel, runtime, is_adapter=arguments.adapter_only, dtype=dtype)
    shutdown()


def import_model(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face model as a checkpoint; ValueError for a model that cannot be built."""
    _check_is_new(arguments.output)
    parallel, runtime = _start()
    folder = import_hf(arguments.model, arguments.output, parallel, runtime, dtype=arguments.dtype)
    _say(runtime, f"{arguments.model} -> {folder}")
    shutdown()


def find_checkpoint(path: Path) -> Path:
    """Return the folder itself, or the newest iter_* in it or in its checkpoints/; ValueError when there is none."""
    for folder in (path, path / "checkpoints"):
        if (folder / ".metadata").is_file():
            return folder
        if newest := max((step for step in folder.glob("iter_*") if step.is_dir()), default=None):
            return newest
    raise ValueError(f"there is no checkpoint in {path}: give a run_dir, or a folder such as checkpoints/iter_0000100")


def _verify(
    saved: SavedPolicy, output: Path, parallel: ParallelConfig, runtime: Runtime, *, is_adapter: bool, dtype: str
) -> None:
    comparison = compare_with_export(saved, output, parallel, runtime, is_adapter=is_adapter, dtype=dtype)
    if comparison is None:
        return
    by = "PEFT" if is_adapter else "transformers"
    if problem := comparison.problem():
        raise ValueError(f"by {by}, {output} {problem}")
    _say(runtime, f"verified by {by}: {output} {comparison.line()}")


def _start() -> tuple[ParallelConfig, Runtime]:
    processes = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(world_size=processes, tensor=processes)
    return parallel, initialize(parallel, seed=1)


def _check_is_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} holds something: give another folder, or remove it")


def _card(saved: SavedPolicy, dtype: str, rounding: Rounding | None) -> Callable[[], str] | None:
    """Return a function that makes the model card; None for an imported model, which has a card of its own."""
    step, run_dir = saved_step(saved.folder), saved.folder.parents[1]
    if not step:
        return None
    return lambda: model_card(saved_config(saved.folder), step, run_dir, dtype=dtype, rounding=rounding)


def _say(runtime: Runtime, line: str) -> None:
    if runtime.is_main:
        print(line, flush=True)
