"""The configuration tree: frozen dataclasses, their defaults, and every check that needs no GPU and no engine.

Defaults live on the fields and nowhere else; the files in `conf/` say only what a run changes. Where a
default comes from stands beside it: (paper), (OPSD: the public implementation whose set-up the paper
follows, arXiv 2601.18734), or (ours). Every message names the field, the value and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from nemo_ssopd.config.algorithm import CHOICES, AlgorithmConfig
from nemo_ssopd.config.renamed import with_present_names
from nemo_ssopd.models.hf_config import HFModelConfig, read_hf_config

_PACKAGE = Path(__file__).parents[1]
# Beside the package in a checkout, inside it when installed.
CONF = next(folder for folder in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if folder.is_dir())

MAX_ENGINE_RANK = 512
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelConfig:
    """Where the initial weights come from."""

    path: str = MISSING
    """A Hugging Face directory (config.json, safetensors, tokenizer) of a dense Qwen3, Qwen2 or Llama."""
    dtype: str = "bfloat16"
    """Parameters and activations: bfloat16, float16 (whose loss is scaled) or float32. Gradients and optimizer state
    are float32 always."""
    recompute: bool = True
    """Recompute each layer's activations in the backward instead of keeping them."""
    trust_remote_code: bool = False
    """Whether transformers may run code found in `path`."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the q, k, v, o, gate, up and down projections (paper)."""

    enabled: bool = True
    """False trains every weight; the initial weights are then kept as the fixed teacher and reference."""
    rank: int = 64
    """(OPSD)"""
    alpha: float = 128.0
    """The adapter's output is scaled by alpha / rank (OPSD)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes share the model. Data-parallel size = world_size / tensor."""

    world_size: int = 8
    """Processes in all: one per GPU, or plain CPU processes."""
    tensor: int = 1
    """Tensor-parallel size: must divide the query heads, the key-value heads and the MLP width."""
    sequence: bool = False
    """Sequence parallelism beside tensor parallelism."""
    threads: int = 1
    """CPU threads of each process, without a GPU."""
    timeout_minutes: float = 60.0
    """How long a stage of a step may take, or a collective wait for another rank, before the run fails."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of the training completions, by vLLM."""

    group_size: int = 8
    """G completions per prompt (OPSD)."""
    temperature: float = 1.1
    """One temperature for sampling and for every log-prob and KL of the trainer (OPSD)."""
    max_prompt_tokens: int = 2048
    """Longer student prompts are dropped and counted (OPSD)."""
    max_new_tokens: int = 16000
    """Completions are cut here (OPSD)."""
    tensor: int = 0
    """Tensor-parallel size of the engine; 0 takes parallel.tensor. A smaller one gives more engines."""
    gpu_memory_utilization: float = 0.45
    """Share of GPU memory that the awake engine may use."""
    cpu_cache_gib: float = 1.0
    """Size of each engine's KV cache without a GPU."""
    max_sequences: int = 256
    """Requests that one engine runs at once."""
    refit: str = "merged"
    """What the engine gets after a step: merged, every weight with the adapters added; or adapter, the adapters alone,
    which vLLM then applies as a LoRA to the base model (ours)."""


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of completions (docs/rewards.md)."""

    function: str | None = None
    """package.module:name of a function (completion, row) -> reward or (reward, reason), called in killable worker
    processes; null rewards 1 for an answer that math-verify finds equal to the row's, else 0."""
    threshold: float = 0.5
    """A completion is correct when its reward is over this: for pairs, frontier weights, pass@k and maj@k (ours)."""

    def check(self) -> None:
        """ValueError names the field, the value and the remedy. Whether the function is there, its worker will say."""
        module, colon, name = (self.function or "module:name").partition(":")
        require(
            bool(colon)
            and not module.endswith(".py")
            and all(part.isidentifier() for part in (*module.split("."), name)),
            f"reward.function={self.function!r}: write it as package.module:name",
        )
        require(
            0 <= self.threshold < math.inf,
            f"reward.threshold={self.threshold}: give 0 or more, since a completion whose grading fails gets 0",
        )


@dataclass(frozen=True)
class VerifierConfig:
    """The killable worker processes that grade, by math-verify or by the user's function."""

    workers: int = 8
    """Worker processes on each data-parallel rank's first process."""
    timeout_s: float = 5.0
    """Wall-clock limit of one completion; on overrun the worker is killed and the reward is 0."""
    cpu_s: float = 1.5
    """CPU limit of one completion. It normally ends a hang, since it does not depend on how busy the machine is."""
    memory_gb: float = 3.0
    """Address space of one worker."""


