"""Build the parts of a run on one rank, and bring them into their starting state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import AuxLoss, Distillation, TokenLoss, grpo_loss, sft_loss
from nemo_ssopd.checkpoint.checkpoint import LoopState, load_checkpoint
from nemo_ssopd.config.algorithm import Recipe
from nemo_ssopd.config.plugin import load_function
from nemo_ssopd.config.run import Config, engine_tensor, importance_cap
from nemo_ssopd.data.loading import RunData
from nemo_ssopd.data.prompts import PromptOrder
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.refit import refit
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.models.family import HFModelConfig, read_hf_config
from nemo_ssopd.observe.sinks import ConsoleSink, JsonlSink, Sink, TensorBoardSink, WandbSink
from nemo_ssopd.rollout.collector import RolloutCollector, Sampling, request_seed
from nemo_ssopd.rollout.engine import RolloutEngine
from nemo_ssopd.rollout.graders import Grader, build_grader
from nemo_ssopd.run.alarms import UnhealthyRun
from nemo_ssopd.run.watchdog import Watch
from nemo_ssopd.types import TokenSequence

CHECKED_TOKENS = 16
"""Most tokens of each completion in `check_refit`."""

CACHE_SHARE = 0.8
"""Share of the engine's memory, its weights subtracted, that a KV cache of fixed size takes. The rest is left for the
workspace of an engine step (ours; not measured)."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a run on one rank. An SFT run without data.eval has no collector."""

    config: Config
    hf: HFModelConfig
    runtime: Runtime
    watch: Watch
    data: RunData
    order: PromptOrder
    policy: MegatronPolicy
    optional_collector: RolloutCollector | None
    token_loss: TokenLoss
    aux_losses: tuple[AuxLoss, ...]

    @property
    def collector(self) -> RolloutCollector:
        assert self.optional_collector is not None, "this run samples nothing"
        return self.optional_collector

    @property
    def prompts_per_rank(self) -> int:
        return self.config.trainer.prompts_per_step // self.runtime.layout.data.size


def build(config: Config, data: RunData, runtime: Runtime, watch: Watch) -> Trainer:
    """Build the grader first, since its errors are cheap; then the policy; then the engine, in the memory left."""
    samples = bool(data.train or data.eval)
    grader = build_grader(config) if samples and runtime.layout.tensor.rank == 0 else None
    is_sft = config.algorithm.name == Recipe.sft
    hf = read_hf_config(config.model.path)
    policy = MegatronPolicy(config, hf, runtime, pad_id=data.stop_token_ids[0])
    return Trainer(
        config=config,
        hf=hf,
        runtime=runtime,
        watch=watch,
        data=data,
        order=PromptOrder(len(data.supervised if is_sft else data.train), config.trainer.seed),
        policy=policy,
        optional_collector=build_collector(config, data, runtime, policy, grader) if samples else None,
        token_loss=sft_loss if is_sft else surrogate(config),
        aux_losses=build_aux_losses(config, hf, runtime),
    )


def surrogate(config: Config) -> TokenLoss:
    """Return GRPO's token loss with the config's settings."""
    algorithm = config.algorithm
    return partial(
        grpo_loss,
        clip=RatioClip(algorithm.ratio_clip_low, algorithm.ratio_clip_high, algorithm.ratio_clip_dual),
        reference_kl=algorithm.reference_kl,
        reference_penalty=algorithm.reference_penalty,
        importance_cap=importance_cap(config),
    )


def build_aux_losses(config: Config, hf: HFModelConfig, runtime: Runtime) -> tuple[AuxLoss, ...]:
    """Return the distillation, if the recipe has one, and the user's own losses."""
    own = [load_function("algorithm.aux_losses", name) for name in config.algorithm.aux_losses]
    distilled = (distillation(config, hf, runtime),) if config.algorithm.distills else ()
    return (*distilled, *(build(config, hf, runtime) for build in own))


def distillation(config: Config, hf: HFModelConfig, runtime: Runtime) -> Distillation:
    """Return SSOPD's auxiliary loss with the config's settings."""
    return Distillation(
        kl_clip=config.algorithm.kl_clip,
        temperature=config.rollout.temperature,
        chunk_tokens=config.trainer.chunk_tokens,
        vocab_size=hf.vocab_size,
        group=runtime.layout.tensor.group,
        divergence=config.algorithm.divergence,
        contrast=config.algorithm.contrast,
    )


