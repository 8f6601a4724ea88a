"""vLLM in the trainer's own processes: generate, sleep, refit.

Every process builds one engine with `distributed_executor_backend="external_launcher"`, which reuses the
default process group. Engines of `tensor` neighbouring ranks work as one; a tensor-parallel group of the
trainer may hold several such engines, which then share its prompts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_ssopd.types import Completion

# Read by vLLM at import: one process per rank, no thread pinning of its own, no third-party plug-ins.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM 0.20 to 0.33


class RolloutEngine:
    """One vLLM engine, colocated with the trainer.

    `policy_version` counts the weight updates that the engine has received; every completion carries the
    version that sampled it. On a GPU the engine gives its memory back between `sleep` and the next use.
    """

    def __init__(
        self,
        model_path: str,
        *,
        tensor: int,
        dtype: str,
        max_model_len: int,
        max_sequences: int,
        gpu_memory_utilization: float,
        cpu_cache_gib: float,
        seed: int,
        trust_remote_code: bool = False,
        lora_rank: int = 0,
        gpu_cache_bytes: int = 0,
    ) -> None:
        """With `lora_rank`, the weights stay as `model_path` has them, and `load_adapter` brings what is added.

        With `gpu_cache_bytes`, batches depend on the requests alone: the cache does not follow the memory that is free,
        nor what is batched the clock.
        """
        on_gpu = torch.cuda.is_available()
        memory: dict[str, Any] = (
            {
                "gpu_memory_utilization": gpu_memory_utilization,
                "enable_sleep_mode": True,
                "kv_cache_memory_bytes": gpu_cache_bytes or None,
            }
            if on_gpu
            else {
                "kv_cache_memory_bytes": int(cpu_cache_gib * 2**30),
                "enforce_eager": True,
                # A prompt cut into chunks makes vLLM rewind the request's random generator, which on CPU it cannot.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 8192),
            }
        )
        with _llvmlite_out_of_sight():
            self._llm = LLM(
                model=model_path,
                skip_tokenizer_init=True,  # text becomes tokens, and tokens text, in data/templates.py alone
                tensor_parallel_size=tensor,
                distributed_executor_backend="external_launcher",
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_sequences,
                logprobs_mode="processed_logprobs",  # at the sampling temperature, as the trainer computes them
                generation_config="vllm",  # sampling parameters come from our config, not from the model's folder
                seed=seed,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                async_scheduling=False if gpu_cache_bytes else None,
                **memory,
                **_lora_options(lora_rank),
            )
        self._on_gpu = on_gpu
        self._asleep: frozenset[str] = frozenset()
        self._adapter: LoRARequest | None = None
        self.policy_version = 0

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
        """One completion per prompt, in order. The same prompts and seeds give the same tokens.

        Text is left empty: the caller decodes it. All ranks of one engine call this together with equal arguments.
        """
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
        return [self._completion(output.outputs[0]) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        tokens = tuple(output.token_ids)
        logprobs = tuple(step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True))
        return Completion(tokens, logprobs, "", output.finish_reason, self.policy_version)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace every weight by (Hugging Face name, full tensor) pairs and forget cached prefixes."""
        self._wake(frozenset({"weights"}))
        iterator: Iterator[tuple[str, torch.Tensor]] = iter(weights)

        def reload(worker: Any) -> None:
            worker.model_runner.reload_weights(weights_iterator=iterator)
            if not self._on_gpu:
                # On CPU the output layer computes from a packed copy, which reloading leaves stale when it is tied.
                head = worker.model_runner.get_model().lm_head
                head.quant_method.process_weights_after_loading(head)

        self._llm.collective_rpc(reload)
        leftover = next(iterator, None)
        assert leftover is None, f"the engine stopped reading weights before {leftover[0]}"
        self._llm.reset_prefix_cache()
        self.policy_version = policy_version

    def load_adapter(self, folder: Path, *, policy_version: int) -> None:
        """Sample with the PEFT adapter in `folder`, which is read now, in place of the one before.

        Its id is new at every version, so that neither cached prefixes nor a cached adapter of an older one are used.
        """
        self.drop_adapter(policy_version=policy_version)
        self._adapter = LoRARequest(f"policy-{policy_version}", policy_version + 1, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)

    def drop_adapter(self, *, policy_version: int) -> None:
        """Sample with the base model alone."""
        self._wake(frozenset({"weights"}))
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        self._llm.reset_prefix_cache()
        self.policy_version = policy_version

    def sleep(self) -> None:
        """Give the GPU memory of weights and KV cache back; without a GPU, do nothing."""
        if self._on_gpu and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = frozenset({"weights", "kv_cache"})

    def close(self) -> None:
        """Shut the engine down. vLLM then destroys every process group, the default one included."""
        if not self._on_gpu:
            # vLLM 0.20 waits for an accelerator, and a CUDA build of torch looks for its driver; later ones do so too.
            torch.accelerator.synchronize = lambda *device: None  # type: ignore[assignment]
        self._llm.llm_engine.engine_core.shutdown()

    def _wake(self, tags: frozenset[str]) -> None:
        if needed := sorted(tags & self._asleep):
            torch.cuda.empty_cache()  # what the trainer's allocator keeps for later, the engine needs now
            self._llm.wake_up(tags=needed)
            self._asleep -= tags


@contextmanager
def _llvmlite_out_of_sight() -> Iterator[None]:
    """vLLM on CPU looks for kernels in every attribute of every loaded module; llvmlite's library has any attribute."""
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden


def _lora_options(rank: int) -> dict[str, Any]:
    """One adapter at a time. vLLM sizes its buffers by a few ranks, and pads smaller ones with zeros."""
    if rank == 0:
        return {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(size for size in LORA_RANKS if size >= rank)}
