"""Run Megatron-Core without a GPU: replacements for the CUDA calls that it has hard-wired."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from megatron.core import dist_checkpointing, distributed, optimizer, pipeline_parallel
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async, fully_parallel, state_dict_saver
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.models import gpt
from megatron.core.optimizer import clip_grads, grad_scaler
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import random as megatron_random

# Imported so that `teach_megatron_the_cpu` finds them in sys.modules, whatever the caller imports later.
_USED_PARTS = (
    async_utils,
    dist_checkpointing,
    distributed,
    filesystem_async,
    fully_parallel,
    gpt,
    optimizer,
    pipeline_parallel,
    state_dict_saver,
    torch_dist,
)


def teach_megatron_the_cpu() -> None:
    """Replace the CUDA calls that Megatron-Core 0.16 to 0.19 has hard-wired, inside Megatron's own modules only.

    1. Its modules get another `torch`, where `torch.cuda.current_device()` is the CPU and `device="cuda"` means it.
    2. Activation recomputation saves and restores a CUDA random state: it gets an empty one.
    3. float16's loss scale would be loaded to a CUDA device: it stays on the CPU.
    4. Its optimizers ask for a dtype by comparing `tensor.type()` with names such as "torch.cuda.FloatTensor": the
       constants in those four functions become the CPU's names.
    """
    cpu_torch = _torch_without_cuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = cpu_torch

    grad_scaler.DynamicGradScaler.load_state_dict = _load_grad_scaler
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None

    compares_types: tuple[FunctionType, ...] = (
        clip_grads.clip_grad_by_total_norm_fp32,
        DistributedOptimizer.__init__,
        DistributedOptimizer._build_model_and_main_param_groups.__func__,
        Float16OptimizerWithFloat16Params.__init__,
    )
    for function in compares_types:
        function.__code__ = _with_cpu_type_names(function.__code__)


def _load_grad_scaler(scaler: grad_scaler.DynamicGradScaler, state: dict[str, Any]) -> None:
    scaler._scale = state["scale"]
    scaler._growth_tracker = state["growth_tracker"]
    scaler._hysteresis_tracker = state["hysteresis_tracker"]


def _torch_without_cuda() -> ModuleType:
    cuda = ModuleType("torch.cuda")
    vars(cuda).update(vars(torch.cuda))
    vars(cuda).update(
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda: None,  # 0.19 asks for it, and uses it with CUDA graphs only
        manual_seed=lambda seed: None,
        synchronize=lambda *args: None,
    )

    def on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

        return call

    cpu_torch = ModuleType("torch")
    vars(cpu_torch).update(vars(torch))
    factories = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "arange")
    vars(cpu_torch).update({name: on_cpu(getattr(torch, name)) for name in factories}, cuda=cuda)
    vars(cpu_torch)["__getattr__"] = torch.__getattr__  # what torch itself imports on first use
    return cpu_torch


def _with_cpu_type_names(code: CodeType) -> CodeType:
    def translate(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(translate(item) for item in constant)
        return constant.replace("torch.cuda.", "torch.") if isinstance(constant, str) else constant

    return code.replace(co_consts=translate(code.co_consts))
