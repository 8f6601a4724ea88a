"""Ranks and groups of a layout, on four processes, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.megatron.runtime import initialize
from tests.distributed import run_distributed

pytestmark = pytest.mark.heavy


def axes(parallel: ParallelConfig) -> dict[str, Any]:
    runtime = initialize(parallel, seed=1)
    layout = runtime.layout
    names = ("data", "tensor", "pipeline", "context", "expert")
    summed = torch.tensor(2.0**runtime.rank)
    dist.all_reduce(summed, group=layout.data.group)
    return {
        "axes": {name: (getattr(layout, name).size, getattr(layout, name).rank) for name in names},
        "gathered": layout.gather_tensor(torch.full((1, 2), float(runtime.rank)), dim=0)[:, 0].tolist(),
        "summed": float(summed),
        "sizes": (parallel.data, parallel.sequence_shards),
    }


def test_tensor_parallel_ranks_are_neighbors() -> None:
    parallel = ParallelConfig(world_size=4, tensor=2, sequence=True)
    for rank, found in enumerate(run_distributed(axes, 4, parallel)):
        one = (1, 0)
        assert found["axes"] == {
            "data": (2, rank // 2),
            "tensor": (2, rank % 2),
            "pipeline": one,
            "context": one,
            "expert": one,
        }
        assert found["gathered"] == [2.0 * (rank // 2), 2.0 * (rank // 2) + 1]
        assert found["summed"] == 2.0 ** (rank % 2) + 2.0 ** (rank % 2 + 2)
        assert found["sizes"] == (2, 2)
