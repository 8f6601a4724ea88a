import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_ssopd.ops.clipped_kl import vocab_parallel_clipped_kl_with_stats
from tests.ops import oracle

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, torch
from nemo_ssopd.ops.clipped_kl import vocab_parallel_clipped_kl
from nemo_ssopd.ops.row_kernels_cpu import row_statistics, write_logprob_gradient
from nemo_ssopd.ops.vocab_parallel import norm_and_entropy
torch.manual_seed(0)
student, teacher = (3 * torch.randn(40, 3000, requires_grad=True) for _ in range(2))
loss_T = vocab_parallel_clipped_kl(student, teacher, clip=0.05, group=None)
(gradient,) = torch.autograd.grad(loss_T.sum(), student)
norm, entropy_T = norm_and_entropy(row_statistics(student.detach())[None])
logprob_gradient = torch.empty_like(student)
write_logprob_gradient(student, norm, torch.arange(40), None, logprob_gradient)
for tensor in (loss_T, gradient, *norm, entropy_T, logprob_gradient):
    print(hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest())
"""


@pytest.mark.heavy
def test_compiled_and_cached_kernels_give_the_same_bits(tmp_path: Path) -> None:
    """The first process compiles, the second loads what it left: a resumed run must not notice."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert len(list(tmp_path.rglob("*.nbc"))) >= 3
    assert len(outputs[0].stdout.split()) == 6
    assert outputs[0].stdout == outputs[1].stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_float32_gradient_rounded_to_nearest(dtype: torch.dtype) -> None:
    student, teacher = (oracle.logits(5, 3000, seed=seed).to(dtype) for seed in (1, 2))
    gradients = []
    for to in (dtype, torch.float32):
        leaf = student.to(to).requires_grad_()
        loss_T, _ = vocab_parallel_clipped_kl_with_stats(leaf, teacher.to(to), clip=0.05, group=None)
        gradients.append(torch.autograd.grad(loss_T.sum(), leaf)[0])
    assert torch.equal(gradients[0], gradients[1].to(dtype))


def test_entropies_of_rows_with_impossible_columns() -> None:
    student, teacher = (oracle.logits(5, 300, seed=seed, inf_share=0.3) for seed in (1, 2))
    _, stats = vocab_parallel_clipped_kl_with_stats(student, teacher, clip=0.05, group=None)
    assert oracle.relative_error(stats.student_entropy_T, oracle.entropy(student)) < 1e-5
    assert oracle.relative_error(stats.teacher_entropy_T, oracle.entropy(teacher)) < 1e-5
