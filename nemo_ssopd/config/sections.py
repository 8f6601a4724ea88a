"""Sections of a config, except the objective: fields, defaults, ranges.

The origin of a default stands next to it: (paper), (OPSD: the public implementation whose setup the paper follows,
arXiv 2601.18734), or (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from nemo_ssopd.config.checks import check_function_name, checked, require

MAX_ENGINE_RANK = 512
"""vLLM's largest LoRA rank."""


class Dtype(StrEnum):
    """Type of parameters and activations. Gradients and optimizer state are always float32."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    """Trained with a scaled loss."""
    float32 = "float32"


class Refit(StrEnum):
    """Weights that the engine gets after a step."""

    merged = "merged"
    """Every weight, with the adapters merged in."""
    adapter = "adapter"
    """The adapters only; vLLM applies them as a LoRA to its base model (ours)."""


@dataclass(frozen=True)
class ModelConfig:
    """The model: source and type of the initial weights."""

    path: str = MISSING
    """A Hugging Face directory (config.json, safetensors, tokenizer) of a family in `nemo_ssopd/models`."""
    dtype: Dtype = Dtype.bfloat16
    recompute: bool = True
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    trust_remote_code: bool = False
    """Let transformers run code found in `path`."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the q, k, v, o, gate, up and down projections (paper)."""

    enabled: bool = True
    """False trains every weight, and keeps the initial weights as the fixed teacher and reference."""
    rank: int = checked(64, at_least=1)
    """Rank of every adapter (OPSD)."""
    alpha: float = checked(128.0, above=0)
    """The adapter's output is scaled by alpha / rank (OPSD)."""


@dataclass(frozen=True)
class ParallelConfig:
    """Layout: the number of processes, and how they share model and batch."""

    world_size: int = checked(8, at_least=0)
    """Total number of processes: one per GPU, or plain CPU processes. In an evaluation 0 takes one per visible GPU."""
    tensor: int = checked(1, at_least=1)
    """Tensor-parallel size: must divide the query heads, the key-value heads and the MLP width."""
    sequence: bool = False
    """Sequence parallelism in addition to tensor parallelism."""
    threads: int = checked(1, at_least=1)
    """CPU threads of each process; used without a GPU."""
    timeout_minutes: float = checked(60.0, above=0)
    """Minutes that a stage of a step may take, or a collective may wait for another rank, before the run fails."""

    @property
    def data(self) -> int:
        """Return the data-parallel size."""
        return self.world_size // self.tensor

    @property
    def sequence_shards(self) -> int:
        """Return the number of ranks that split the tokens between layers. A packed batch must be a multiple of it."""
        return self.tensor if self.sequence else 1


@dataclass(frozen=True)
class EngineConfig:
    """The vLLM engine, which runs in the same processes."""

    tensor: int = checked(0, at_least=0)
    """Tensor-parallel size of the engine; 0 takes parallel.tensor. A smaller size gives more engines."""
    gpu_memory_utilization: float = checked(0.45, above=0, at_most=1)
    """Share of GPU memory that the awake engine may use."""
    cpu_cache_gib: float = checked(1.0, above=0)
    """Size of each engine's KV cache without a GPU."""
    max_sequences: int = checked(256, at_least=1)
    """Most requests that one engine runs at once."""

    def tensor_in(self, parallel: ParallelConfig) -> int:
        """Return the engine's tensor-parallel size in a layout; ValueError if it does not divide parallel.tensor."""
        tensor = self.tensor or parallel.tensor
        require(
            parallel.tensor % tensor == 0,
            f"engine.tensor={tensor} does not divide parallel.tensor={parallel.tensor}: use a divisor, or 0",
        )
        return tensor


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of the training completions with vLLM."""

    group_size: int = checked(8, at_least=1)
    """G completions per prompt (OPSD)."""
    temperature: float = checked(1.1, above=0)
    """Temperature of sampling, and of every log-prob and KL in the trainer (OPSD)."""
    max_prompt_tokens: int = checked(2048, at_least=1)
    """Longest student prompt in tokens; longer ones are dropped and counted (OPSD)."""
    max_new_tokens: int = checked(16000, at_least=1)
    """Longest completion in tokens; completions are cut there (OPSD)."""
    refit: Refit = Refit.merged


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of completions (docs/rewards.md)."""

    function: str | None = None
    """package.module:name of a function (completion, row) -> reward or (reward, reason), called in killable worker
    processes; null rewards 1 for an answer that math-verify finds equal to the row's, else 0."""
    threshold: float = checked(0.5, at_least=0, below=math.inf)
    """A completion is correct when its reward is over this: for pairs, frontier weights, pass@k and maj@k (ours)."""

    def check(self) -> None:
        """Check the form of the function's name."""
        if self.function is not None:
            check_function_name("reward.function", self.function)


@dataclass(frozen=True)
class VerifierConfig:
    """Killable worker processes that grade with math-verify or with the user's function."""

    workers: int = checked(8, at_least=1)
    """Worker processes of each data-parallel rank, started by its first process."""
    timeout_s: float = checked(5.0, above=0)
    """Wall-clock seconds for one completion; after that the worker is killed and the reward is 0."""
    cpu_s: float = checked(1.5, above=0)
    """CPU seconds for one completion. It normally ends a hang, since it does not depend on how busy the machine is."""
    memory_gb: float = checked(3.0, above=0)
    """Address space of one worker, in GB."""


