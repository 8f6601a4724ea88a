"""How much memory the operations allocate, counted, not timed.

A failure here means that a temporary of the logits' size crept in. Counted on one thread, where a dispatch mode sees
every allocation; more threads share the same scratch budget. T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_ssopd.ops.clipped_kl import linear_clipped_kl, vocab_parallel_clipped_kl
from nemo_ssopd.ops.logprobs import linear_logprobs
from tests.ops import oracle

CLIP = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class AllocationCounter(TorchDispatchMode):
    """Follows the storages that operations create, from birth to death. What the caller already holds counts as 0."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage_id(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage_id(tensor) not in known | self.live.keys():
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` has allocated and not yet freed, at any moment."""
    with AllocationCounter() as counter:
        run()
    return counter.peak


def test_the_counter_counts() -> None:
    def run() -> None:
        first = torch.ones(1000, dtype=torch.float32)
        del first
        second = torch.ones(2000, dtype=torch.float32)
        third = second + 1
        del second, third

    assert peak_bytes(run) == pytest.approx(16000, abs=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_form_allocates_the_gradient_and_little_else(dtype: torch.dtype) -> None:
    student = oracle.logits(256, 8000, seed=1).to(dtype).requires_grad_()
    teacher = oracle.logits(256, 8000, seed=2).to(dtype)
    logits_bytes = student.numel() * student.element_size()

    def forward() -> Tensor:
        return vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None)

    peak = peak_bytes(lambda: forward().sum().backward())
    assert peak - logits_bytes < 0.05 * 2 * logits_bytes
    with torch.no_grad():
        assert peak_bytes(forward) < 0.05 * 2 * logits_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_memory_agrees(dtype: torch.dtype) -> None:
    """What operations allocate within themselves (for type promotion, say) a dispatch mode does not see; Linux does."""
    student = torch.randn(512, 40000).to(dtype).requires_grad_()
    teacher = torch.randn(512, 40000).to(dtype)
    logits_bytes = student.numel() * student.element_size()
    upstream_T = torch.linspace(0.0, 1.0, 512)

    def run() -> None:
        vocab_parallel_clipped_kl(student, teacher, clip=CLIP, group=None).backward(upstream_T)

    run()
    student.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run()
    assert _status_bytes("VmHWM") - before < 1.2 * logits_bytes


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _fused_peak(num_tokens: int, operation: str, needs_weight: bool) -> tuple[int, int]:
    hidden = oracle.logits(num_tokens, 16, seed=3).requires_grad_()
    weight = oracle.logits(3000, 16, seed=4).requires_grad_(needs_weight)
    settings = {"temperature": 1.1, "group": None, "chunk_tokens": 32}

    def run() -> None:
        if operation == "clipped_kl":
            result_T = linear_clipped_kl(hidden, hidden.detach(), weight, clip=CLIP, **settings)
        else:
            result_T = linear_logprobs(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64), **settings)[0]
        result_T.sum().backward()

    return peak_bytes(run), hidden.numel() * 4


@pytest.mark.parametrize("operation", ["clipped_kl", "logprobs"])
@pytest.mark.parametrize("needs_weight", [False, True])
def test_fused_form_grows_with_the_hidden_states_only(operation: str, needs_weight: bool) -> None:
    """Sixteen times the tokens: two more gradients of the hidden states and a few numbers per token, no logits."""
    small, small_hidden = _fused_peak(64, operation, needs_weight)
    large, large_hidden = _fused_peak(1024, operation, needs_weight)
    per_token_numbers = 40 * 4 * (1024 - 64)
    assert large - small < 2.2 * (large_hidden - small_hidden) + per_token_numbers
    assert large - small < 0.1 * (1024 - 64) * 3000 * 4


def test_without_gradients_nothing_is_kept_for_them() -> None:
    hidden = oracle.logits(512, 256, seed=5)
    weight = oracle.logits(300, 256, seed=6)
    settings = {"temperature": 1.0, "group": None, "chunk_tokens": 16}

    def run(requires_grad: bool) -> int:
        student = hidden.clone().requires_grad_(requires_grad)
        return peak_bytes(lambda: linear_clipped_kl(student, hidden, weight, clip=CLIP, **settings))

    hidden_bytes = hidden.numel() * 4
    assert run(True) > hidden_bytes
    assert run(False) < 0.5 * hidden_bytes
    with torch.no_grad():
        assert run(True) < 0.5 * hidden_bytes
