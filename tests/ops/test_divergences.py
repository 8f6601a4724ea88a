"""The divergences beside the clipped forward KL, at TP = 1 and 2, against their formulas in float64 under autograd.

A failure here means that an ablation trains on another loss than it names. T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_ssopd.algo.losses import Distillation
from nemo_ssopd.ops.clipped_kl import linear_clipped_kl_with_stats
from nemo_ssopd.ops.divergences import Divergence, linear_divergence
from nemo_ssopd.types import TeacherContext, TokenSequence, TrainExample
from tests.distributed import run_distributed
from tests.ops import oracle

T, H, V, PADDED, TEMPERATURE, CLIP = 11, 12, 37, 40, 1.3, 0.05
KINDS = ("forward_kl", "reverse_kl", "jsd")


def reference(student: Tensor, teacher: Tensor, kind: str, clip: float) -> Tensor:
    """From hidden states' logits, [T, V]."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    middle = (p + q) / 2
    summands = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": (p * (p / middle).log() + q * (q / middle).log()) / 2,
    }[kind]
    return summands.clamp(max=clip).sum(-1)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Students from near the teacher to far from it, so that the clip takes some summands and leaves others."""
    teacher, noise, weight = (oracle.logits(n, H, seed=s, scale=1.0) for n, s in ((T, 1), (T, 2), (PADDED, 3)))
    return teacher + torch.linspace(0.01, 1.0, T).unsqueeze(1) * noise, teacher, 0.7 * weight


def errors(group: dist.ProcessGroup | None, rank: int, size: int) -> dict[str, float]:
    upstream = torch.linspace(-1.0, 2.0, T)
    found = {}
    for kind, needs_weight in itertools.product(KINDS, (False, True)):
        student, teacher, weight = tensors()
        student.requires_grad_()
        shard = weight.chunk(size)[rank].clone().requires_grad_(needs_weight)
        loss_T, stats = linear_divergence(
            student,
            teacher,
            shard,
            divergence=Divergence(kind, CLIP),
            temperature=TEMPERATURE,
            group=group,
            chunk_tokens=4,
            vocab_size=V,
        )
        loss_T.backward(upstream)

        student64 = student.detach().double().requires_grad_()
        weight64 = weight.double().requires_grad_()
        logits = student64 @ weight64[:V].T / TEMPERATURE
        with torch.no_grad():
            teacher_logits = teacher.double() @ weight64[:V].T / TEMPERATURE
        expected_T = reference(logits, teacher_logits, kind, CLIP)
        expected_T.backward(upstream.double())
        whole_T = reference(logits, teacher_logits, kind, float("inf"))
        assert 0 < (whole_T > expected_T).sum() <= T
        case = f"{kind} {needs_weight}"
        found[case] = oracle.relative_error(loss_T.detach(), expected_T.detach())
        found[f"{case} hidden"] = oracle.relative_error(student.grad, student64.grad)
        found[f"{case} kl"] = oracle.relative_error(stats.kl_T, whole_T.detach())
        found[f"{case} mass"] = oracle.relative_error(stats.clipped_mass_T, (whole_T - expected_T).detach())
        found[f"{case} entropy"] = oracle.relative_error(stats.student_entropy_T, oracle.entropy(logits.detach()))
        clipped_T = (whole_T - expected_T).detach() > 1e-6
        found[f"{case} clipped"] = float((stats.was_clipped_T.bool() != clipped_T).sum())
        if needs_weight:
            found[f"{case} weight"] = oracle.relative_error(shard.grad, weight64.grad.chunk(size)[rank])
    return found


def on_two_ranks() -> dict[str, float]:
    dist.init_process_group("gloo")
    return errors(dist.group.WORLD, dist.get_rank(), 2)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 2])
def test_values_and_gradients_are_the_formulas(size: int) -> None:
    for found in [errors(None, 0, 1)] if size == 1 else run_distributed(on_two_ranks, 2):
        assert max(found.values()) < 2e-5, {case: error for case, error in found.items() if error >= 2e-5}


def test_the_clipped_forward_kl_is_that_of_the_fused_operation() -> None:
    student, teacher, weight = tensors()
    layer = {"temperature": TEMPERATURE, "group": None, "chunk_tokens": 5, "vocab_size": V}
    fused_T, fused = linear_clipped_kl_with_stats(student, teacher, weight, clip=CLIP, **layer)
    loss_T, stats = linear_divergence(student, teacher, weight, divergence=Divergence("forward_kl", CLIP), **layer)
    torch.testing.assert_close(loss_T, fused_T, rtol=1e-4, atol=1e-6)
    for name, values_T in vars(fused).items():
        torch.testing.assert_close(getattr(stats, name), values_T, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    student, teacher, weight = (tensor.to(dtype) for tensor in tensors())
    student.requires_grad_()
    loss_T, _ = linear_divergence(
        student,
        teacher,
        weight,
        divergence=Divergence("jsd", 1.0),
        temperature=1.0,
        group=None,
        chunk_tokens=4,
    )
    loss_T.sum().backward()
    student64 = student.detach().double().requires_grad_()
    expected_T = reference(student64 @ weight.double().T, teacher.double() @ weight.double().T, "jsd", 1.0)
    expected_T.sum().backward()
    assert oracle.relative_error(loss_T.detach(), expected_T.detach()) < 0.05
    assert oracle.relative_error(student.grad, student64.grad) < 0.05


def test_several_rows_in_one_call_and_the_teacher_whose_loss_is_subtracted() -> None:
    """Three examples of unequal length, two of them with a contrast teacher."""
    student, teacher, weight = tensors()
    contrast = oracle.logits(T, H, seed=4, scale=1.0)
    student.requires_grad_()
    lengths, weights, has_contrast = (5, 2, 4), (0.25, 0.1875, 0.5), (True, False, True)
    examples = [
        TrainExample(
            TokenSequence((1,) * (1 + n), 1),
            token_weights=(1.0,) * n,
            group=0,
            teacher=TeacherContext(TokenSequence((1,) * (1 + n), 1), w),
            teacher_states=teacher_KH,
            contrast_states=contrast_KH if contrasted else None,
        )
        for n, w, contrasted, teacher_KH, contrast_KH in zip(
            lengths, weights, has_contrast, teacher.split(lengths), contrast.split(lengths), strict=True
        )
    ]
    distillation = Distillation(
        kl_clip=CLIP, temperature=TEMPERATURE, chunk_tokens=5, vocab_size=PADDED, group=None, contrast=0.3
    )
    loss, metrics = distillation(examples, student, weight)
    loss.backward()

    student64 = student.detach().double().requires_grad_()
    logits, toward, from_ = (
        (h @ weight.double().T / TEMPERATURE).split(lengths) for h in (student64, teacher.double(), contrast.double())
    )
    expected = torch.zeros((), dtype=torch.float64)
    for i, w in enumerate(weights):
        pull = reference(logits[i], toward[i], "forward_kl", CLIP).mean()
        push = reference(logits[i], from_[i], "forward_kl", CLIP).mean() if has_contrast[i] else 0.0
        expected = expected + w * (pull - 0.3 * push)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-7)
    assert oracle.relative_error(student.grad, student64.grad) < 2e-5
    assert metrics["pairs"].value() == 3
    assert metrics["weight"].value() == pytest.approx(sum(weights) / 3)