@dataclass(frozen=True)
class DataConfig:
    """Problems, and the prompts of student and teacher made from them."""

    train: str = MISSING
    """A .jsonl or .parquet file, a Hugging Face hub name, or demo:NAME?count=N&seed=S for the built-in task."""
    eval: str | None = None
    """Held-out problems for Avg@n before, during and after training; the same kinds of source as `train`."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    problem_field: str | None = None
    """Column of the problem; null takes the first usual name that is there: problem, question, ... (data/prompts)."""
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
    """Remove the marks <think> and </think>, but not their content, from the witness."""
    enable_thinking: bool = True
    """Argument of the chat template, for student and teacher."""

    def check(self) -> None:
        """Check that the templates name their placeholders; ValueError if one is missing."""
        require("{problem}" in self.student_template, "data.student_template lacks {problem}: say where it goes")
        for mark in ("{problem}", "{witness}"):
            require(mark in self.teacher_template, f"data.teacher_template lacks {mark}: say where it goes")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a linear warm-up and then a constant learning rate, or a cosine decay to zero."""

    lr: float = checked(5e-6, above=0)
    """Learning rate after the warm-up (ours, after OPSD's later scripts)."""
    warmup_steps: int = checked(0, at_least=0)
    decay_steps: int = checked(0, at_least=0)
    """Cosine decay to zero at this step; 0 keeps the rate constant."""
    weight_decay: float = checked(0.0, at_least=0)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    grad_clip: float = checked(1.0, at_least=0)
    """Largest global gradient norm; 0 disables clipping."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop: batches, memory, checkpoints, evaluations, alarms."""

    seed: int = 1
    max_steps: int = checked(100, at_least=1)
    prompts_per_step: int = checked(32, at_least=1)
    """Prompts of one rollout batch, over all data-parallel ranks (ours)."""
    updates_per_step: int = checked(1, at_least=1)
    """Optimizer steps on each rollout batch. With more than one, the old log-probs are computed before the first."""
    token_budget: int = checked(32768, at_least=1)
    """Most tokens of one micro-batch, sequences laid end to end. A longer sequence gets its own micro-batch."""
    chunk_tokens: int = checked(1024, at_least=1)
    """Tokens whose logits exist at the same time (the paper's vocabulary chunk; size ours)."""
    save_every: int = checked(25, at_least=0)
    """Steps between checkpoints (OPSD); 0 saves at the end only."""
    keep_checkpoints: int = checked(3, at_least=0)
    """Number of checkpoints to keep; older ones are removed. 0 keeps all."""
    keep_best: bool = True
    """Also save when Avg@n is the highest so far, and keep that checkpoint until there is a better one (ours)."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the trained state in host memory (Megatron-LM)."""
    eval_every: int = checked(0, at_least=0)
    """Steps between evaluations; 0 disables them."""
    teacher_samples: int = checked(2, at_least=0)
    """Completions that the teacher writes at each evaluation for every held-out problem that the policy solves in part.
    They measure how often it is right given the witness (ours). 0 disables them."""
    eval_at_ends: bool = True
    """Evaluate before the first step and after the last, when data.eval is set."""
    resume: bool = False
    """Continue from the newest checkpoint of run_dir; without one, start at step 0."""
    max_skipped_steps: int = checked(3, at_least=1)
    """Stop after this many skipped steps in a row: a loss or gradient that is not finite, or a spike."""
    spike_factor: float = checked(10.0, at_least=0)
    """Skip a step whose gradient norm exceeds this factor times the largest of the last 16; 0 disables it (ours)."""
    max_logprob_mismatch: float | None = checked(None, at_least=0)
    """Stop when log-probs of engine and trainer differ by more nats, on average over a step's tokens; 0 disables it.
    Null takes MISMATCH_BOUNDS: 0.1 in float32, where 1e-7 to 9e-6 was measured; 0.3 in bfloat16, where equal policies
    differ by 1e-3 (demo, its own samples) to 0.09 (SmolLM2, random tokens); 0.05 in float16, which rounds 8 times
    finer and measured 1e-4 on the demo (ours)."""
    time_budget_minutes: float = checked(0.0, at_least=0)
    """Minutes from the start of the SLURM job, or else of the run, within which to save and stop; 0 has no limit."""
    export: bool = True
    """Write a merged Hugging Face model to run_dir/hf at the end."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps to profile, counted from 1 as in the log. A trace of torch's profiler, and on CUDA a memory snapshot, go
    to run_dir/profile/. The trace holds every kernel of the rollouts: choose a small rollout.max_new_tokens."""
    deterministic: bool = False
    """Make runs on CUDA repeat exactly, at a cost in speed (docs/reliability.md). On CPU every run repeats exactly."""

    def check(self) -> None:
        """Check that the run has the steps to profile; ValueError if not."""
        for step in self.profile_steps:
            require(
                1 <= step <= self.max_steps,
                f"trainer.profile_steps has {step}: give steps from 1 to trainer.max_steps={self.max_steps}",
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """Avg@n before, during and after training (defaults: OPSD; Qwen3 itself recommends temperature 0.6)."""

    samples: int = checked(12, at_least=1)
    temperature: float = checked(1.0, at_least=0)
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    max_new_tokens: int = checked(38912, at_least=1)
    seed: int = 1234


@dataclass(frozen=True)
class LoggingConfig:
    """Destinations of metrics, in addition to the console and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Name of a Weights & Biases project; null disables it."""
    save_rollouts: bool = True
    """Write every rollout with its reward and reason to run_dir/rollouts/."""
