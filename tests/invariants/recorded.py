"""One recorded rollout batch, and its loss and gradient by two routes: our actor, and transformers in float64.

The reference is written from the formulas alone: full log-softmaxes, autograd, one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from nemo_ssopd.algo.losses import ClippedDistillation, DistillTarget, grpo_loss
from nemo_ssopd.config.run import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainerConfig,
)
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.megatron.weights import hf_weights, peft_weights
from nemo_ssopd.models.hf_config import read_hf_config
from nemo_ssopd.types import StepCounts, TokenSequence, TrainBatch

TEMPERATURE, CLIP, CLIP_LOW, CLIP_HIGH, REFERENCE_KL = 1.1, 0.05, 0.2, 0.25, 0.02


@dataclass(frozen=True)
class Recorded:
    """Eight sequences of four prompts, two of them distilled. Ratios leave the clip's range."""

    sequences: tuple[TokenSequence, ...]
    advantages: tuple[float, ...]
    old_logprobs: tuple[torch.Tensor, ...]
    teachers: dict[int, TokenSequence]
    weights: dict[int, float]
    scales: tuple[float, ...]
    prompts: int = 4


def record(path: str) -> Recorded:
    generator = torch.Generator().manual_seed(5)
    hf = read_hf_config(path)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(hf.vocab_size, (count,), generator=generator).tolist())

    sizes = [(5, 9), (5, 3), (7, 12), (7, 12), (4, 1), (4, 17), (6, 8), (6, 5)]
    sequences = tuple(TokenSequence(tokens(prompt + completion), prompt) for prompt, completion in sizes)
    teachers = {}
    for index, positions in {2: 8, 5: 17}.items():
        context = tokens(11)
        teachers[index] = TokenSequence(context + sequences[index].completion[:positions], len(context))
    with torch.no_grad():
        exact = [logits(reference_model(path), s).log_softmax(-1).gather(-1, _targets(s))[:, 0] for s in sequences]
    noise = [0.4 * torch.randn(len(e), generator=generator, dtype=torch.float64) for e in exact]
    return Recorded(
        sequences=sequences,
        advantages=(1.2, -1.2, 0.7, -0.7, 0.0, 0.0, -1.0, 1.0),
        old_logprobs=tuple((e + n).float() for e, n in zip(exact, noise, strict=True)),
        teachers=teachers,
        weights={2: 0.25, 5: 0.1875},
        scales=(1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.5, 1.0),
    )


# ---- The reference ---------------------------------------------------------------------------------------------------


def reference_model(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def logits(model: torch.nn.Module, sequence: TokenSequence) -> torch.Tensor:
    """[completion length, V], divided by the temperature."""
    all_logits = model(torch.tensor([sequence.tokens])).logits[0] / TEMPERATURE
    return all_logits[sequence.prompt_length - 1 : -1]


def _targets(sequence: TokenSequence) -> torch.Tensor:
    return torch.tensor(sequence.completion)[:, None]


def reference_loss(student: torch.nn.Module, initial: torch.nn.Module, recorded: Recorded) -> torch.Tensor:
    """Paper eqs. 2, 6, 11 and 13, literally."""
    tokens = sum(s.completion_length for s in recorded.sequences)
    grpo, auxiliary = torch.zeros(()), torch.zeros(())
    for i, sequence in enumerate(recorded.sequences):
        student_logp = logits(student, sequence).log_softmax(-1)
        with torch.no_grad():
            reference = logits(initial, sequence).log_softmax(-1).gather(-1, _targets(sequence))[:, 0]
        logp = student_logp.gather(-1, _targets(sequence))[:, 0]
        ratio, advantage = (logp - recorded.old_logprobs[i].double()).exp(), recorded.advantages[i]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        k3 = (reference - logp).exp() - (reference - logp) - 1
        grpo = grpo - recorded.scales[i] * (surrogate - REFERENCE_KL * k3).sum()
        if i in recorded.teachers:
            teacher = recorded.teachers[i]
            with torch.no_grad():
                teacher_logp = logits(initial, teacher).log_softmax(-1)
            K = teacher.completion_length
            summands = teacher_logp.exp() * (teacher_logp - student_logp[:K])
            auxiliary = auxiliary + recorded.weights[i] * summands.clamp(max=CLIP).sum(-1).mean()
    return grpo / tokens + auxiliary / recorded.prompts


# ---- Our actor -------------------------------------------------------------------------------------------------------


def config_for(
    path: str,
    *,
    world_size: int = 1,
    tensor: int = 1,
    token_budget: int = 4096,
    lora: bool = False,
    dtype: str = "float32",
    **optimizer,
) -> Config:
    return Config(
        run_dir="unused",
        model=ModelConfig(path=path, dtype=dtype, recompute=False),
        lora=LoraConfig(enabled=lora, rank=4, alpha=8.0),
        parallel=ParallelConfig(world_size=world_size, tensor=tensor, timeout_minutes=2),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-3, **{"clip_grad": 0.0, "distributed": False, **optimizer}),
        trainer=TrainerConfig(token_budget=token_budget, chunk_tokens=7),
    )


def build_actor(config: Config) -> MegatronPolicy:
    runtime = initialize(config.parallel, seed=1)
    return MegatronPolicy(config, read_hf_config(config.model.path), runtime, pad_id=0)


def one_update(actor: MegatronPolicy, recorded: Recorded, *, aux: bool = True):
    """An update on this data-parallel rank's share: whole prompts, dealt out in turn."""
    rank, size = actor.runtime.dp_rank, actor.runtime.dp_size
    mine = [i for i in range(len(recorded.sequences)) if (i // 2) % size == rank]
    with actor.reference():
        teachers = {local: recorded.teachers[i] for local, i in enumerate(mine) if i in recorded.teachers}
        hidden = actor.hidden_states(list(teachers.values()))
        reference = actor.logprobs([recorded.sequences[i] for i in mine])
    targets = {
        local: DistillTarget(h, recorded.weights[mine[local]]) for local, h in zip(teachers, hidden, strict=True)
    }
    distillation = ClippedDistillation(
        targets, CLIP, TEMPERATURE, actor.chunk_tokens, actor.hf.vocab_size, actor.runtime.tp_group
    )
    batch = TrainBatch(
        sequences=tuple(recorded.sequences[i] for i in mine),
        weights=tuple((recorded.advantages[i],) * recorded.sequences[i].completion_length for i in mine),
        counts=StepCounts(sum(s.completion_length for s in recorded.sequences), recorded.prompts),
        old_logprobs=tuple(recorded.old_logprobs[i] for i in mine),
        reference_logprobs=reference,
        scales=tuple(recorded.scales[i] for i in mine),
    )
    loss = partial(grpo_loss, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, reference_kl=REFERENCE_KL)
    return actor.update(batch, loss, distillation if aux else None)


def loss_and_gradient(config: Config, recorded: Recorded) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's share of the loss, and the whole reduced gradient under Hugging Face (or PEFT) names."""
    actor = build_actor(config)
    result = one_update(actor, recorded)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
    names = peft_weights(actor.model, actor.runtime) if config.lora.enabled else actor.weights()
    return result.metrics["loss/total"].value(), {name: tensor.clone() for name, tensor in names}


def weights_after(config: Config, recorded: Recorded, updates: int, *, aux: bool = True) -> dict[str, torch.Tensor]:
    actor = build_actor(config)
    for _ in range(updates):
        one_update(actor, recorded, aux=aux)
    return {name: tensor.clone() for name, tensor in hf_weights(actor.model, actor.hf, actor.runtime)}
