"""One Megatron actor with all its losses, in bfloat16 on the device, against float32 on the CPU, from the same weights.

`reference`, `policy` and `local_layers` do the same work in processes of their own and leave it in a file; `compare`
reads the files. The reference does without our kernels: its losses are written out in torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_report.stage import Results

SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 8209, "max_position_embeddings": 2048},
    "cpu": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 509, "max_position_embeddings": 256},
}
LENGTHS = {"cuda": (700, 301, 33, 512, 3, 128, 260), "cpu": (40, 17, 3, 24, 9)}
"""Of sequences packed into micro-batches of 1024 tokens (64 on the CPU): unequal, odd, and one of a few tokens."""
BUDGET = {"cuda": 1024, "cpu": 64}
PREFIX = {"cuda": 64, "cpu": 8}
MODES = {"adapters": ("lora.enabled=true", "model.recompute=true"), "all weights": ("lora.enabled=false",)}
STEPS = 3
TE_PACKAGES = ("transformer_engine", "transformer_engine_torch")

Outcome = dict[str, Any]


def reference(results: Results) -> None:
    """Float32 on the CPU: what the others are compared with."""
    _hide_transformer_engine()
    with _written_out_losses():
        _run(results, "reference", "float32")


def policy(results: Results) -> None:
    """Bfloat16 with the layers and the optimizer that training has: Transformer Engine's where it is installed."""
    _run(results, "policy", "bfloat16")


def local_layers(results: Results) -> None:
    """Bfloat16 on CUDA as if Transformer Engine were not installed."""
    if not results.on_cuda:
        results.skip("local layers", "they are what the CPU has anyway")
        return
    _hide_transformer_engine()
    _run(results, "local", "bfloat16")


def compare(results: Results) -> None:
    """Differences in the first forward, in the gradient, and in what three optimizer steps did."""
    outcomes: dict[str, Outcome] = {}
    for name in ("reference", "policy", "local"):
        file = results.folder / f"actor_{name}.pt"
        if file.exists():
            outcomes[name] = torch.load(file, weights_only=True)  # noqa: TID251 -- tensors alone
        else:
            results.skip(f"the actor's {name}", "its step left nothing")
    for one, other in (("policy", "reference"), ("local", "reference"), ("policy", "local")):
        if one in outcomes and other in outcomes:
            for mode in MODES:
                first, second = outcomes[one][mode], outcomes[other][mode]
                _compare(results, f"{mode}: {first['layers']} against {second['layers']}", first, second)


def _compare(results: Results, what: str, one: Outcome, other: Outcome) -> None:
    results.add(f"{what}: hidden states, relative error", _relative(one["hidden"], other["hidden"]), below=0.05)
    difference = (one["logprobs"] - other["logprobs"]).abs()
    results.add(f"{what}: log-probs, mean difference", float(difference.mean()), "nats", below=0.1)
    results.add(f"{what}: log-probs, largest difference", float(difference.max()), "nats")
    first, second = (torch.cat([t.flatten() for t in outcome["gradients"].values()]) for outcome in (one, other))
    assert one["gradients"].keys() == other["gradients"].keys()
    results.add(f"{what}: gradient, cosine", _cosine(first, second), above=0.99)
    results.add(f"{what}: gradient, relative error", _relative(first, second), below=0.15)
    worst = {name: _relative(one["gradients"][name], other["gradients"][name]) for name in one["gradients"]}
    name = max(worst, key=lambda key: worst[key])
    results.add(f"{what}: gradient, worst parameter", worst[name], f"relative error, {name}", below=0.5)
    norms = [abs(a / b - 1) for a, b in zip(one["norms"], other["norms"], strict=True)]
    results.add(f"{what}: gradient norms of {STEPS} steps, largest relative difference", max(norms), below=0.1)
    moved = [torch.cat([t.flatten() for t in outcome["moved"].values()]) for outcome in (one, other)]
    results.add(f"{what}: change of the weights in {STEPS} steps, cosine", _cosine(*moved), above=0.9)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


# ---- What each of the three does -------------------------------------------------------------------------------------


