"""Process groups, seeds and devices: the one module that knows whether there is a GPU.

    runtime = initialize(config.parallel, seed=config.trainer.seed)   # once per process, after the other imports
    ...
    shutdown()

On CUDA: NCCL, one GPU per process. Without CUDA: gloo and plain processes, with Megatron-Core adapted by `cpu_shim`.
Nothing outside Megatron's own modules changes, so vLLM and transformers see the real torch.
The default process group is the world, which is what vLLM's `external_launcher` builds on.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.megatron.cpu_shim import teach_megatron_the_cpu
from nemo_ssopd.megatron.layout import Layout, read_layout

DETERMINISTIC = {
    # Read when an attention layer is built: flash-attn and cuDNN then use their deterministic backward.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # Read with cuBLAS's first handle. torch warns of every matmul without it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Read with NCCL's first communicator, and by vLLM for its all-reduce: no sums inside the switch.
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    # Read when vLLM compiles: its cache does not know that kernels may no longer be chosen by their time.
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}
"""Environment variables that trainer.deterministic sets, from the sources of Transformer Engine 2.16, vLLM 0.20.1 and
torch 2.13, and from NCCL's documentation. None was tried: there was no GPU."""


@dataclass(frozen=True)
class Runtime:
    """This process: its rank, device, layout and groups.

    >>> runtime = initialize(ParallelConfig(world_size=8, tensor=2), seed=1)   # on rank 5
    >>> runtime.rank, runtime.layout.tensor.rank, runtime.is_main
    (5, 1, False)
    """

    rank: int
    world_size: int
    device: torch.device
    layout: Layout
    cpu_group: dist.ProcessGroup
    """The world, over gloo: for Python objects and CPU tensors."""
    deterministic: bool
    """True when the same inputs must give the same bits, also on CUDA."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def use_device(self) -> None:
        """Select the device in this thread. A new thread starts on the first GPU, which is another process's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def initialize(parallel: ParallelConfig, *, seed: int, deterministic: bool = False) -> Runtime:
    """Join the process group and build Megatron's groups; call it after importing everything that uses Megatron."""
    rank, world_size, local_rank = _launched_as()
    if world_size != parallel.world_size:
        raise ValueError(
            f"parallel.world_size={parallel.world_size} but the launcher started {world_size} processes: "
            "make them equal"
        )
    if deterministic:
        _make_deterministic()
    on_cuda = torch.cuda.is_available()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if on_cuda:
        # One hardware queue, so that a tensor-parallel collective starts before the matmul that it is overlapped with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(parallel.threads)
        teach_megatron_the_cpu()
    dist.init_process_group("nccl" if on_cuda else "gloo", rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor, distributed_timeout_minutes=math.ceil(parallel.timeout_minutes)
    )
    torch.manual_seed(seed)
    # The "inference" tracker forks nothing. The models have no dropout, so on CPU no tracked stream is ever drawn from.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not on_cuda, force_reset_rng=True)

    return Runtime(
        rank=rank,
        world_size=world_size,
        device=device,
        layout=read_layout(on_cuda=on_cuda, timeout=timeout),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
        deterministic=deterministic,
    )


def _make_deterministic() -> None:
    """Choose deterministic algorithms in this process, before its first matmul, attention layer and communicator.

    It overrides what a launcher put into the environment.

    torch warns instead of raising, since vLLM's top-p sampler sums on CUDA in a way that torch calls nondeterministic.
    This also keeps torch.compile, which vLLM uses, from choosing kernels by their measured time. Memory is not filled
    as torch would then do: nothing here reads what it did not write. NGC images let float32 matmuls be TF32.

    VLLM_BATCH_INVARIANT is left alone: it replaces torch's own operators with kernels that have no backward, in the
    whole process, so in the trainer too. Without it the engine repeats itself for equal batches in equal order.
    """
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")


def shutdown() -> None:
    """Leave the process groups, all ranks together."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():  # a colocated engine that was closed has destroyed it
        dist.destroy_process_group()


def _launched_as() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's variables, or from srun's.

    srun's variables are also written under torchrun's names, which vLLM's `external_launcher` reads.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        job_port = 10000 + int(os.environ["SLURM_JOB_ID"]) % 20000
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", os.environ["SLURM_LAUNCH_NODE_IPADDR"])
        os.environ.setdefault("MASTER_PORT", str(job_port))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(name not in os.environ for name in names):
        raise ValueError(f"the environment lacks {', '.join(names)}: start the processes with torchrun or srun")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return rank, world_size, local_rank
