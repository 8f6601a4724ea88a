"""A random Qwen3 of 0.6B parameters: tokens per second, memory against the plan, and where the device's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory
from benchmarks.gpu_report import setup
from benchmarks.gpu_report.actor import SHAPES
from benchmarks.gpu_report.stage import Results
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.teacher import read_by_teacher
from nemo_ssopd.types import TeacherContext, TokenSequence, TrainExample
from tools.memory_plan import Machine, plan

GIB = 2**30
# Longest prompt and completion, token budget, prefixes, runs.
SIZES = {"cuda": (1024, 3072, 16384, 256, 2), "cpu": (32, 96, 256, 16, 1)}
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attn", "attention"),
    "our row kernels": ("_statistics_kernel", "_kl_sums_kernel", "_kl_gradient_kernel", "_logprob_gradient_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "aten::mm", "aten::addmm"),
    "copies": ("memcpy", "memset"),
}
"""What names of kernels contain, in this order; the rest is element-wise work, norms and the optimizer."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")


def run(results: Results) -> None:
    prompt, completion, budget, prefixes, runs = SIZES[results.device]
    shape = setup.qwen3_0p6b() if results.on_cuda else SHAPES["cpu"]
    path = setup.random_model(results.folder / "model", shape, device=results.device)
    lengths = [f"rollout.max_prompt_tokens={prompt}", f"rollout.max_new_tokens={completion}"]
    config = setup.one_process(
        "qwen3_1p7b_tp1",
        [
            *lengths,
            f"model.path={path}",
            f"run_dir={results.folder / 'unused'}",
            f"trainer.token_budget={budget}",
            "trainer.prompts_per_step=1",
            f"algorithm.prefix_tokens={prefixes}",
        ],
    )
    hf = read_hf_config(path)
    planned = plan(config, hf, Machine(on_cuda=results.on_cuda)).phases
    runtime = initialize(config.parallel, seed=1)
    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    examples = memory.full_batch(config, hf.vocab_size, seed=1)
    sequences = [example.sequence for example in examples]
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    aux = setup.distillation(config, actor)

    def score() -> None:
        actor.logprobs(sequences)

    def update() -> None:
        actor.update(_with_a_teacher(actor, config, examples), setup.LOSS, [aux])

    update()  # allocates the optimizer's state
    static = sum(planned["update"].get(row, 0) for row in ("parameters", "adapters", "gradients", "optimizer"))
    if results.on_cuda:
        measured = torch.cuda.memory_allocated()
        results.add("memory that stays, of the plan's", measured / static, f"of {static / GIB:.2f} GiB", below=1.1)
    else:
        results.skip("memory that stays", "a process without CUDA holds more than tensors")
    for name, phase, call in (("scoring", "teacher", score), ("update", "update", update)):
        seconds, peak = _measured(call, results, runs)
        results.add(f"{name}: speed", tokens / seconds, f"tokens/s, {tokens} tokens packed")
        expected = planned[phase]["activations"]
        note = f"of {expected / GIB:.2f} GiB"
        results.add(
            f"{name}: peak memory above that, of the plan's",
            peak / expected,
            note,
            below=1.1 if results.on_cuda else None,
        )
    _add_profile(results, update)


def _with_a_teacher(actor: MegatronPolicy, config: Any, examples: list[TrainExample]) -> list[TrainExample]:
    """Distill into the first sequence, by a teacher that reads one prompt token."""
    first, *others = examples
    own, K = first.sequence, config.algorithm.prefix_tokens
    context = TeacherContext(TokenSequence((own.tokens[0], *own.completion[:K]), 1), weight=0.25)
    return read_by_teacher([replace(first, teacher=context), *others], actor)


def _measured(call: Callable[[], None], results: Results, runs: int) -> tuple[float, float]:
    """Best seconds of `runs` calls after one that warms up, and the bytes at the peak above what was there before."""
    call()
    if results.on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak: float = torch.cuda.max_memory_allocated() - before
    else:
        peak = memory.peak(call)
    return min(_seconds(call, results) for _ in range(runs)), peak


def _seconds(call: Callable[[], None], results: Results) -> float:
    start = time.perf_counter()
    call()
    if results.on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _add_profile(results: Results, call: Callable[[], None]) -> None:
    """Shares of one update's wall time in kernels, by kind, and how often the host waited for the device."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * results.on_cuda
    with profile(activities=activities) as profiler:
        seconds = _seconds(call, results)
    events = profiler.key_averages()
    device = DeviceType.CUDA if results.on_cuda else DeviceType.CPU
    by_kind: dict[str, float] = {}
    for event in events:
        if event.device_type == device and not event.is_user_annotation:
            kind = next((kind for kind, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "rest")
            spent = event.self_device_time_total if results.on_cuda else event.self_cpu_time_total
            by_kind[kind] = by_kind.get(kind, 0.0) + spent / 1e6
    total = sum(by_kind.values())
    if not total:
        results.skip("share of an update in kernels", "the profiler saw no kernel")
        return
    results.add("update: share of the time in kernels, under the profiler", total / seconds, f"of {seconds:.3f} s")
    for kind, spent in sorted(by_kind.items(), key=lambda each: -each[1]):
        results.add(f"update: {kind}", spent / total, f"of the kernels' time, {1e3 * spent:.1f} ms")
    for name in WAITS:
        count = sum(event.count for event in events if event.key == name and event.device_type == DeviceType.CPU)
        results.add(f"update: {name}", count, "calls")