@dataclass(frozen=True)
class DataConfig:
    """Problems and the two prompts made from them."""

    train: str = MISSING
    """A .jsonl or .parquet file, a Hugging Face hub name, or demo:NAME?count=N&seed=S for the built-in task."""
    eval: str | None = None
    """Likewise, for Avg@n during and after training."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    problem_field: str | None = None
    """Null takes the first of the usual names that the rows have: problem, question, ... (see data/prompts.py)."""
    answer_field: str | None = None
    solution_field: str = "solution"
    student_template: str = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    """The user turn that the student reads; {problem} is replaced."""
    teacher_template: str = (
        "{problem}\n\nHere is a correct solution to this problem:\n"
        "=== Solution begin ===\n{witness}\n=== Solution end ===\n\n"
        "Solve the problem in your own words.\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    """The user turn that the teacher reads; {problem} and {witness} are replaced."""
    strip_thinking: bool = False
    """Leave the <think> and </think> marks (not their content) out of the witness."""
    enable_thinking: bool = True
    """Passed to the chat template, alike for student and teacher."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay; the rate is constant after a linear warm-up."""

    lr: float = 5e-6
    """(ours, after OPSD's later scripts)"""
    warmup_steps: int = 0
    decay_steps: int = 0
    """Cosine decay to zero at this step; 0 keeps the rate constant."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    seed: int = 1
    max_steps: int = 100
    prompts_per_step: int = 32
    """Prompts of one rollout batch, over all data-parallel ranks (ours)."""
    updates_per_step: int = 1
    """Optimizer steps on each rollout batch; with more than one, old log-probs are scored before the first."""
    token_budget: int = 32768
    """Tokens of one micro-batch, its sequences laid end to end; a longer sequence gets a micro-batch of its own."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at one time (the paper's vocabulary chunk; size ours)."""
    save_every: int = 25
    """Steps between checkpoints (OPSD); 0 saves at the end only."""
    keep_checkpoints: int = 3
    """Older checkpoints are removed; 0 keeps all."""
    keep_best: bool = True
    """Also save where Avg@n is the highest so far, and keep that checkpoint until a better one is there (ours)."""
    async_save: bool = False
    """Write checkpoints beside the next steps, from a copy of the trained state in host memory (Megatron-LM)."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates not at all during training."""
    teacher_samples: int = 2
    """Completions of the teacher at each evaluation, for every held-out problem that the policy solves in part: how
    often it is right given the witness (ours); 0 draws none."""
    eval_at_ends: bool = True
    """Evaluate before the first step and after the last, when data.eval is set."""
    resume: bool = False
    """Continue from the newest checkpoint of run_dir; without one, start at step 0."""
    max_skipped_steps: int = 3
    """Stop after this many skipped steps in a row: a loss or gradient that is not finite, or a spike."""
    spike_factor: float = 10.0
    """Skip a step whose gradient norm is over this many times the largest of the last 16; 0 switches it off (ours)."""
    max_logprob_mismatch: float | None = None
    """Stop when engine and trainer differ by more nats, on average over a step's tokens; 0 switches it off. Null takes
    MISMATCH_BOUNDS: 0.1 in float32, where 1e-7 to 9e-6 was measured; 0.3 in bfloat16, where equal policies differ by
    1e-3 (demo, its own samples) to 0.09 (SmolLM2, random tokens); 0.05 in float16, which rounds 8 times finer and
    measured 1e-4 on the demo (ours)."""
    time_budget_minutes: float = 0.0
    """Save and stop in time to end within this, from the start of the SLURM job or else of the run; 0 has no limit."""
    export: bool = True
    """Write a merged Hugging Face model to run_dir/hf at the end."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1 as they are logged, whose torch profiler trace, and on CUDA the memory snapshot, goes to
    run_dir/profile/. Every kernel of the rollouts is in it: choose a small rollout.max_new_tokens."""
    deterministic: bool = False
    """Repeat a run exactly on CUDA too, at a cost in speed (docs/reliability.md); without CUDA every run repeats."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Avg@n before, during and after training (defaults: OPSD; Qwen3 itself recommends temperature 0.6)."""

    samples: int = 12
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    max_new_tokens: int = 38912
    seed: int = 1234


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Name of a Weights & Biases project; None leaves it off."""
    save_rollouts: bool = True
    """Write every rollout, its reward and reason to run_dir/rollouts/."""


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def open_schema(tree: type) -> DictConfig:
    """The tree as Hydra's schema: unknown keys and wrong types raise. Frozen dataclasses come read-only."""
    schema = OmegaConf.structured(tree)
    for node in (schema, *(schema._get_node(key) for key in schema)):
        if isinstance(node, DictConfig):
            node._set_flag("readonly", None)
    return schema


