"""The clipped KL and log-probs against what else computes them: the contenders of benchmarks/ops.py, in both types."""

from __future__ import annotations

import torch

from benchmarks import ops
from benchmarks.gpu_report.stage import Results

# Tokens, vocabulary, hidden size, tokens of a chunk, runs.
SIZES = {"cuda": (4096, 151936, 2048, 1024, 5), "cpu": (16, 1031, 32, 8, 1)}
DTYPES = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}


def run(results: Results) -> None:
    tokens, vocab, hidden, chunk, runs = SIZES[results.device]
    meter = ops.Meter(results.device, "wall", runs)
    for dtype in DTYPES[results.device]:
        _add(results, ops.logits_rows(tokens, vocab, dtype, meter))
        _add(results, ops.fused_rows(tokens, vocab, hidden, chunk, meter, dtype))
        _add(results, ops.logprob_rows(tokens, vocab, hidden, chunk, meter, dtype))


def _add(results: Results, rows: list[ops.Row]) -> None:
    for row in rows:
        name = f"{row.setting}: {row.contender}"
        if row.seconds is None:
            results.skip(name, row.note)
        else:
            results.add(name, 1e3 * row.seconds, f"ms, {row.extra_mib:.0f} MiB, {row.note}")
