"""Predict the seconds of a training step on many GPUs: rollouts are simulated, everything else is calculated.

    step = simulate(config, hf, gpus=512, prompts=2048, rates=Rates(), rng=np.random.default_rng(0))
    step.stages["rollout"], step.seconds

Nothing here was measured on a GPU. `Hardware` holds public specifications; `Rates` holds assumptions, each of which
`scripts/scaling.py --set NAME=VALUE` replaces by a measured value. docs/scaling.md has the conclusions.

The model is of `train_step`: all engines generate, all ranks meet, all ranks train, all ranks meet, every engine is
refitted. So a stage takes as long as on its slowest rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nemo_ssopd.config.run import Config, engine_tensor
from nemo_ssopd.models.family import HFModelConfig
from tools.counts import adapters, parameters
from tools.memory_plan import DTYPE_BYTES, Machine, plan

Tokens = TypeVar("Tokens", float, np.ndarray)


@dataclass(frozen=True)
class Hardware:
    """An H100 SXM in an 8-GPU node: peak numbers of public data sheets, which docs/scaling.md names."""

    memory_bytes_per_s: float = 3.35e12
    """Bandwidth of HBM3."""
    flops: float = 989e12
    """Peak in dense bfloat16, per second."""
    nvlink_bytes_per_s: float = 450e9
    """NVLink of one GPU, one direction."""
    network_bytes_per_s: float = 50e9
    """InfiniBand at 400 Gb/s for each GPU."""
    pcie_bytes_per_s: float = 64e9
    """PCIe Gen5 x16, one direction."""
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Rates:
    """Assumed rates (ours). None was measured on a GPU; the rate of the verifier was measured on CPU."""

    length_median: float = 6000.0
    """Median tokens of a completion; lengths are log-normal, cut at rollout.max_new_tokens."""
    length_sigma: float = 0.6
    """Standard deviation of the logarithm of the length."""
    prompt_tokens: float = 200.0
    mixed_fraction: float = 0.5
    """Share of groups with a correct and a wrong completion; each costs a teacher pass."""
    memory_efficiency: float = 0.6
    """Share of the memory bandwidth that decoding reaches."""
    decode_fixed_s: float | None = None
    """Seconds of a decoding step without requests; None: the time to read the weights once, plus decode_overhead_s."""
    decode_overhead_s: float = 0.002
    """Seconds of scheduling, sampling and launches in one decoding step."""
    forward_efficiency: float = 0.45
    """Share of the peak arithmetic in passes without gradient."""
    update_efficiency: float = 0.35
    """Share of the peak in the forward-backward, without the collectives of a tensor-parallel group."""
    latency_s: float = 20e-6
    """alpha, the seconds of one hop of a collective."""
    link_efficiency: float = 0.8
    """Share of a link's bandwidth that a collective reaches."""
    answers_per_worker_s: float = 137.0
    """Answers per second that one verifier worker grades: docs/benchmarks.md, two workers on two CPU cores."""


# ---- Collectives -----------------------------------------------------------------------------------------------------


def reduce_scatter_s(bytes_: float, ranks: int, bytes_per_s: float, latency_s: float) -> float:
    """Return alpha log2(n) + (n - 1) / n * bytes / beta (Thakur et al. 2005); an all-gather takes the same time."""
    if ranks == 1:
        return 0.0
    return latency_s * math.ceil(math.log2(ranks)) + (ranks - 1) / ranks * bytes_ / bytes_per_s


def all_reduce_s(bytes_: float, ranks: int, bytes_per_s: float, latency_s: float) -> float:
    """Return the seconds of a reduce-scatter followed by an all-gather."""
    return 2 * reduce_scatter_s(bytes_, ranks, bytes_per_s, latency_s)


# ---- Rollouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """Seconds of one decoding step with b requests that hold X tokens: fixed + per_request b + per_context_token X."""

    fixed: float
    per_request: float
    per_context_token: float
    slots: int
    """Most requests at the same time; the others wait in order."""
    prompt_tokens: float