def build_collector(
    config: Config, data: RunData, runtime: Runtime, policy: MegatronPolicy, grader: Grader | None
) -> RolloutCollector:
    """Build this rank's engine and collector; `grader` is None except on the first rank of a tensor-parallel group."""
    rollout = config.rollout
    engine = RolloutEngine(
        config.model.path,
        replace(config.engine, tensor=engine_tensor(config)),
        dtype=config.model.dtype,
        max_model_len=longest_request(config),
        seed=config.trainer.seed,
        trust_remote_code=config.model.trust_remote_code,
        lora_rank=config.lora.rank if rollout.refit == "adapter" else 0,
        gpu_cache_bytes=fixed_cache(config, runtime, policy.base_bytes),
    )
    return RolloutCollector(
        engine,
        grader,
        data.tokenizer,
        stop_token_ids=data.stop_token_ids,
        engine_tensor=engine_tensor(config),
        group=runtime.layout.tensor_cpu_group,
    )


def fixed_cache(config: Config, runtime: Runtime, base_bytes: int) -> int:
    """Return the bytes of the engine's KV cache on CUDA, from the config and the size of the GPU alone.

    `base_bytes` is the size of this rank's shard of the base model. 0 lets vLLM take what is free.
    """
    if not runtime.deterministic or runtime.device.type == "cpu":
        return 0
    _, total = torch.cuda.mem_get_info()
    weights = base_bytes * config.parallel.tensor / engine_tensor(config)
    return int((config.engine.gpu_memory_utilization * total - weights) * CACHE_SHARE)


def longest_request(config: Config) -> int:
    """Return the longest sequence of the engine, prompt plus completion, in tokens."""
    new_tokens = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens if config.data.eval else 0)
    return config.rollout.max_prompt_tokens + new_tokens


def sinks(config: Config, state: LoopState) -> list[Sink]:
    """Return the destinations of rank 0's metrics. Lines that an interrupted run logged after `state` are dropped."""
    run_dir, first = Path(config.run_dir), state.step + 1 if state.step else 0
    chosen: list[Sink] = [
        JsonlSink(run_dir / "metrics.jsonl", first),
        ConsoleSink(config.trainer.max_steps, state.step),
    ]
    if config.logging.tensorboard:
        chosen.append(TensorBoardSink(run_dir / "tensorboard", first))
    if config.logging.wandb_project:
        chosen.append(WandbSink(config.logging.wandb_project, run_dir, asdict(config), first))
    return chosen


def resume_or_begin(trainer: Trainer) -> LoopState:
    """Load the newest checkpoint with trainer.resume, check the refit, and send the policy's weights to the engine."""
    config = trainer.config
    trainer.watch.enter("resume")
    state = load_checkpoint(trainer.policy, config) if config.trainer.resume else LoopState()
    if trainer.optional_collector is not None:
        trainer.watch.enter("refit")
        check_refit(trainer, state.step)
        refit(trainer.policy, trainer.collector.engine, config, policy_version=state.step)
    if trainer.runtime.is_main:
        OmegaConf.save(OmegaConf.structured(config), Path(config.run_dir) / "config.yaml")
    return state


def check_refit(trainer: Trainer, step: int) -> None:
    """Refit the engine with a policy far from the real one, and check that its samples have that policy's log-probs.

    All ranks call this, once; it restores the trainer's weights. UnhealthyRun on all ranks when an engine is off by
    half or more of the distance between the two policies. Every refit compares tensors; this also checks what the
    engine computes with them: graphs, caches and kernels.
    """
    config, policy, collector = trainer.config, trainer.policy, trainer.collector
    prompt, count = (trainer.data.train or trainer.data.eval)[0].tokens, trainer.runtime.layout.tensor.size
    sampling = Sampling(config.rollout.temperature, min(config.rollout.max_new_tokens, CHECKED_TOKENS))
    with policy.changed():
        refit(policy, collector.engine, config, policy_version=step)
        seeds = [[request_seed("refit", index)] for index in range(count)]  # one prompt for each engine of the group
        groups = collector.generate([prompt] * count, seeds=seeds, sampling=sampling)
        sequences = [TokenSequence(prompt + completion.tokens, len(prompt)) for [completion] in groups]
        changed = torch.cat(policy.logprobs(sequences)).cpu()
    real = torch.cat(policy.logprobs(sequences)).cpu()
    sampled = torch.tensor([logprob for [completion] in groups for logprob in completion.logprobs])
    own = float((changed - real).abs().mean()), float((sampled - changed).abs().mean())
    everywhere: list[Any] = [None] * trainer.runtime.world_size
    dist.all_gather_object(everywhere, own, group=trainer.runtime.cpu_group)
    if wrong := [(moved, away) for moved, away in everywhere if not away < moved / 2]:  # NaN is wrong too
        moved, away = wrong[0]
        raise UnhealthyRun(
            f"refit: a change of the weights that moves log-probs by {moved:.3g} nats per token leaves the engine "
            f"{away:.3g} away: it does not sample from the weights that it was sent. This is an error in the engine or "
            "in its version"
        )
