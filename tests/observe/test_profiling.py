"""What is written of a chosen step, and nothing of any other."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig, ModelConfig, TrainerConfig
from nemo_ssopd.observe.profiling import profiled
from nemo_ssopd.observe.stages import StageTimer
from nemo_ssopd.run.watchdog import Watch

pytestmark = pytest.mark.heavy


def profile_step(folder: Path, device: str, step: int) -> None:
    config = Config(
        run_dir=str(folder),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused"),
        trainer=TrainerConfig(profile_steps=[3]),
    )
    runtime: Any = SimpleNamespace(rank=5, is_main=True, device=torch.device(device))
    with profiled(config, runtime, Watch(folder, 5, 8, limit_s=60), step=step), StageTimer().stage("update"):
        torch.ones(8, 8) @ torch.ones(8, 8)


def test_a_step_that_was_not_chosen_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile_step(tmp_path, "cpu", 2)
    assert not (tmp_path / "profile").exists()
    assert capsys.readouterr().out == ""


def test_without_cuda_there_is_a_trace_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile_step(tmp_path, "cpu", 3)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "step_000003_rank_0005.json.gz"
    with gzip.open(trace, "rt") as file:
        events = {event["name"]: event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"}
    stage, matmul = events["update"], events["aten::mm"]
    assert stage["ts"] <= matmul["ts"] and matmul["ts"] + matmul["dur"] <= stage["ts"] + stage["dur"]
    assert "no memory snapshot: there is no CUDA" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_there_is_a_memory_snapshot_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for torch's recorder of allocations, which needs a GPU."""
    recording: list[str | None] = []
    monkeypatch.setattr(
        "torch.cuda.memory._record_memory_history", lambda enabled="all", max_entries=0: recording.append(enabled)
    )
    monkeypatch.setattr("torch.cuda.memory._snapshot", lambda **_: {"recording": list(recording)})
    profile_step(tmp_path, "cuda", 3)
    snapshot = tmp_path / "profile" / "step_000003_rank_0005.memory.pickle"
    assert pickle.loads(snapshot.read_bytes()) == {"recording": ["all"]}  # taken before the recorder is switched off
    assert recording == ["all", None]
    assert f"memory snapshot {snapshot.name}" in capsys.readouterr().out
