"""Count the elements on one rank in the model that training builds, on the meta device, where tensors have no memory.

    parameters(hf, tensor=2)        # of the base model
    adapters(hf, tensor=2, rank=64)

Megatron-Core needs process groups to build one rank's shard. The groups here are torch's fake ones: the other ranks do
not exist, and nothing is sent. They are the only groups of the process while a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_ssopd.config.sections import LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.megatron.layout import read_layout
from nemo_ssopd.megatron.lora import add_lora
from nemo_ssopd.megatron.model import build_model
from nemo_ssopd.megatron.runtime import Runtime, shutdown
from nemo_ssopd.models.family import HFModelConfig


@cache
def parameters(hf: HFModelConfig, tensor: int) -> int:
    """Return the number of elements of the base model on one of `tensor` ranks."""
    return sum(parameter.numel() for parameter in _build(hf, tensor).parameters())


@cache
def adapters(hf: HFModelConfig, tensor: int, rank: int) -> int:
    """Return the number of elements of adapters of rank `rank` on one of `tensor` ranks."""
    model = _build(hf, tensor, LoraConfig(rank=rank))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build(hf: HFModelConfig, tensor: int, lora: LoraConfig | None = None) -> GPTModel:
    with _first_of(tensor) as runtime, torch.device("meta"):
        parallel = ParallelConfig(world_size=tensor, tensor=tensor)
        model = build_model(hf, ModelConfig(path="unused"), parallel, runtime)
        if lora is not None:
            add_lora(model, hf, lora, seed=0, runtime=runtime)
    return model


@contextmanager
def _first_of(tensor: int) -> Iterator[Runtime]:
    """Yield the runtime of the first of `tensor` tensor-parallel ranks; the others do not exist."""
    assert not dist.is_initialized(), "plan before the process joins its groups"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)
        yield Runtime(
            rank=0,
            world_size=tensor,
            device=torch.device("meta"),
            layout=read_layout(on_cuda=False, timeout=timedelta(minutes=1)),
            cpu_group=parallel_state.get_tensor_model_parallel_group(),
            deterministic=False,
        )
    finally:
        shutdown()
