"""One update waits for the device a fixed number of times: not per layer, micro-batch, sequence or distilled pair.

On a GPU every value that Python reads off a tensor stops the host until the device has caught up. The same values are
read on CPU, where they can be counted; four parts that CUDA replaces by its own kernels (`ONLY_ON_CPU`) are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config

from nemo_ssopd.config.run import Config
from tests.distributed import run_distributed
from tests.invariants.recorded import Recorded, build_actor, config_for, one_update, record
from tests.megatron.hf_models import HF_CONFIGS, save_random_model

pytestmark = pytest.mark.heavy

ONLY_ON_CPU = (
    ("embeddings/rope_utils.py", "_apply_rotary_pos_emb_thd"),  # apply_rope_fusion
    ("nemo_ssopd/megatron/model.py", "forward"),  # Transformer Engine's attention
    ("nemo_ssopd/ops/row_kernels_cpu.py", ""),  # Triton
    ("torch/optim/", ""),  # fused Adam
)
READS = {"tolist", "numpy", "__array__", "cpu"}
SENDS = {"tensor", "as_tensor", "to"}
"""With a device named, and inside the schedule, a transfer that was forgotten while packing."""


class Waits:
    """Counts, while it is entered, what would make a host wait for its GPU, by kind and place."""

    def __init__(self) -> None:
        self.at: Counter[tuple[str, str]] = Counter()
        self._modes = (_Methods(self), _Operators(self))

    def note(self, kind: str) -> None:
        frames = list(_frames(sys._getframe(2)))
        if any(file in path and name in function for path, function in frames for file, name in ONLY_ON_CPU):
            return
        if kind in SENDS and not any("pipeline_parallel/schedules.py" in path for path, _ in frames):
            return
        path, function = next(f for f in frames if "nemo_ssopd" in f[0] or "megatron" in f[0])
        self.at[kind, f"{path}:{function}"] += 1

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, device = function.__name__, (kwargs or {}).get("device")
        has_device = device is not None or any(isinstance(argument, torch.device) for argument in args[1:])
        if name in READS or (name in SENDS and has_device):
            self._waits.note(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:  # item(), float(), bool(), a comparison in an if
            self._waits.note("item")
        return operator(*args, **(kwargs or {}))


def _frames(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def waits_in_an_update(config: Config, recorded: Recorded) -> Counter[tuple[str, str]]:
    actor = build_actor(config)
    one_update(actor, recorded)  # compiles, and allocates the moments
    update = actor.update
    waits = Waits()

    def counted(*args: Any) -> Any:
        with waits:
            return update(*args)

    actor.update = counted  # type: ignore[method-assign]
    one_update(actor, recorded)
    return waits.at


def repeated(recorded: Recorded, times: int) -> Recorded:
    """The batch several times over, with as many more distilled pairs."""
    groups = len({example.group for example in recorded.examples})
    copies = [replace(e, group=e.group + copy * groups) for copy in range(times) for e in recorded.examples]
    return replace(recorded, examples=tuple(copies))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model("qwen3_tied", tmp_path_factory.mktemp("two_layers"))


@pytest.fixture(scope="module")
def few(path: str) -> Counter[tuple[str, str]]:
    """Of eight sequences and two pairs in one micro-batch, by a model of two layers."""
    return run_distributed(waits_in_an_update, 1, config_for(path, lora=True), record(path))[0]


def test_the_count_sees_what_is_read(few: Counter[tuple[str, str]]) -> None:
    fetched = [count for (kind, place), count in few.items() if kind == "tolist" and place.endswith("metrics.py:fetch")]
    assert fetched == [1]
    assert sum(few.values()) < 12, few  # the metrics, the gradient norm and its clip, agreement on the verdict


def test_more_of_everything_waits_as_often(
    path: str, few: Counter[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, recorded = config_for(path, lora=True), record(path)
    (many_rows,) = run_distributed(waits_in_an_update, 1, config, repeated(recorded, 3))
    assert many_rows == few
    micro_batches = replace(config, trainer=replace(config.trainer, token_budget=24))
    (many_passes,) = run_distributed(waits_in_an_update, 1, micro_batches, repeated(recorded, 2))
    assert many_passes == few
    shape = HF_CONFIGS["qwen3_tied"].to_dict() | {"num_hidden_layers": 5, "layer_types": None}
    monkeypatch.setitem(HF_CONFIGS, "qwen3_tied", Qwen3Config(**shape))
    deep = save_random_model("qwen3_tied", tmp_path)
    (many_layers,) = run_distributed(waits_in_an_update, 1, config_for(deep, lora=True), recorded)
    assert many_layers == few
