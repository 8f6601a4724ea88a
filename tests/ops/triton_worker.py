"""Runs the Triton kernels in the interpreter, next to the torch ones, and prints the largest relative errors as JSON.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported, and holds for the process.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from nemo_ssopd.ops import row_kernels_cpu, row_kernels_triton
from nemo_ssopd.ops.vocab_parallel import norm_and_entropy
from tests.ops import oracle

CLIP = 0.05


def errors_of(num_tokens: int, width: int, dtype: torch.dtype, scale: float, inf_share: float, pad: int) -> dict:
    """`pad` columns behind the row: strides that are no multiple of anything, and bytes that must stay untouched."""
    whole = [
        oracle.logits(num_tokens, width + pad, seed=seed, scale=scale, inf_share=inf_share).to(dtype) for seed in (1, 2)
    ]
    student, teacher = (logits[:, :width] for logits in whole)
    upstream_T = torch.linspace(-1.0, 2.0, num_tokens)
    targets_T = torch.arange(num_tokens) * 7 - 1  # the first is on another shard
    results = []
    for kernels in (row_kernels_triton, row_kernels_cpu):
        stats = [kernels.row_statistics(logits) for logits in (student, teacher)]
        (student_norm, _), (teacher_norm, _) = (norm_and_entropy(s.unsqueeze(0)) for s in stats)
        sums = kernels.kl_sums(student, teacher, student_norm, teacher_norm, CLIP)
        out = {"student_stats": stats[0], "teacher_stats": stats[1], "sums": sums}
        for name, upstream in (("unit", None), ("scaled", upstream_T)):
            grad = whole[0].clone()[:, :width]  # in place, as the fused form does it
            kernels.write_kl_gradient(grad, teacher, student_norm, teacher_norm, sums[:, 1], CLIP, upstream, grad)
            out[f"kl_grad/{name}"] = grad
            grad = torch.full_like(whole[0], 7.0)
            kernels.write_logprob_gradient(student, student_norm, targets_T, upstream, grad[:, :width])
            assert (grad[:, width:] == 7.0).all()
            out[f"logprob_grad/{name}"] = grad[:, :width]
        results.append(out)
    return {name: oracle.relative_error(results[0][name], results[1][name]) for name in results[0]}


def main() -> None:
    cases = {
        "one column": (2, 1, torch.float32, 3.0, 0.0, 0),
        "no tokens": (0, 5, torch.float32, 3.0, 0.0, 0),
        "no columns": (2, 0, torch.float32, 3.0, 0.0, 0),
        "odd": (3, 2051, torch.float32, 3.0, 0.0, 3),
        "several splits": (2, 40000, torch.float32, 3.0, 0.0, 0),
        "-inf": (4, 300, torch.float32, 3.0, 0.5, 0),
        "large": (3, 300, torch.float32, 300.0, 0.0, 0),
        "bfloat16": (3, 2060, torch.bfloat16, 3.0, 0.1, 1),
        "float16": (3, 2060, torch.float16, 3.0, 0.1, 1),
    }
    print(json.dumps({name: errors_of(*case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
