"""Config of a training run: its sections, and the checks across sections. No check needs a GPU or an engine.

Defaults are on the fields and nowhere else; the files in `conf/` hold only what a run changes. Every error names the
field, the value and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.checks import check_ranges, require
from nemo_ssopd.config.compose import as_dataclasses, open_schema
from nemo_ssopd.config.sections import (
    MAX_ENGINE_RANK,
    DataConfig,
    Dtype,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Refit,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
    VerifierConfig,
)
from nemo_ssopd.models.family import HFModelConfig, read_hf_config


@dataclass(frozen=True)
class Config:
    """The config of one training run."""

    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


ConfigStore.instance().store(name="schema", node=open_schema(Config))


def from_hydra(composed: DictConfig) -> Config:
    """Turn the composed tree into a checked config: ValueError names the field, the value and the remedy."""
    config = cast(Config, as_dataclasses(composed))
    check_numbers(config, read_hf_config(config.model.path))
    _check_sources(config)
    return config


def engine_tensor(config: Config) -> int:
    """Return the tensor-parallel size of the rollout engines."""
    return config.engine.tensor_in(config.parallel)


IMPORTANCE_CAPS = {Dtype.float32: 0.0, Dtype.bfloat16: 2.0, Dtype.float16: 2.0}
"""Value of algorithm.importance_cap when it is null, by model.dtype. In float32 engine and trainer agree."""

MISMATCH_BOUNDS = {Dtype.float32: 0.1, Dtype.bfloat16: 0.3, Dtype.float16: 0.05}
"""Value of trainer.max_logprob_mismatch in nats when it is null, by model.dtype."""


def importance_cap(config: Config) -> float:
    """Return the cap of the surrogate's importance weights; 0 disables the weights."""
    cap = config.algorithm.importance_cap
    return IMPORTANCE_CAPS[config.model.dtype] if cap is None else cap


def max_logprob_mismatch(config: Config) -> float:
    """Return the mean log-prob difference of engine and trainer that stops the run, in nats; 0 disables the check."""
    bound = config.trainer.max_logprob_mismatch
    return MISMATCH_BOUNDS[config.model.dtype] if bound is None else bound


def context_length(config: Config) -> int:
    """Return the length of the longest training sequence, prompt plus completion, in tokens."""
    return config.rollout.max_prompt_tokens + config.rollout.max_new_tokens


def check_numbers(config: Config, hf: HFModelConfig) -> None:
    """Check everything that needs no file: single values, the layout, the lengths."""
    check_ranges(config)
    for part in (config.algorithm, config.reward, config.data, config.trainer):
        part.check()
    _check_together(config)
    _check_layout(config, hf)
    _check_lengths(config, hf)


def _check_together(config: Config) -> None:
    """Check settings that exclude each other."""
    algorithm, rollout = config.algorithm, config.rollout
    require(config.parallel.world_size >= 1, "parallel.world_size=0: give a value at least 1")
    require(
        not algorithm.rewards or rollout.group_size > 1,
        f"rollout.group_size={rollout.group_size}: advantages compare completions, give at least 2",
    )
    require(
        algorithm.overlong_buffer <= rollout.max_new_tokens,
        f"algorithm.overlong_buffer={algorithm.overlong_buffer} is over rollout.max_new_tokens="
        f"{rollout.max_new_tokens}: lower it",
    )
    if rollout.refit == Refit.merged:
        return
    require(
        not config.trainer.deterministic,
        "trainer.deterministic=true with rollout.refit=adapter: on CUDA vLLM's LoRA kernel sums in the order in which "
        "its threads come: use rollout.refit=merged",
    )
    require(
        config.lora.enabled,
        "rollout.refit=adapter needs lora.enabled=true: without adapters use rollout.refit=merged",
    )
    require(
        config.lora.rank <= MAX_ENGINE_RANK,
        f"rollout.refit=adapter: vLLM takes adapters of rank {MAX_ENGINE_RANK} at the most, and lora.rank is "
        f"{config.lora.rank}: lower it, or use rollout.refit=merged",
    )


def check_tensor(parallel: ParallelConfig, hf: HFModelConfig, path: str) -> None:
    """Check the model's shape against the processes that share it."""
    require(
        parallel.world_size % parallel.tensor == 0,
        f"parallel.world_size={parallel.world_size} is not a multiple of parallel.tensor={parallel.tensor}: "
        f"change one of them",
    )
    sizes = {"query heads": hf.num_heads, "key-value heads": hf.num_kv_heads, "MLP width": hf.ffn_hidden_size}
    for what, size in sizes.items():
        require(
            size % parallel.tensor == 0,
            f"parallel.tensor={parallel.tensor} does not divide the {size} {what} of {path}: "
            f"use a tensor-parallel size that divides {size}",
        )


def _check_layout(config: Config, hf: HFModelConfig) -> None:
    """Check the processes against the model's shape, the engine and the batch."""
    parallel, trainer = config.parallel, config.trainer
    check_tensor(parallel, hf, config.model.path)
    engine_tensor(config)
    require(
        not parallel.sequence or parallel.tensor > 1,
        "parallel.sequence=true needs parallel.tensor > 1: set parallel.sequence=false or raise parallel.tensor",
    )
    require(
        trainer.prompts_per_step % (parallel.data * trainer.updates_per_step) == 0,
        f"trainer.prompts_per_step={trainer.prompts_per_step} is not a multiple of data-parallel size x "
        f"trainer.updates_per_step = {parallel.data} x {trainer.updates_per_step}: change one of them",
    )


def _check_lengths(config: Config, hf: HFModelConfig) -> None:
    """Check token budgets against the model's context."""
    rollout, context = config.rollout, hf.max_position_embeddings
    budgets = {"rollout.max_new_tokens": rollout.max_new_tokens}
    if config.data.eval is not None:
        budgets["evaluation.max_new_tokens"] = config.evaluation.max_new_tokens
    for name, new_tokens in budgets.items():
        require(
            rollout.max_prompt_tokens + new_tokens <= context,
            f"rollout.max_prompt_tokens + {name} = {rollout.max_prompt_tokens} + {new_tokens} is over the "
            f"{context} tokens of {config.model.path}: lower one of them",
        )


def _check_sources(config: Config) -> None:
    """Check that files exist before anything starts. Hub names are looked up later, on the main process."""
    model = Path(config.model.path)
    require(
        any(model.glob("*.safetensors")),
        f"model.path={config.model.path!r} has no .safetensors file: point it at a directory with the weights",
    )
    for name, source in {"data.train": config.data.train, "data.eval": config.data.eval}.items():
        if source is not None and source.endswith((".jsonl", ".parquet")):
            require(Path(source).is_file(), f"{name}={source!r} does not exist: give the path of a file")
