"""What trainer.deterministic reaches. That a run on CUDA then repeats itself was never tried: there was no GPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ssopd.config.sections import EngineConfig, ModelConfig, ParallelConfig
from nemo_ssopd.megatron.model import build_model
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import DETERMINISTIC, initialize
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.rollout import engine
from nemo_ssopd.setup import fixed_cache
from tests.distributed import run_distributed
from tests.invariants.recorded import config_for, one_update, record
from tools.memory_plan import load

pytestmark = pytest.mark.heavy

DEMO = str(Path(__file__).parents[1] / "assets" / "demo_model")


def switches(deterministic: bool) -> dict[str, Any]:
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "1"
    torch.set_float32_matmul_precision("high")  # as NGC images do, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    parallel = ParallelConfig(world_size=1)
    runtime = initialize(parallel, seed=1, deterministic=deterministic)
    model = build_model(read_hf_config(DEMO), ModelConfig(path=DEMO, dtype="float32"), parallel, runtime)
    return {
        "environment": {name: os.environ.get(name) for name in DETERMINISTIC},
        "torch": torch.are_deterministic_algorithms_enabled(),
        "raises": not torch.is_deterministic_algorithms_warn_only_enabled(),
        "empty": torch.empty(3).isnan().any().item() and torch.utils.deterministic.fill_uninitialized_memory,
        "matmul": torch.get_float32_matmul_precision(),
        "megatron": model.config.deterministic_mode,
    }


def test_the_switches_of_torch_megatron_and_the_environment() -> None:
    (on,) = run_distributed(switches, 1, True)
    assert on == {
        "environment": {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_NVLS_ENABLE": "0",
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
            "VLLM_DISABLE_COMPILE_CACHE": "1",
        },
        "torch": True,
        "raises": False,
        "empty": False,
        "matmul": "highest",
        "megatron": True,
    }
    (off,) = run_distributed(switches, 1, False)
    assert off["environment"]["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "1"
    assert (off["torch"], off["matmul"], off["megatron"]) == (False, "high", False)


def trained(deterministic: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weights after two updates of every weight."""
    config = config_for(DEMO)
    runtime = initialize(config.parallel, seed=1, deterministic=deterministic)
    actor = MegatronPolicy(config, read_hf_config(DEMO), runtime, pad_id=0)
    batch = record(DEMO)
    one_update(actor, batch)
    loss = one_update(actor, batch).metrics["loss/total"].value()
    return loss, {name: tensor.clone() for name, tensor in actor.weights()}


def test_on_cpu_an_update_has_the_same_bits_with_and_without() -> None:
    ((loss, weights),) = run_distributed(trained, 1, True)
    ((loss_without, weights_without),) = run_distributed(trained, 1, False)
    assert loss == loss_without
    assert weights.keys() == weights_without.keys() and len(weights) > 20
    assert [name for name in weights if not torch.equal(weights[name], weights_without[name])] == []


@pytest.mark.parametrize("gpu_cache_bytes", [0, 7 * 2**30])
def test_the_engine_on_a_gpu_gets_a_cache_of_a_fixed_size(
    gpu_cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for vLLM on a GPU, which keeps what it is asked for."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(engine, "LLM", lambda **options: asked.update(options))
    engine.RolloutEngine(
        DEMO,
        EngineConfig(tensor=1, max_sequences=4),
        dtype="float32",
        max_model_len=64,
        seed=1,
        gpu_cache_bytes=gpu_cache_bytes,
    )
    assert asked["kv_cache_memory_bytes"] == (gpu_cache_bytes or None)
    assert asked["async_scheduling"] is (False if gpu_cache_bytes else None)


def test_the_cache_follows_the_config_and_the_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = load("qwen3_1p7b_tp1", ["engine.gpu_memory_utilization=0.5"])
    runtime: Any = SimpleNamespace(deterministic=True, device=torch.device("cuda"))
    sizes = []
    for free_gib in (70, 20):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free_gib: (free * 2**30, 80 * 2**30))
        sizes.append(fixed_cache(config, runtime, 4 * 2**30))
    assert sizes == [int(0.8 * 36 * 2**30)] * 2  # half of 80 GiB, less the weights
    off: Any = SimpleNamespace(deterministic=False, device=torch.device("cuda"))
    assert fixed_cache(config, off, 4 * 2**30) == 0
    cpu: Any = SimpleNamespace(deterministic=True, device=torch.device("cpu"))
    assert fixed_cache(config, cpu, 4 * 2**30) == 0
