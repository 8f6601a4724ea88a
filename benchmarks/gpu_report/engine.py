"""Trainer and vLLM on one device: log-probs, sleep and wake with memory at each point, and one kind of refit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import memory
from benchmarks.gpu_report import setup
from benchmarks.gpu_report.stage import Results
from nemo_ssopd.config.run import context_length
from nemo_ssopd.megatron.lora import adapters
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.refit import refit
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.rollout.engine import RolloutEngine
from nemo_ssopd.types import Completion, TokenSequence

GIB = 2**30
# Prompts, tokens of each, new tokens.
SIZES = {"cuda": (32, 64, 128), "cpu": (8, 16, 24)}
UTILIZATION = 0.2
"""Share of the card for the awake engine."""
MISMATCH = 0.3
"""Nats, a guess: bfloat16 evaluations of one policy differ by 0.08 to 0.09 in the mean on SmolLM2-135M on the CPU."""


def run(results: Results, mode: str) -> None:
    """`mode` is rollout.refit."""
    prompts, prompt_tokens, new_tokens = SIZES[results.device]
    if results.on_cuda:
        path = str(setup.random_model(results.folder / "model", setup.qwen3_0p6b(), device="cuda"))
    else:
        path = "assets/demo_model"
    lengths = [f"rollout.max_prompt_tokens={prompt_tokens}", f"rollout.max_new_tokens={new_tokens}"]
    sizes = [f"engine.max_sequences={prompts}", f"engine.gpu_memory_utilization={UTILIZATION}", *lengths]
    config = setup.one_process(
        "tiny_cpu",
        [
            *sizes,
            f"model.path={path}",
            "model.dtype=bfloat16",
            f"rollout.refit={mode}",
            f"run_dir={results.folder}/unused",
        ],
    )
    hf, runtime = read_hf_config(path), initialize(config.parallel, seed=1)
    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    _add_memory(results, "with the trainer")
    engine = _timed(results, "building the engine", lambda: _engine(config))
    _add_memory(results, "with trainer and engine")
    tokens = torch.randint(hf.vocab_size, (prompts, prompt_tokens), generator=torch.Generator().manual_seed(1))
    problems = [tuple(row) for row in tokens.tolist()]
    before = None
    for version in (1, 2):  # the second time, the engine is asleep
        _move_adapters(actor, seed=version)
        _timed(results, f"refit {version}", partial(refit, actor, engine, config, policy_version=version))
        completions = _generate(results, engine, problems, config, version)
        before = _add_mismatch(results, actor, problems, completions, version, before)
        awake = _add_memory(results, f"awake, version {version}")
        _timed(results, f"sleep {version}", engine.sleep)
        freed = awake - _add_memory(results, f"asleep, version {version}")
        if results.on_cuda:  # most of the engine's share: on the CPU nothing sleeps
            half = UTILIZATION / 2 * torch.cuda.mem_get_info()[1] / GIB
            results.add(f"memory given back by sleep, version {version}", freed, "GiB", above=half)
    refit(actor, engine, config, policy_version=3)
    again = _generate(results, engine, problems, config, 3)
    same = sum(one.tokens == other.tokens for one, other in zip(completions, again, strict=True)) / prompts
    results.add("completions that are the same after sleep and refit of equal weights", same)
    _timed(results, "closing the engine", engine.close)


def _engine(config: Any) -> RolloutEngine:
    return RolloutEngine(
        config.model.path,
        replace(config.engine, tensor=1),
        dtype=config.model.dtype,
        max_model_len=context_length(config),
        seed=1,
        lora_rank=config.lora.rank if config.rollout.refit == "adapter" else 0,
    )


def _move_adapters(actor: MegatronPolicy, *, seed: int) -> None:
    """Another policy, as far from the one before as from the base: a refit that does nothing shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(actor.model):
            adapter.B.copy_(0.1 * torch.randn(adapter.B.shape, generator=generator))


def _generate(
    results: Results, engine: RolloutEngine, prompts: list[tuple[int, ...]], config: Any, version: int
) -> list[Completion]:
    start = time.perf_counter()
    completions = engine.generate(
        prompts,
        seeds=list(range(len(prompts))),
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=(),
    )
    count, seconds = sum(len(completion.tokens) for completion in completions), time.perf_counter() - start
    results.add(f"generating, version {version}", count / seconds, f"tokens/s, {count} tokens, {len(prompts)} at once")
    results.check(f"policy version of the completions, version {version}", completions[0].policy_version, version)
    return completions


def _add_mismatch(
    results: Results,
    actor: MegatronPolicy,
    prompts: list[tuple[int, ...]],
    completions: list[Completion],
    version: int,
    before: list[Any] | None,
) -> list[Any]:
    """|log-prob of the engine - of the trainer| on the engine's tokens; and how far the last policy is on its own.

    Returns the sequences and the trainer's log-probs of them.
    """
    sequences = [TokenSequence((*p, *c.tokens), len(p)) for p, c in zip(prompts, completions, strict=True)]
    trained = torch.cat(actor.logprobs(sequences)).float().cpu()
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    difference = (sampled - trained).abs()
    mean, moved = float(difference.mean()), None
    results.add(f"log-probs, engine against trainer, version {version}: mean", mean, "nats", below=MISMATCH)
    results.add(f"log-probs, engine against trainer, version {version}: largest", float(difference.max()), "nats")
    if before is not None:
        moved = float((torch.cat(actor.logprobs(before[0])).float().cpu() - before[1]).abs().mean())
        results.add("log-probs, this policy against the one before: mean", moved, "nats", above=4 * mean)
    return [sequences, trained]


def _timed(results: Results, name: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    value = call()
    if results.on_cuda:
        torch.cuda.synchronize()
    results.add(name, time.perf_counter() - start, "s")
    return value


def _add_memory(results: Results, when: str) -> float:
    """GiB: on CUDA what all processes use of the card, vLLM's pool included; else this process's resident set."""
    if results.on_cuda:
        free, total = torch.cuda.mem_get_info()
        used, unit = (total - free) / GIB, f"of {total / GIB:.1f} GiB"
    else:
        used, unit = memory.resident() / GIB, "GiB resident"
    results.add(f"memory in use, {when}", used, unit)
    return used