def _run(results: Results, name: str, dtype: str) -> None:
    from benchmarks.gpu_report import setup  # noqa: PLC0415 -- after Transformer Engine is hidden
    from nemo_ssopd.megatron.runtime import initialize  # noqa: PLC0415
    from nemo_ssopd.models.family import read_hf_config  # noqa: PLC0415

    # The reference runs beside the policy, so each has a folder of its own; the weights are the same.
    size = results.device
    model = setup.random_model(results.folder / f"actor_model_{name}", SHAPES[size], device="cpu")
    shared = [f"model.path={model}", f"model.dtype={dtype}", f"trainer.token_budget={BUDGET[size]}"]
    shared += ["optimizer.lr=1e-3", "optimizer.eps=1e-4", "trainer.chunk_tokens=256", f"parallel.threads={_threads()}"]
    runtime, outcomes = None, {}
    for mode, overrides in MODES.items():
        run_dir = results.folder / f"actor_{name}_{mode.replace(' ', '_')}"
        config = setup.one_process("tiny_cpu", [*shared, *overrides, f"run_dir={run_dir}"])
        runtime = runtime or initialize(config.parallel, seed=1)
        hf = read_hf_config(model)
        outcomes[mode] = _steps(results, config, hf, runtime, mode)
    torch.save(outcomes, results.folder / f"actor_{name}.pt")


def _steps(results: Results, config: Any, hf: Any, runtime: Any, mode: str) -> Outcome:
    """Forward, gradient, three optimizer steps, save and resume."""
    from nemo_ssopd.megatron.policy import MegatronPolicy  # noqa: PLC0415

    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    _spread_adapters(actor)
    batch, aux = _batch(actor, config, results.device)
    sequences = [example.sequence for example in batch]
    qkv = type(actor.model.decoder.layers[0].self_attention.linear_qkv).__name__
    outcome: Outcome = {
        "layers": f"{qkv.removeprefix('Adapted')} in {config.model.dtype} on {runtime.device.type}",
        "hidden": torch.cat(actor.hidden_states(sequences)).float().cpu(),
        "logprobs": torch.cat(actor.logprobs(sequences)).float().cpu(),
    }
    results.check(f"{mode}: log-probs are finite", bool(outcome["logprobs"].isfinite().all()), True)
    trained = {name: p for name, p in actor.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().float().cpu().clone() for name, p in trained.items()}
    norms = [_update(actor, batch, aux, apply=False)]
    outcome["gradients"] = {name: p.main_grad.detach().float().cpu().clone() for name, p in trained.items()}
    norms += [_update(actor, batch, aux, apply=True) for _ in range(STEPS)]
    outcome["norms"] = norms[1:]
    outcome["moved"] = {name: p.detach().float().cpu() - before[name] for name, p in trained.items()}
    results.add(f"{mode}: {outcome['layers']}, {type(_adam(actor)).__name__}: gradient norms", _rounded(norms))
    results.check(
        f"{mode}: the norm of the gradient is that of a step", math.isclose(norms[0], norms[1], rel_tol=1e-2), True
    )
    if config.model.dtype == "bfloat16":  # the reference is waited for, and tests/megatron resume in float32
        _save_and_resume(results, actor, config, hf, mode, (batch, aux))
    return outcome


def _save_and_resume(results: Results, actor: Any, config: Any, hf: Any, mode: str, inputs: tuple[Any, Any]) -> None:
    """What a checkpoint brings back, and one more step from there in both actors."""
    from nemo_ssopd.checkpoint.checkpoint import LoopState, load_checkpoint, save_checkpoint  # noqa: PLC0415
    from nemo_ssopd.megatron.policy import MegatronPolicy  # noqa: PLC0415

    save_checkpoint(actor, config, LoopState(step=STEPS))
    resumed = MegatronPolicy(config, hf, actor.runtime, pad_id=0)
    results.check(f"{mode}: step of the loop after resume", load_checkpoint(resumed, config).step, STEPS)
    results.check(f"{mode}: Adam's step counts before saving", sorted(_adam_steps(actor)), [STEPS])
    results.check(f"{mode}: Adam's step counts after resume", sorted(_adam_steps(resumed)), [STEPS])
    results.check(f"{mode}: weights after resume, largest difference", _difference(actor, resumed, _weights), 0.0)
    results.check(f"{mode}: moments after resume, largest difference", _difference(actor, resumed, _moments), 0.0)
    norms = [_update(each, *inputs, apply=True) for each in (actor, resumed)]
    results.add(
        f"{mode}: gradient norms of a step after resume, relative difference", abs(norms[0] / norms[1] - 1), below=1e-2
    )
    # At most two rates apart, where a sign differs. Those in bfloat16 may differ by its grid: up to 8e-3 at 1.
    apart = _difference(actor, resumed, _float32_weights)
    results.add(f"{mode}: float32 weights one step after resume, largest difference", apart, below=2e-3)


def _spread_adapters(actor: Any) -> None:
    """Give B, which starts at zero, values on bfloat16's grid; the optimizer's float32 copies too."""
    from nemo_ssopd.megatron.lora import adapters  # noqa: PLC0415

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(actor.model):
            adapter.B.copy_((0.02 * torch.randn(adapter.B.shape, generator=generator)).bfloat16())
    actor.optimizer.reload_model_params()