ConfigStore.instance().store(name="schema", node=open_schema(Config))


def compose_run(name: str, overrides: Sequence[str]) -> DictConfig:
    """conf/NAME.yaml with KEY=VALUE overrides, as the training command composes it."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, with_present_names(list(overrides)))


def from_hydra(composed: DictConfig) -> Config:
    """The composed tree as dataclasses, checked: ValueError names the field, the value and the remedy."""
    config = cast(Config, as_dataclasses(composed))
    validate(config)
    return config


def as_dataclasses(composed: DictConfig) -> Any:
    """The composed tree, unchecked but for values that are missing."""
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: give each a value in the config or as KEY=VALUE")
    return OmegaConf.to_object(composed)


def engine_tensor(config: Config) -> int:
    """Tensor-parallel size of the rollout engines."""
    return config.rollout.tensor or config.parallel.tensor


IMPORTANCE_CAPS = {"float32": 0.0, "bfloat16": 2.0, "float16": 2.0}
"""algorithm.importance_cap where it is null, by model.dtype. In float32 engine and trainer agree."""

MISMATCH_BOUNDS = {"float32": 0.1, "bfloat16": 0.3, "float16": 0.05}
"""trainer.max_logprob_mismatch where it is null, by model.dtype."""


def importance_cap(config: Config) -> float:
    """Cap of the importance weights of the surrogate; 0 for no weights."""
    cap = config.algorithm.importance_cap
    return IMPORTANCE_CAPS[config.model.dtype] if cap is None else cap


def max_logprob_mismatch(config: Config) -> float:
    """Mean difference of engine and trainer that stops the run, in nats; 0 for none."""
    bound = config.trainer.max_logprob_mismatch
    return MISMATCH_BOUNDS[config.model.dtype] if bound is None else bound


def context_length(config: Config) -> int:
    """Longest sequence of the student, in tokens: prompt and completion of training."""
    return config.rollout.max_prompt_tokens + config.rollout.max_new_tokens


def validate(config: Config) -> None:
    """Every check that needs nothing but the config and the files that it names."""
    check_numbers(config, read_hf_config(config.model.path))
    _check_sources(config)


def check_numbers(config: Config, hf: HFModelConfig) -> None:
    """The checks that need no file: single values, the layout, the lengths."""
    _check_values(config)
    _check_layout(config, hf)
    _check_lengths(config, hf)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_ranges(
    config: Any, *, choices: dict[str, tuple[str, ...]], at_least_one: str, positive: str, not_negative: str
) -> None:
    """Choices and ranges of single fields, given as section.key, several in one string."""
    for name, allowed in choices.items():
        require(_get(config, name) in allowed, f"{name}={_get(config, name)!r}: use one of {', '.join(allowed)}")
    for name in at_least_one.split():
        require(_get(config, name) >= 1, f"{name}={_get(config, name)}: give at least 1")
    for name in positive.split():
        require(_get(config, name) > 0, f"{name}={_get(config, name)}: give a value above 0")
    for name in not_negative.split():
        value = _get(config, name)
        require(value is None or value >= 0, f"{name}={value}: give 0 or more")


def _check_values(config: Config) -> None:
    """What single fields may be."""
    check_ranges(
        config,
        choices={
            "model.dtype": DTYPES,
            "rollout.refit": ("merged", "adapter"),
            **{f"algorithm.{name}": allowed for name, allowed in CHOICES.items()},
        },
        at_least_one="parallel.world_size parallel.tensor parallel.threads algorithm.prefix_tokens rollout.group_size "
        "rollout.max_prompt_tokens rollout.max_new_tokens rollout.max_sequences verifier.workers trainer.max_steps "
        "trainer.prompts_per_step trainer.updates_per_step trainer.token_budget trainer.chunk_tokens "
        "evaluation.samples evaluation.max_new_tokens lora.rank trainer.max_skipped_steps",
        positive="parallel.timeout_minutes algorithm.kl_clip "
        "optimizer.lr rollout.temperature verifier.timeout_s verifier.cpu_s verifier.memory_gb lora.alpha",
        not_negative="algorithm.lambda_0 algorithm.contrast "
        "algorithm.reference_kl algorithm.advantage_eps algorithm.ratio_clip_low "
        "algorithm.ratio_clip_high optimizer.weight_decay optimizer.grad_clip optimizer.warmup_steps "
        "optimizer.decay_steps algorithm.refills algorithm.overlong_buffer algorithm.importance_cap "
        "trainer.save_every trainer.teacher_samples trainer.eval_every trainer.keep_checkpoints rollout.tensor "
        "trainer.spike_factor evaluation.temperature trainer.max_logprob_mismatch trainer.time_budget_minutes",
    )
    _check_algorithm(config.algorithm, config.rollout)
    config.reward.check()
    for step in config.trainer.profile_steps:
        require(
            1 <= step <= config.trainer.max_steps,
            f"trainer.profile_steps has {step}: give steps from 1 to trainer.max_steps={config.trainer.max_steps}",
        )
    require(
        not config.trainer.deterministic or config.rollout.refit == "merged",
        "trainer.deterministic=true with rollout.refit=adapter: on CUDA vLLM's LoRA kernel sums in the order in which "
        "its threads come: use rollout.refit=merged",
    )
    require(
        config.rollout.refit == "merged" or config.lora.enabled,
        "rollout.refit=adapter needs lora.enabled=true: without adapters use rollout.refit=merged",
    )
    require(
        config.rollout.refit == "merged" or config.lora.rank <= MAX_ENGINE_RANK,
        f"rollout.refit=adapter: vLLM takes adapters of rank {MAX_ENGINE_RANK} at the most, and lora.rank is "
        f"{config.lora.rank}: lower it, or use rollout.refit=merged",
    )
    require("{problem}" in config.data.student_template, "data.student_template lacks {problem}: say where it goes")
    for mark in ("{problem}", "{witness}"):
        require(mark in config.data.teacher_template, f"data.teacher_template lacks {mark}: say where it goes")


def _check_algorithm(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> None:
    """What the settings of the objective may be together."""
    require(
        not algorithm.rewards or rollout.group_size > 1,
        f"rollout.group_size={rollout.group_size}: advantages compare completions, give at least 2",
    )
    require(0 <= algorithm.ema_decay < 1, f"algorithm.ema_decay={algorithm.ema_decay}: give 0 or more, below 1")
    require(
        algorithm.ratio_clip_dual == 0 or algorithm.ratio_clip_dual > 1,
        f"algorithm.ratio_clip_dual={algorithm.ratio_clip_dual}: give a bound on the ratio above 1, or 0 for none",
    )
    require(
        algorithm.overlong_buffer <= rollout.max_new_tokens,
        f"algorithm.overlong_buffer={algorithm.overlong_buffer} is over rollout.max_new_tokens="
        f"{rollout.max_new_tokens}: lower it",
    )


def _get(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def check_tensor(parallel: ParallelConfig, hf: HFModelConfig, path: str) -> None:
    """The model's shape against the processes that share it."""
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
    """The processes against the model's shape, the engine and the batch."""
    parallel, trainer, engine_tp = config.parallel, config.trainer, engine_tensor(config)
    check_tensor(parallel, hf, config.model.path)
    require(
        parallel.tensor % engine_tp == 0,
        f"rollout.tensor={engine_tp} does not divide parallel.tensor={parallel.tensor}: use a divisor, or 0",
    )
    require(
        not parallel.sequence or parallel.tensor > 1,
        "parallel.sequence=true needs parallel.tensor > 1: set parallel.sequence=false or raise parallel.tensor",
    )
    dp = parallel.world_size // parallel.tensor
    require(
        trainer.prompts_per_step % (dp * trainer.updates_per_step) == 0,
        f"trainer.prompts_per_step={trainer.prompts_per_step} is not a multiple of data-parallel size x "
        f"trainer.updates_per_step = {dp} x {trainer.updates_per_step}: change one of them",
    )


def _check_lengths(config: Config, hf: HFModelConfig) -> None:
    """Token budgets against the model's context."""
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
    """Files that must be there before anything starts. Hub names are looked up later, on the main process."""
    model = Path(config.model.path)
    require(
        any(model.glob("*.safetensors")),
        f"model.path={config.model.path!r} has no .safetensors file: point it at a directory with the weights",
    )
    for name, source in {"data.train": config.data.train, "data.eval": config.data.eval}.items():
        if source is not None and source.endswith((".jsonl", ".parquet")):
            require(Path(source).is_file(), f"{name}={source!r} does not exist: give the path of a file")
