"""vLLM in the trainer's own processes: generate, sleep, refit.

Every process builds one engine with `distributed_executor_backend="external_launcher"`, which reuses the
default process group. `tensor` neighboring ranks form one engine. A tensor-parallel group of the trainer may
hold several engines, which then divide its prompts among them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nemo_ssopd.config.sections import EngineConfig
from nemo_ssopd.rollout.held import differing_adapters, differing_weights
from nemo_ssopd.types import Completion, SentTensor

# vLLM reads these at import: one process per rank, no thread pinning, no third-party plug-ins.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm
from packaging.version import Version
from vllm import LLM, SamplingParams
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of max_lora_rank in vLLM 0.20 to 0.33
ADDS_ADAPTERS_RIGHT = Version("0.32")
"""The oldest vLLM version whose code we have read and found to add adapters correctly on several ranks.

vLLM 0.20 gathers tensors that are already whole, and on CUDA adds garbage without a warning (vLLM's issue 45691).
"""


class RolloutEngine:
    """One vLLM engine, colocated with the trainer.

    `policy_version` counts the weight updates that the engine has received. Every completion carries the
    version that sampled it. On a GPU the engine frees its memory between `sleep` and the next use.

    Without LoRA, sleep drops the weights, since the next refit replaces them all. `policy_version` is then None, and
    `generate` refuses. With LoRA, sleep keeps the weights in host memory, since a refit brings adapters only.
    """

    def __init__(
        self,
        model_path: str,
        engine: EngineConfig,
        *,
        dtype: str,
        max_model_len: int,
        seed: int,
        trust_remote_code: bool = False,
        lora_rank: int = 0,
        gpu_cache_bytes: int = 0,
    ) -> None:
        """Build the engine of `engine.tensor` ranks. `max_model_len` is in tokens.

        With `lora_rank`, the weights stay as `model_path` has them, and `load_adapter` brings what is added to them.
        With `gpu_cache_bytes`, batches depend on the requests alone: the cache size does not depend on free memory,
        and scheduling does not depend on the clock. ValueError when this vLLM adds adapters wrongly.
        """
        tensor = engine.tensor
        assert tensor >= 1, "resolve engine.tensor=0 first"
        if lora_rank and tensor > 1 and Version(vllm.__version__) < ADDS_ADAPTERS_RIGHT:
            raise ValueError(
                f"rollout.refit=adapter with engines of tensor-parallel size {tensor}: vLLM {vllm.__version__} adds "
                f"adapters wrongly there. Use rollout.refit=merged, or engine.tensor=1, or vLLM {ADDS_ADAPTERS_RIGHT}"
            )
        on_gpu = torch.cuda.is_available()
        memory: dict[str, Any] = (
            {
                "gpu_memory_utilization": engine.gpu_memory_utilization,
                "enable_sleep_mode": True,
                "kv_cache_memory_bytes": gpu_cache_bytes or None,
            }
            if on_gpu
            else {
                "kv_cache_memory_bytes": int(engine.cpu_cache_gib * 2**30),
                "enforce_eager": True,
                # For a prompt cut into chunks, vLLM rewinds the request's random generator, which it cannot on CPU.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 8192),
            }
        )
        with _llvmlite_out_of_sight():
            self._llm = LLM(
                model=model_path,
                skip_tokenizer_init=True,  # data/templates.py alone tokenizes, and the collector decodes
                tensor_parallel_size=tensor,
                distributed_executor_backend="external_launcher",
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=engine.max_sequences,
                logprobs_mode="processed_logprobs",  # at the sampling temperature, as the trainer computes them
                generation_config="vllm",  # sampling parameters come from our config, not from the model's folder
                seed=seed,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                # It makes a rank's schedule depend on its own clock, but ranks must agree and runs must repeat.
                async_scheduling=False if tensor > 1 or gpu_cache_bytes else None,
                **memory,
                **_lora_options(lora_rank),
            )
        self._on_gpu = on_gpu
        self._asleep: frozenset[str] = frozenset()
        self._has_lora = lora_rank > 0
        self._adapter: LoRARequest | None = None
        self._adapters_loaded = 0
        self.policy_version: int | None = 0

    def generate(
        self,
        prompts: list[tuple[int, ...]],
        *,
        seeds: list[int],
        temperature: float,
        max_new_tokens: int,
        stop_token_ids: tuple[int, ...],
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        progress: bool = False,
    ) -> list[Completion]:
        """Return one completion per prompt, in order. The same prompts and seeds give the same tokens.

        The text is left empty: the caller decodes it. All ranks of one engine call this together with equal arguments.
        """
        assert self.policy_version is not None, "the engine slept and lost its weights: refit it first"
        assert len(prompts) == len(seeds), (len(prompts), len(seeds))
        self._wake(frozenset({"weights", "kv_cache"}))
        requests = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                max_tokens=max_new_tokens,
                stop_token_ids=list(stop_token_ids),
                seed=seed,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            requests,
            use_tqdm=progress,
            lora_request=self._adapter,
        )
        return [_completion(output.outputs[0], self.policy_version) for output in outputs]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace every weight by (Hugging Face name, full tensor) pairs and forget cached prefixes."""
        self._wake(frozenset({"weights"}))
        iterator: Iterator[tuple[str, torch.Tensor]] = iter(weights)

        def reload(worker: Any) -> None:
            worker.model_runner.reload_weights(weights_iterator=iterator)
            if not self._on_gpu:
                # On CPU the output layer uses a packed copy, which stays stale after reloading when it is tied.
                head = worker.model_runner.get_model().lm_head
                head.quant_method.process_weights_after_loading(head)

        self._llm.collective_rpc(reload)
        leftover = next(iterator, None)
        assert leftover is None, f"the engine stopped reading weights before {leftover[0]}"
        self._forget_prefixes()
        self.policy_version = policy_version

    def load_adapter(self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace the adapter by these LoRA matrices: (PEFT name, full tensor) pairs, with B times alpha / r.

        The adapter gets a new id in vLLM each time, so cached prefixes of another adapter are not used.
        """
        self.drop_adapter(policy_version=policy_version)
        # Copies, since vLLM keeps them. They are in host memory, from which vLLM fills its own buffers.
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
        self._adapters_loaded += 1
        self._adapter = LoRARequest(f"adapter-{self._adapters_loaded}", self._adapters_loaded, "in memory")
        adapter = LoRAModel.from_lora_tensors(
            self._adapter.lora_int_id, tensors, PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]), device="cpu"
        )

        def activate(worker: Any) -> None:
            manager = worker.model_runner.lora_manager._adapter_manager
            manager.add_adapter(adapter)
            manager.activate_adapter(adapter.id)

        self._llm.collective_rpc(activate)

    def drop_adapter(self, *, policy_version: int) -> None:
        """Remove the adapter, so that the base model alone samples."""
        self._wake(frozenset({"weights"}))
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        self._forget_prefixes()
        self.policy_version = policy_version

    def differing(self, sent: Mapping[str, SentTensor]) -> list[str]:
        """Return the names of tensors that this rank's engine does not hold as sent. Empty after a good refit."""
        self._wake(frozenset({"weights"}))
        adapter_id = self._adapter.lora_int_id if self._adapter else None

        def compare(worker: Any) -> list[str]:
            runner = worker.model_runner
            if self._has_lora:
                return differing_adapters(runner.lora_manager._adapter_manager, adapter_id, sent)
            return differing_weights(runner.get_model(), sent, packed=not self._on_gpu)

        [names] = self._llm.collective_rpc(compare)
        return names

    def sleep(self) -> None:
        """Free the GPU memory of weights and KV cache. Without a GPU nothing is freed, but the same rules hold."""
        if not self._has_lora:
            self.policy_version = None
        if self._on_gpu and not self._asleep:
            torch.cuda.synchronize()  # vLLM 0.20 unmaps memory that a last forward pass may still read
            self._llm.sleep(level=1 if self._has_lora else 2)
            self._asleep = frozenset({"weights", "kv_cache"})

    def close(self) -> None:
        """Shut the engine down. vLLM 0.32 then destroys all process groups, even the default one; 0.20 none."""
        with nullcontext() if self._on_gpu else _nothing_to_wait_for():
            self._llm.llm_engine.engine_core.shutdown()

    def _forget_prefixes(self) -> None:
        was_reset = self._llm.reset_prefix_cache()
        assert was_reset, "a request still holds keys and values of the weights before"

    def _wake(self, tags: frozenset[str]) -> None:
        if needed := sorted(tags & self._asleep):
            torch.cuda.empty_cache()  # the engine needs the memory that the trainer's allocator has cached
            self._llm.wake_up(tags=needed)
            self._asleep -= tags


def _completion(output: Any, policy_version: int) -> Completion:
    tokens = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True))
    return Completion(tokens, logprobs, "", output.finish_reason, policy_version)


@contextmanager
def _nothing_to_wait_for() -> Iterator[None]:
    """Disable torch's wait for the accelerator. vLLM calls it even on a machine that has none, and torch may raise."""
    wait = torch.accelerator.synchronize
    torch.accelerator.synchronize = lambda *_: None
    try:
        yield
    finally:
        torch.accelerator.synchronize = wait


@contextmanager
def _llvmlite_out_of_sight() -> Iterator[None]:
    """Hide llvmlite's library from vLLM, which on CPU looks for kernels in every attribute of every loaded module.

    llvmlite's library claims to have an attribute of any name.
    """
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden


def _lora_options(rank: int) -> dict[str, Any]:
    """Return vLLM's options for one adapter at a time. vLLM allows a few ranks, and pads smaller ones with zeros."""
    if rank == 0:
        return {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(size for size in LORA_RANKS if size >= rank)}
