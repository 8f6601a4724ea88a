"""The memory plan: its counts equal the real Megatron-Core model's, and it refuses what does not fit with a way out."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nemo_ssopd.config import Config, LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from nemo_ssopd.hf_config import HFModelConfig, read_hf_config
from nemo_ssopd.megatron.actor import MegatronGRPOActor
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.plan import (
    GIB,
    Activations,
    Machine,
    MicroBatch,
    adapters,
    parameters,
    plan,
    refusal,
)
from tests.distributed import run_distributed
from tests.megatron.hf_models import hidden_BSH, save_random_model, tokens_BS

ROOT = Path(__file__).parents[1]
ON_CPU = Machine(on_cuda=False)
BATCH = MicroBatch(rows=3, length=24)
MODELS = ("qwen3_odd", "qwen2", "llama_odd_tied")
LAYOUTS = {
    "tp1": ParallelConfig(world_size=1),
    "tp2": ParallelConfig(world_size=2, tensor=2),
    "tp2_sequence": ParallelConfig(world_size=2, tensor=2, sequence=True),
    "dp2": ParallelConfig(world_size=2),
}


@dataclass(frozen=True)
class Case:
    """One way to build a policy."""

    path: str
    lora: bool
    recompute: bool
    distributed: bool = True
    dtype: str = "float32"


@dataclass(frozen=True)
class Counted:
    """Of one rank's real model: elements, and bytes that its layers saved for the backward."""

    base: int
    adapters: int
    gradients: int
    moments: int
    main_weights: int
    saved: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    paths = [save_random_model(name, tmp_path_factory.mktemp(name)) for name in MODELS]
    plain = [
        Case(path, lora, recompute) for path in paths for lora in (True, False) for recompute in (True, False)
    ]
    return [*plain, Case(paths[0], True, True, distributed=False), Case(paths[0], True, True, dtype="bfloat16")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_equal_the_real_models(cases: list[Case], layout: str) -> None:
    parallel = LAYOUTS[layout]
    ranks = run_distributed(count_all, parallel.world_size, cases, parallel)
    dp = parallel.world_size // parallel.tensor
    for number, case in enumerate(cases):
        config, hf = config_of(case, parallel), read_hf_config(case.path)
        trained = adapters(hf, parallel.tensor, 4) if case.lora else parameters(hf, parallel.tensor)
        for counted in (counts[number] for counts in ranks):
            assert counted.base == parameters(hf, parallel.tensor), case
            assert counted.adapters == (trained if case.lora else 0), case
            # Megatron aligns each tensor to 64 elements, and the distributed optimizer pads the end of the buffer.
            assert trained <= counted.gradients <= trained + 64 * 200, case
            if case.dtype == "float32":
                predicted = Activations(config, hf, BATCH, on_cuda=False).stored()
                assert counted.saved == pytest.approx(predicted, rel=0.01), (layout, case)
        # The ranks that share the optimizer's state hold it once together.
        shared = [counts[number] for counts in ranks[:: parallel.tensor]] if case.distributed else [ranks[0][number]]
        assert sum(counted.moments for counted in shared) == 2 * trained, case
        assert sum(counted.main_weights for counted in shared) == (trained if case.dtype == "bfloat16" else 0), case
        rows = plan(config, hf, ON_CPU).phases["update"]
        state_bytes = 4 * sum(counted.moments + counted.main_weights for counted in shared)
        assert rows["optimizer"] * (dp if case.distributed else 1) == state_bytes, case
        assert rows["gradients"] == 4 * trained


# --- what runs in the workers ----------------------------------------------------------------------------------------


def config_of(case: Case, parallel: ParallelConfig) -> Config:
    return Config(
        run_dir="unused",
        model=ModelConfig(path=case.path, dtype=case.dtype, recompute=case.recompute),
        lora=LoraConfig(enabled=case.lora, rank=4),
        parallel=parallel,
        optimizer=OptimizerConfig(distributed=case.distributed),
    )


def count_all(cases: list[Case], parallel: ParallelConfig) -> list[Counted]:
    runtime = initialize(parallel, seed=1)
    counted = []
    for case in cases:
        hf = read_hf_config(case.path)
        actor = MegatronGRPOActor(config_of(case, parallel), hf, runtime, pad_id=0)
        saved = saved_bytes(actor.model, hf)
        for parameter in actor.model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(1.0)
        actor.optimizer.step()  # Adam makes its state at its first step
        sizes = {name: parameter.numel() for name, parameter in actor.model.named_parameters()}
        states = [optimizer.optimizer.state for optimizer in actor.optimizer.chained_optimizers]
        main = [weight for state in states for weight in state]
        moments = [values[key] for state in states for values in state.values() for key in ("exp_avg", "exp_avg_sq")]
        counted.append(
            Counted(
                base=sum(size for name, size in sizes.items() if ".lora_" not in name),
                adapters=sum(size for name, size in sizes.items() if ".lora_" in name),
                gradients=sum(buffer.grad_data.numel() for buffer in actor._ddp.buffers),
                moments=sum(moment.numel() for moment in moments),
                main_weights=sum(weight.numel() for weight in main) if case.dtype == "bfloat16" else 0,
                saved=saved,
            )
        )
    return counted


def saved_bytes(model: torch.nn.Module, hf: HFModelConfig) -> int:
    """Every storage that a forward keeps for the backward, once, parameters and token indices aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.dtype != torch.int64:
            sizes[storage.data_ptr()] = (tensor, storage.nbytes())  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BSH(model, tokens_BS(hf.vocab_size, rows=BATCH.rows, length=BATCH.length))
    return sum(size for _, size in sizes.values())