def decoding(config: Config, hf: HFModelConfig, rates: Rates, hardware: Hardware) -> Decoding:
    """Return a roofline: each step reads the weights and every request's cache, and multiplies once per request."""
    tensor, width = engine_tensor(config), DTYPE_BYTES[config.model.dtype]
    memory = plan(config, hf, Machine())
    bandwidth = hardware.memory_bytes_per_s * rates.memory_efficiency
    weights = parameters(hf, tensor)
    reduces = 2 * hf.num_layers  # one after attention, one after the MLP
    link = hardware.nvlink_bytes_per_s * rates.link_efficiency
    latency = reduces * all_reduce_s(0.0, tensor, link, rates.latency_s)
    traffic = reduces * all_reduce_s(hf.hidden_size * width, tensor, link, 0.0)
    fixed = weights * width / bandwidth + rates.decode_overhead_s + latency
    per_request = 2 * weights / (hardware.flops * rates.forward_efficiency) + traffic
    held = rates.prompt_tokens + min(rates.length_median, config.rollout.max_new_tokens)
    return Decoding(
        fixed=fixed if rates.decode_fixed_s is None else rates.decode_fixed_s,
        per_request=per_request,
        per_context_token=memory.kv_bytes_per_token / bandwidth,
        slots=max(1, min(config.engine.max_sequences, int(memory.kv_tokens / held))),
        prompt_tokens=rates.prompt_tokens,
    )


def engine_seconds(lengths: Sequence[int], decode: Decoding) -> float:
    """Simulate one engine, from one end of a request to the next; return the seconds until the last completion ends."""
    waiting = list(reversed(lengths))
    active: list[tuple[int, int]] = []  # (step at which it ends, its length)
    step, context, seconds = 0, 0.0, 0.0
    while waiting or active:
        while waiting and len(active) < decode.slots:
            length = waiting.pop()
            heapq.heappush(active, (step + length, length))
            context += decode.prompt_tokens
        steps, requests = active[0][0] - step, len(active)
        seconds += steps * (decode.fixed + decode.per_request * requests + decode.per_context_token * context)
        seconds += decode.per_context_token * requests * steps * (steps - 1) / 2  # each step adds a token to each
        step += steps
        context += requests * steps
        while active and active[0][0] == step:
            context -= decode.prompt_tokens + heapq.heappop(active)[1]
    return seconds


def continuous_seconds(lengths: Sequence[int], decode: Decoding) -> float:
    """Return the seconds of the same work in an engine that is always full, with as many requests as at the start."""
    array = np.asarray(lengths, dtype=float)
    read = array * decode.prompt_tokens + array * (array - 1) / 2
    per_token = decode.fixed / min(decode.slots, len(array)) + decode.per_request
    return float(array.sum() * per_token + read.sum() * decode.per_context_token)


