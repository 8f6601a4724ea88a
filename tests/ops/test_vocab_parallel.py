"""The vocab-parallel operations over gloo at TP = 2 and 4, against float64 on the whole vocabulary.

A failure here means that tensor-parallel training computes another gradient than one rank would. One world of four
ranks runs all cases: TP = 4 on all of them, TP = 2 on both halves.
T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_ssopd.algo.reference import clipped_forward_kl
from nemo_ssopd.ops.clipped_kl import linear_clipped_kl_with_stats, vocab_parallel_clipped_kl
from nemo_ssopd.ops.logprobs import linear_logprobs
from tests.distributed import run_distributed
from tests.ops import oracle

pytestmark = pytest.mark.heavy

T, H, CLIP, TEMPERATURE = 9, 12, 0.05, 1.3
# name -> (width of each rank's shard by tp, true vocabulary): even, padded with a rank of padding only, uneven, a rank
# without any column.
LAYOUTS: dict[str, tuple[dict[int, list[int]], int | None]] = {
    "even": ({2: [20, 20], 4: [10] * 4}, None),
    "padded": ({2: [32, 32], 4: [16] * 4}, 33),
    "uneven": ({2: [20, 17], 4: [10, 9, 9, 9]}, None),
    "empty": ({2: [13, 0], 4: [5, 0, 7, 1]}, None),
}


def _shard(tensor: Tensor, widths: list[int], rank: int, dim: int) -> Tensor:
    return tensor.split(widths, dim=dim)[rank].clone()


def _linear_errors(
    name: str,
    actual: tuple[Tensor, Tensor, Tensor],
    expected: tuple[Tensor, Tensor, Tensor],
    upstream_T: Tensor,
    widths: list[int],
    rank: int,
) -> dict[str, float]:
    """Of a fused operation: value, gradient of the hidden states, gradient of this rank's shard of the weight."""
    value_T, hidden, shard = actual
    value_T.backward(upstream_T)
    errors = {
        name: oracle.relative_error(value_T.detach(), expected[0].detach()),
        f"{name}/hidden_grad": oracle.relative_error(hidden.grad, expected[1]),
    }
    if shard.requires_grad:
        errors[f"{name}/weight_grad"] = oracle.relative_error(shard.grad, _shard(expected[2], widths, rank, 0))
    return errors