def _batch(actor: Any, config: Any, size: str) -> tuple[Any, Any]:
    """Sequences with a weight for each token, and for the first two a teacher, who reads another prompt."""
    from benchmarks.gpu_report import setup  # noqa: PLC0415
    from nemo_ssopd.teacher import read_by_teacher  # noqa: PLC0415
    from nemo_ssopd.types import TeacherContext, TokenSequence, TrainExample  # noqa: PLC0415

    vocab_size = actor.hf.vocab_size
    own = setup.sequences(LENGTHS[size], vocab_size, seed=5)
    others = setup.sequences(LENGTHS[size], vocab_size, seed=6)
    examples = []
    for row, (sequence, other) in enumerate(zip(own, others, strict=True)):
        read = TokenSequence((*other.prompt, *sequence.completion[: PREFIX[size]]), other.prompt_length)
        examples.append(
            TrainExample(
                sequence,
                token_weights=tuple(1 + 0.5 * math.sin(1 + row + t) for t in range(sequence.completion_length)),
                group=row % 2,
                advantage=(-1.0) ** row,
                teacher=TeacherContext(read, 0.5) if row < 2 else None,
            )
        )
    return read_by_teacher(examples, actor), setup.distillation(config, actor)


def _update(actor: Any, batch: Any, aux: Any, *, apply: bool) -> float:
    """The gradient norm of one update. Without `apply` it is skipped for its norm, and leaves its gradient behind."""
    from benchmarks.gpu_report.setup import LOSS  # noqa: PLC0415

    actor.grad_norm_limit = math.inf if apply else -1.0
    result = actor.update(batch, LOSS, [aux])
    assert result.skipped is not apply, result
    return float(result.metrics["optim/grad_norm"].value())


def _adam(actor: Any) -> Any:
    (part,) = actor.optimizer.chained_optimizers
    return part.optimizer


def _adam_steps(actor: Any) -> set[int]:
    """Fused Adam counts in its groups, torch's in each parameter's state."""
    adam = _adam(actor)
    in_groups = {int(group["step"]) for group in adam.param_groups if "step" in group}
    return in_groups or {int(state["step"]) for state in adam.state.values()}


def _weights(actor: Any) -> Iterator[Tensor]:
    yield from actor.model.parameters()


def _float32_weights(actor: Any) -> Iterator[Tensor]:
    """The optimizer's own."""
    for group in _adam(actor).param_groups:
        yield from group["params"]


def _moments(actor: Any) -> Iterator[Tensor]:
    adam = _adam(actor)
    for group in adam.param_groups:
        for parameter in group["params"]:
            yield from (adam.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))


def _difference(one: Any, other: Any, of: Any) -> float:
    pairs = zip(of(one), of(other), strict=True)
    return max(float((a.detach().float() - b.detach().float()).abs().max()) for a, b in pairs)


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _threads() -> int:
    return max(1, min(8, torch.get_num_threads()))


def _hide_transformer_engine() -> None:
    """For this process: what imports it finds it not installed."""
    assert "megatron.core" not in sys.modules
    for name in TE_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]


# ---- The losses, written out -----------------------------------------------------------------------------------------


@contextmanager
def _written_out_losses() -> Iterator[None]:
    """Inside, actor and distillation take their log-probs and clipped KL from plain torch."""
    from nemo_ssopd.algo import losses  # noqa: PLC0415 -- after Transformer Engine is hidden

    with (
        patch.object(policy, "linear_logprobs", _plain_logprobs),
        patch.object(losses, "linear_clipped_kl_with_stats", _plain_clipped_kl),
    ):
        yield


def _plain_logits(hidden: Tensor, weight: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    return hidden @ weight[:vocab_size].t() / temperature


def _plain_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, vocab_size: int | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    logp = _plain_logits(hidden, weight, temperature, vocab_size).log_softmax(-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1).detach()


def _plain_clipped_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    clip: float,
    temperature: float,
    vocab_size: int | None = None,
    **_: Any,
) -> tuple[Tensor, Any]:
    from nemo_ssopd.ops.clipped_kl import DivergenceStats  # noqa: PLC0415

    student_logp = _plain_logits(student, weight, temperature, vocab_size).log_softmax(-1)
    teacher_logp = _plain_logits(teacher, weight, temperature, vocab_size).log_softmax(-1).detach()
    summands = teacher_logp.exp() * (teacher_logp - student_logp)
    loss_K, kl_K = summands.clamp(max=clip).sum(-1), summands.detach().sum(-1)
    entropies = (-(logp.exp() * logp).sum(-1).detach() for logp in (teacher_logp, student_logp))
    was_clipped = (summands.detach() >= clip).any(-1).to(loss_K.dtype)
    return loss_K, DivergenceStats(kl_K, was_clipped, kl_K - loss_K.detach(), *entropies)
