"""Sizes, ranks and groups of every kind of parallelism, in one place.

Megatron-Core's order of ranks: tensor-parallel ranks are neighbors, data-parallel ranks are `tensor` apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Axis:
    """One kind of parallelism: the processes that this one shares it with."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()


@dataclass(frozen=True)
class Layout:
    """How the processes share model and batch, as this one sees it.

    >>> layout = initialize(ParallelConfig(world_size=8, tensor=2), seed=1).layout   # on rank 5
    >>> layout.tensor.rank, layout.data.rank, layout.data.size, layout.pipeline.size
    (1, 2, 4, 1)
    """

    data: Axis
    """Processes that hold the same shard of the model and train on other examples."""
    tensor: Axis
    """Processes that share every layer."""
    pipeline: Axis
    """Processes that hold other layers."""
    context: Axis
    """Processes that share every sequence."""
    expert: Axis
    """Processes that hold other experts."""
    tensor_cpu_group: dist.ProcessGroup
    """The group of `tensor` over gloo, for Python objects."""

    def gather_tensor(self, shard: torch.Tensor, dim: int) -> torch.Tensor:
        """Join the shards of all tensor-parallel ranks along `dim`, on every one of them. Not differentiable."""
        if self.tensor.size == 1:
            return shard
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.tensor.size)]
        dist.all_gather(shards, shard.contiguous(), group=self.tensor.group)
        return torch.cat(shards, dim=dim)


def read_layout(*, on_cuda: bool, timeout: timedelta) -> Layout:
    """Return the layout of the groups that Megatron-Core has built; all processes call it together."""
    tensor = Axis(parallel_state.get_tensor_model_parallel_group())
    return Layout(
        data=Axis(parallel_state.get_data_parallel_group()),
        tensor=tensor,
        pipeline=Axis(parallel_state.get_pipeline_model_parallel_group()),
        context=Axis(parallel_state.get_context_parallel_group()),
        expert=Axis(parallel_state.get_expert_model_parallel_group()),
        tensor_cpu_group=_gloo_group(tensor.size, timeout) if on_cuda else tensor.group,
    )


def _gloo_group(tensor: int, timeout: timedelta) -> dist.ProcessGroup:
    """Build every tensor-parallel group over gloo, as all processes must, and return this process's."""
    groups = [
        dist.new_group(list(range(first, first + tensor)), backend="gloo", timeout=timeout)
        for first in range(0, dist.get_world_size(), tensor)
    ]
    return groups[dist.get_rank() // tensor]
