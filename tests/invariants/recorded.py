"""One recorded rollout batch, and its loss and gradient by two routes: our actor, and transformers in float64.

The reference is written from the formulas alone: full log-softmaxes, autograd, one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import Distillation, grpo_loss
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import (
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
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.teacher import read_by_teacher
from nemo_ssopd.types import TeacherContext, TokenSequence, TrainExample

TEMPERATURE, CLIP, CLIP_LOW, CLIP_HIGH, REFERENCE_KL, MAX_NEW_TOKENS = 1.1, 0.05, 0.2, 0.25, 0.02, 20


PARTLY = {(6, 0), (6, 1), (7, 4)}
"""Completions and tokens that are read and not counted, in addition to the whole of completion 3."""


@dataclass(frozen=True)
class Recorded:
    """Eight completions of four prompts, two of them distilled. Ratios leave the clip's range; one is masked."""

    examples: tuple[TrainExample, ...]
    normalization: str = "token"


def record(path: str) -> Recorded:
    generator = torch.Generator().manual_seed(5)
    hf = read_hf_config(path)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(hf.vocab_size, (count,), generator=generator).tolist())

    sizes = [(5, 9), (5, 3), (7, 12), (7, 12), (4, 1), (4, 17), (6, 8), (6, 5)]
    sequences = [TokenSequence(tokens(prompt + completion), prompt) for prompt, completion in sizes]
    teachers = {}
    for index, (positions, weight) in {2: (8, 0.25), 5: (17, 0.1875)}.items():
        context = tokens(11)
        read = TokenSequence(context + sequences[index].completion[:positions], len(context))
        teachers[index] = TeacherContext(read, weight)
    model = reference_model(path)
    examples = []
    for i, (sequence, advantage) in enumerate(zip(sequences, (1.2, -1.2, 0.7, -0.7, 0.0, 0.0, -1.0, 1.0), strict=True)):
        with torch.no_grad():
            exact = logits(model, sequence).log_softmax(-1).gather(-1, _token_ids(sequence))[:, 0]
        noise = 0.4 * torch.randn(len(exact), generator=generator, dtype=torch.float64)
        examples.append(
            TrainExample(
                sequence=sequence,
                token_weights=tuple(float(i != 3 and (i, t) not in PARTLY) for t in range(sequence.completion_length)),
                group=i // 2,
                advantage=advantage,
                old_logprobs=(exact + noise).float(),
                teacher=teachers.get(i),
            )
        )
    return Recorded(tuple(examples))


# ---- The reference ---------------------------------------------------------------------------------------------------


def reference_model(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def logits(model: torch.nn.Module, sequence: TokenSequence) -> torch.Tensor:
    """[completion length, V], divided by the temperature."""
    all_logits = model(torch.tensor([sequence.tokens])).logits[0] / TEMPERATURE
    return all_logits[sequence.prompt_length - 1 : -1]


def _token_ids(sequence: TokenSequence) -> torch.Tensor:
    return torch.tensor(sequence.completion)[:, None]


def reference_loss(student: torch.nn.Module, initial: torch.nn.Module, recorded: Recorded) -> torch.Tensor:
    """Compute paper eqs. 2, 6, 11 and 13, literally, and the two other normalizations."""
    sums, lengths, auxiliary = [], [], torch.zeros(())
    for example in recorded.examples:
        sequence = example.sequence
        student_logp = logits(student, sequence).log_softmax(-1)
        with torch.no_grad():
            reference = logits(initial, sequence).log_softmax(-1).gather(-1, _token_ids(sequence))[:, 0]
        logp = student_logp.gather(-1, _token_ids(sequence))[:, 0]
        ratio, advantage = (logp - example.old_logprobs.double()).exp(), example.advantage
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
        k3 = (reference - logp).exp() - (reference - logp) - 1
        if any(example.token_weights):
            counted = torch.tensor(example.token_weights, dtype=torch.bool)
            sums.append(-(surrogate - REFERENCE_KL * k3)[counted].sum())
            lengths.append(int(counted.sum()))
        if example.teacher is not None:
            teacher = example.teacher.sequence
            with torch.no_grad():
                teacher_logp = logits(initial, teacher).log_softmax(-1)
            K = teacher.completion_length
            summands = teacher_logp.exp() * (teacher_logp - student_logp[:K])
            auxiliary = auxiliary + example.teacher.weight * summands.clamp(max=CLIP).sum(-1).mean()
    losses = torch.stack(sums)
    token_loss = {
        "token": losses.sum() / sum(lengths),
        "sequence": (losses / torch.tensor(lengths)).mean(),
        "constant": (losses / MAX_NEW_TOKENS).mean(),
    }
    prompts = len({example.group for example in recorded.examples})
    return token_loss[recorded.normalization] + auxiliary / prompts


# ---- Our actor -------------------------------------------------------------------------------------------------------


def config_for(
    path: str,
    *,
    world_size: int = 1,
    tensor: int = 1,
    token_budget: int = 4096,
    lora: bool = False,
    dtype: str = "float32",
    normalization: str = "token",
    **optimizer,
) -> Config:
    return Config(
        run_dir="unused",
        model=ModelConfig(path=path, dtype=dtype, recompute=False),
        lora=LoraConfig(enabled=lora, rank=4, alpha=8.0),
        parallel=ParallelConfig(world_size=world_size, tensor=tensor, timeout_minutes=2),
        algorithm=AlgorithmConfig(normalization=normalization),
        rollout=RolloutConfig(temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-3, **{"grad_clip": 0.0, "distributed": False, **optimizer}),
        trainer=TrainerConfig(token_budget=token_budget, chunk_tokens=7),
    )


def build_actor(config: Config) -> MegatronPolicy:
    runtime = initialize(config.parallel, seed=1)
    return MegatronPolicy(config, read_hf_config(config.model.path), runtime, pad_id=0)


def one_update(actor: MegatronPolicy, recorded: Recorded, *, aux: bool = True):
    """An update on this data-parallel rank's share: whole prompts, dealt out in turn."""
    rank, size = actor.runtime.layout.data.rank, actor.runtime.layout.data.size
    mine = [example for example in recorded.examples if example.group % size == rank]
    with actor.reference():
        reference = actor.logprobs([example.sequence for example in mine])
    mine = [replace(e, reference_logprobs=logprobs) for e, logprobs in zip(mine, reference, strict=True)]
    mine = read_by_teacher(mine, actor)
    distillation = Distillation(
        CLIP, TEMPERATURE, actor.chunk_tokens, actor.hf.vocab_size, actor.runtime.layout.tensor.group
    )
    loss = partial(grpo_loss, clip=RatioClip(CLIP_LOW, CLIP_HIGH), reference_kl=REFERENCE_KL)
    return actor.update(mine, loss, [distillation] if aux else [])


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