def _errors(group: dist.ProcessGroup, widths: list[int], vocab_size: int | None) -> dict[str, float]:
    rank, total = dist.get_rank(group), sum(widths)
    true_vocab = total if vocab_size is None else vocab_size
    upstream_T = torch.linspace(-1.0, 2.0, T)
    errors = {}

    student, teacher = (oracle.logits(T, total, seed=seed, inf_share=0.1) for seed in (1, 2))
    expected_T, expected_grad = oracle.clipped_kl(student[:, :true_vocab], teacher[:, :true_vocab], CLIP, upstream_T)
    expected_grad = torch.nn.functional.pad(expected_grad.nan_to_num(), (0, total - true_vocab))
    student_shard = _shard(student, widths, rank, 1).requires_grad_()
    loss_T = vocab_parallel_clipped_kl(
        student_shard, _shard(teacher, widths, rank, 1), clip=CLIP, group=group, vocab_size=vocab_size
    )
    loss_T.backward(upstream_T)
    errors["logits/loss"] = oracle.relative_error(loss_T.detach(), expected_T)
    finite = ~(student.isinf() & ~teacher.isinf()).any(1)  # elsewhere the oracle's own gradient is NaN
    errors["logits/grad"] = oracle.relative_error(
        student_shard.grad[finite], _shard(expected_grad, widths, rank, 1)[finite]
    )

    targets_T = torch.arange(T) * 4 % true_vocab
    for needs_weight in (False, True):
        hidden, teacher_hidden = (oracle.logits(T, H, seed=seed, scale=1.0) for seed in (3, 4))
        weight = oracle.logits(total, H, seed=5, scale=1.0)
        hidden64, weight64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        sources = hidden64, weight64
        student = hidden64 @ weight64[:true_vocab].t() / TEMPERATURE
        teacher = (teacher_hidden.double() @ weight64[:true_vocab].t() / TEMPERATURE).detach()
        shard = _shard(weight, widths, rank, 0)
        settings: dict[str, Any] = {
            "temperature": TEMPERATURE,
            "group": group,
            "chunk_tokens": 4,
            "vocab_size": vocab_size,
        }

        kl_hidden, kl_shard = hidden.clone().requires_grad_(), shard.clone().requires_grad_(needs_weight)
        loss_T, stats = linear_clipped_kl_with_stats(kl_hidden, teacher_hidden, kl_shard, clip=CLIP, **settings)
        name = f"fused/weight={needs_weight}"
        expected_T = clipped_forward_kl(student, teacher, clip=CLIP)
        expected = expected_T, *torch.autograd.grad(expected_T, sources, upstream_T.double(), retain_graph=True)
        errors |= _linear_errors(name, (loss_T, kl_hidden, kl_shard), expected, upstream_T, widths, rank)
        kl_T = clipped_forward_kl(student, teacher, clip=float("inf")).detach()
        errors[f"{name}/kl"] = oracle.relative_error(stats.kl_T, kl_T)
        errors[f"{name}/entropy"] = oracle.relative_error(stats.student_entropy_T, oracle.entropy(student.detach()))
        errors[f"{name}/clipped"] = float((stats.was_clipped_T - (kl_T - loss_T > 1e-6).float()).abs().sum())

        lp_hidden, lp_shard = hidden.clone().requires_grad_(), shard.clone().requires_grad_(needs_weight)
        logprobs_T, entropy_T = linear_logprobs(lp_hidden, lp_shard, targets_T, **settings)
        name = f"logprobs/weight={needs_weight}"
        expected_T = student.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
        expected = expected_T, *torch.autograd.grad(expected_T, sources, upstream_T.double())
        errors |= _linear_errors(name, (logprobs_T, lp_hidden, lp_shard), expected, upstream_T, widths, rank)
        errors[f"{name}/entropy"] = oracle.relative_error(entropy_T, oracle.entropy(student.detach()))
    return errors


def _all_cases() -> tuple[dict[tuple[str, int], dict[str, float]], bytes]:
    """Errors by layout and TP, and this rank's TP = 4 loss as bytes: it must be the same on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: halves[dist.get_rank() // 2], 4: dist.group.WORLD}
    errors = {}
    for name, (widths_of_tp, vocab_size) in LAYOUTS.items():
        for tp, group in groups.items():
            errors[name, tp] = _errors(group, widths_of_tp[tp], vocab_size)
    logits = [oracle.logits(T, 10, seed=10 * dist.get_rank() + model) for model in (0, 1)]
    loss_T = vocab_parallel_clipped_kl(*logits, clip=CLIP, group=dist.group.WORLD)
    again_T = vocab_parallel_clipped_kl(*logits, clip=CLIP, group=dist.group.WORLD)
    assert torch.equal(loss_T, again_T)
    dist.destroy_process_group()
    return errors, loss_T.numpy().tobytes()


@pytest.fixture(scope="module")
def results() -> list[tuple[dict[tuple[str, int], dict[str, float]], bytes]]:
    return run_distributed(_all_cases, 4)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_matches_the_unsharded_float64(results: list, layout: str, tp: int) -> None:
    for rank, (errors, _) in enumerate(results):
        assert len(errors[layout, tp]) == 20
        wrong = {name: error for name, error in errors[layout, tp].items() if not error < 2e-5}
        assert not wrong, f"rank {rank}"


def test_every_rank_computes_the_same_bits(results: list) -> None:
    assert len({loss for _, loss in results}) == 1