def sample_lengths(rates: Rates, config: Config, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw completion lengths, [count], each at least 1."""
    lengths = rates.length_median * np.exp(rates.length_sigma * rng.standard_normal(count))
    return np.clip(np.rint(lengths), 1, config.rollout.max_new_tokens).astype(int)


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one sequence of s tokens, over all tensor-parallel ranks of a replica.

    A matrix of P elements costs 2 P a token; causal attention 2 L Q s a token on average (scores and values).
    """

    hf: HFModelConfig
    lora_rank: int | None
    recompute: bool

    def forward(self, tokens: Tokens) -> Tokens:
        matrices = parameters(self.hf, 1) - (0 if self.hf.tied else self.hf.vocab_size * self.hf.hidden_size)
        if self.lora_rank is not None:
            matrices += adapters(self.hf, 1, self.lora_rank)
        attention = 2 * self.hf.num_layers * self.hf.num_heads * self.hf.head_dim
        return 2 * matrices * tokens + attention * tokens * tokens

    def update(self, tokens: Tokens) -> Tokens:
        """Return the operations of forward, backward and recomputed forward.

        Gradients of the inputs cost one more forward (two for attention itself); those of the trained weights are
        added.
        """
        attention = 2 * self.hf.num_layers * self.hf.num_heads * self.hf.head_dim * tokens * tokens
        trained = parameters(self.hf, 1) if self.lora_rank is None else adapters(self.hf, 1, self.lora_rank)
        return (2 + self.recompute) * self.forward(tokens) + attention + 2 * trained * tokens


@dataclass(frozen=True)
class Step:
    """Seconds of a step: each stage as long as on its slowest rank, and the times of other designs."""

    stages: dict[str, float]
    tokens: int
    """Completion tokens of the step."""
    asynchronous: float
    """Seconds of a step with rollouts on separate engines, one policy version behind, the GPUs split in the best
    proportion: nobody waits for the longest completion. A bound: it ignores the split's cost in memory and traffic."""
    balanced_rollout: float
    """Seconds of the rollout stage if engines shared all completions evenly; the real stage waits for the rest."""
    adapter_refit: float
    """Seconds of the refit stage if the engine took adapters instead of merged weights."""

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def simulate(
    config: Config,
    hf: HFModelConfig,
    *,
    gpus: int,
    prompts: int,
    rates: Rates,
    rng: np.random.Generator,
    hardware: Hardware | None = None,
) -> Step:
    """Simulate one step of `prompts` prompts on `gpus` GPUs; ValueError if the ranks cannot share them evenly."""
    hardware = hardware or Hardware()
    replicas, group = gpus // config.parallel.tensor, config.rollout.group_size
    if gpus % config.parallel.tensor or prompts % replicas:
        raise ValueError(
            f"{prompts} prompts do not divide over {gpus} GPUs at parallel.tensor={config.parallel.tensor}"
        )
    lengths = sample_lengths(rates, config, prompts * group, rng).reshape(replicas, -1)
    decode = decoding(config, hf, rates, hardware)
    engines = lengths.reshape(gpus // engine_tensor(config), -1)
    rollout = max(engine_seconds(engine.tolist(), decode) for engine in engines)
    ideal_rollout = float(np.mean([continuous_seconds(engine.tolist(), decode) for engine in engines]))
    verify = lengths.shape[1] / (rates.answers_per_worker_s * config.verifier.workers)
    teacher = _teacher_seconds(config, hf, lengths, rates, hardware, rng)
    update = _update_seconds(config, hf, lengths, rates, hardware)
    gradients = _gradient_seconds(config, hf, replicas, rates, hardware)
    refit, adapter_refit = _refit_seconds(config, hf, rates, hardware)
    training = float((teacher + update).mean()) + gradients
    slowest = int(np.argmax(teacher + update))
    return Step(
        stages={
            "rollout": rollout,
            "verify": verify,
            "teacher": float(teacher[slowest]),
            "update": float(update[slowest]),
            "gradients": gradients,
            "refit": refit,
        },
        tokens=int(lengths.sum()),
        # With a share x of the GPUs for rollouts: rollout / x = training / (1 - x) = rollout + training.
        asynchronous=ideal_rollout + training + refit,
        balanced_rollout=ideal_rollout,
        adapter_refit=adapter_refit,
    )


def _teacher_seconds(
    config: Config, hf: HFModelConfig, lengths: np.ndarray, rates: Rates, hardware: Hardware, rng: np.random.Generator
) -> np.ndarray:
    """Return the seconds of the teacher's pass, [replicas].

    It is one forward over problem, witness (the shortest of its group) and prefix, for each mixed group.
    """
    if config.algorithm.name != "ssopd":
        return np.zeros(len(lengths))
    groups = lengths.reshape(len(lengths), -1, config.rollout.group_size)
    mixed = rng.random(groups.shape[:2]) < rates.mixed_fraction
    prefix = np.minimum(groups.max(axis=2), config.algorithm.prefix_tokens)
    tokens = rates.prompt_tokens + groups.min(axis=2) + prefix
    flops = np.where(mixed, Work(hf, None, recompute=False).forward(tokens), 0.0).sum(axis=1)
    seconds = flops / (config.parallel.tensor * hardware.flops * rates.forward_efficiency)
    return seconds + _tensor_parallel_seconds(config, hf, (mixed * tokens).sum(axis=1), 2, rates, hardware)


def _update_seconds(
    config: Config, hf: HFModelConfig, lengths: np.ndarray, rates: Rates, hardware: Hardware
) -> np.ndarray:
    """Return the seconds of forward, recomputation and backward over every sequence, [replicas]."""
    tokens = lengths + rates.prompt_tokens
    rank = config.lora.rank if config.lora.enabled else None
    flops = Work(hf, rank, config.model.recompute).update(tokens).sum(axis=1)
    seconds = flops / (config.parallel.tensor * hardware.flops * rates.update_efficiency)
    passes = 4 + 2 * config.model.recompute
    return seconds + _tensor_parallel_seconds(config, hf, tokens.sum(axis=1), passes, rates, hardware)


def _tensor_parallel_seconds(
    config: Config, hf: HFModelConfig, tokens: np.ndarray, reduces: int, rates: Rates, hardware: Hardware
) -> np.ndarray:
    """Return the seconds of `reduces` all-reduces of the hidden states in every layer.

    With sequence parallelism each is a reduce-scatter and an all-gather, which take the same time.
    """
    link = hardware.nvlink_bytes_per_s * rates.link_efficiency
    per_token = all_reduce_s(hf.hidden_size * DTYPE_BYTES[config.model.dtype], config.parallel.tensor, link, 0.0)
    return tokens * hf.num_layers * reduces * per_token


def _gradient_seconds(config: Config, hf: HFModelConfig, replicas: int, rates: Rates, hardware: Hardware) -> float:
    """Return the seconds to reduce fp32 gradients over the replicas and gather updated weights.

    More than one node uses the network.
    """
    tensor, width = config.parallel.tensor, DTYPE_BYTES[config.model.dtype]
    trained = adapters(hf, tensor, config.lora.rank) if config.lora.enabled else parameters(hf, tensor)
    in_node = replicas * tensor <= hardware.gpus_per_node
    link = (hardware.nvlink_bytes_per_s if in_node else hardware.network_bytes_per_s) * rates.link_efficiency
    reduce = reduce_scatter_s(4 * trained, replicas, link, rates.latency_s)
    return reduce + reduce_scatter_s(width * trained, replicas, link, rates.latency_s)


def _refit_seconds(config: Config, hf: HFModelConfig, rates: Rates, hardware: Hardware) -> tuple[float, float]:
    """Return the seconds of a refit with (merged weights, adapters only).

    Merged: adapters are merged in float32, shards gathered over the tensor-parallel group and copied into the engine.
    Adapters only: the engine's base weights go to the host while it sleeps, and come back.
    """
    tensor, engine, width = config.parallel.tensor, engine_tensor(config), DTYPE_BYTES[config.model.dtype]
    base, engine_bytes = parameters(hf, tensor), parameters(hf, engine) * width
    bandwidth = hardware.memory_bytes_per_s * rates.memory_efficiency
    link = hardware.nvlink_bytes_per_s * rates.link_efficiency
    swap = 2 * engine_bytes / (hardware.pcie_bytes_per_s * rates.link_efficiency)
    merge = base * (2 * width + 4 * 4) / bandwidth  # bfloat16 in and out; the sum and its terms in float32
    gather = reduce_scatter_s(parameters(hf, 1) * width, tensor, link, rates.latency_s)
    copy = 3 * engine_bytes / bandwidth  # into vLLM's buffers, then into its layout
    small = adapters(hf, tensor, config.lora.rank) * width if config.lora.enabled else base * width
    adapters_only = reduce_scatter_s(small * tensor, tensor, link, rates.latency_s) + 2 * small / bandwidth
    return merge + gather + copy, swap + adapters_only
