"""Time, memory and traffic of the clipped KL against what else can compute it, on CPU.

    python benchmarks/ops.py                           # writes docs/benchmarks.md and docs/images/ops.png
    python benchmarks/ops.py --tokens 256 4096 --hidden 1024 4096 --repeats 7

Contenders take turns, and the best of their runs counts: on a shared machine ratios within one run mean something,
seconds do not. `--clock cpu` counts the CPU seconds of one thread, which other load hardly stretches. Memory is the
peak of the resident set above what the inputs take, so it includes the gradient.
Rivals that are not installed are named as such. At TP = 2 each rank has one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nemo_ssopd.ops.clipped_kl import linear_clipped_kl, linear_clipped_kl_with_stats, vocab_parallel_clipped_kl

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
except ImportError:
    LigerFusedLinearJSDLoss = None
try:
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
except ImportError:
    LogitsKLLoss = None

CLIP = 0.05
ROOT = Path(__file__).parents[1]
MIB = 2**20
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Row:
    """One line of the table. Example: Row("logits, TP=1, T=256", "ours", 0.31, 155.2, "8 B")."""

    setting: str
    contender: str
    seconds: float | None  # None: not installed
    extra_mib: float | None = None
    note: str = ""


def peak_extra_mib(run: Callable[[], None]) -> float:
    """Highest resident set during `run`, above the one before it. Linux resets the mark on request."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    run()
    return max(0.0, (_status_kib("VmHWM") - before) / 1024)


def _status_kib(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])


def best_of(
    contenders: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """name -> (best seconds, peak extra MiB), all taking turns after one run each to warm up."""
    memory = {name: peak_extra_mib(run) for name, run in contenders.items()}
    memory = {name: min(memory[name], peak_extra_mib(run)) for name, run in contenders.items()}
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name] = min(seconds[name], clock() - start)
    return {name: (seconds[name], memory[name]) for name in contenders}


def forward_backward(loss_of: Callable[..., Tensor], *inputs: Tensor) -> None:
    """With an upstream gradient that is not uniform, as prompts of different lengths give."""
    loss_T = loss_of(*inputs)
    upstream_T = torch.linspace(0.5, 1.5, loss_T.numel()).view_as(loss_T) if loss_T.dim() else None
    loss_T.backward(upstream_T)
    for tensor in inputs:
        tensor.grad = None


def plain_autograd(student: Tensor, teacher: Tensor) -> Tensor:
    """What the public OPSD trainer does."""
    student_logp, teacher_logp = student.log_softmax(-1), teacher.log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - student_logp)).clamp(max=CLIP).sum(-1)


def logits_rows(num_tokens: int, vocab: int, dtype: torch.dtype, repeats: int, clock: Callable[[], float]) -> list[Row]:
    torch.manual_seed(0)
    student = (torch.randn(num_tokens, vocab) * 3).to(dtype).requires_grad_()
    teacher = (torch.randn(num_tokens, vocab) * 3).to(dtype)
    out = torch.empty_like(teacher)
    compiled = torch.compile(lambda s, t: plain_autograd(s.float(), t.float()), dynamic=False)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return vocab_parallel_clipped_kl(s, t, clip=CLIP, group=None)

    contenders: dict[str, Callable[[], None]] = {
        # The least that any implementation moves: both logits in, the gradient out.
        "bandwidth floor": lambda: torch.add(student.detach(), teacher, out=out),
        "plain autograd": lambda: forward_backward(lambda s, t: plain_autograd(s.float(), t.float()), student, teacher),
        "torch.compile": lambda: forward_backward(compiled, student, teacher),
        "ours": lambda: forward_backward(ours, student, teacher),
    }
    results = best_of(contenders, repeats, clock)
    logits_mib = student.numel() * student.element_size() / MIB
    setting = f"logits, TP=1, T={num_tokens}, {str(dtype).removeprefix('torch.')}"
    rows = []
    for name, (seconds, mib) in results.items():
        beyond = (mib - logits_mib) / (2 * logits_mib)
        note = "" if name == "bandwidth floor" else f"{beyond:+.1%} of the inputs beyond the gradient"
        rows.append(Row(setting, name, seconds, mib, f"{seconds / results['ours'][0]:.2f}x ours; {note}"))
    return rows


def fused_rows(
    num_tokens: int, vocab: int, hidden_size: int, chunk_tokens: int, repeats: int, clock: Callable[[], float]
) -> list[Row]:
    torch.manual_seed(0)
    student = torch.randn(num_tokens, hidden_size, requires_grad=True)
    teacher = torch.randn(num_tokens, hidden_size)
    weight = torch.randn(vocab, hidden_size) * (3 / hidden_size**0.5)
    buffer_CW = torch.empty(chunk_tokens, vocab)
    grad_CH = torch.empty(chunk_tokens, hidden_size)

    def products() -> None:
        """The three matrix products of every chunk, into buffers that are there already."""
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            count = student[rows].shape[0]
            torch.mm(student.detach()[rows], weight.t(), out=buffer_CW[:count])
            torch.mm(teacher[rows], weight.t(), out=buffer_CW[:count])
            torch.mm(buffer_CW[:count], weight, out=grad_CH[:count])

    def ours(s: Tensor, t: Tensor) -> Tensor:
        settings: dict[str, Any] = {"temperature": 1.1, "group": None, "chunk_tokens": chunk_tokens}
        return linear_clipped_kl(s, t, weight, clip=CLIP, **settings)

    contenders: dict[str, Callable[[], None]] = {
        "matrix products only": products,
        "ours, with statistics": lambda: forward_backward(ours, student, teacher),
        "plain autograd": lambda: forward_backward(
            lambda s, t: plain_autograd(s @ weight.t() / 1.1, t @ weight.t() / 1.1), student, teacher
        ),
    }
    if LigerFusedLinearJSDLoss is not None:
        liger = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=0.0,
            temperature=1.1,
            compiled=True,
            chunk_size=chunk_tokens,
        )
        labels_T = torch.zeros(num_tokens, dtype=torch.int64)
        contenders["Liger fused linear JSD, beta 0 (unclipped)"] = lambda: forward_backward(
            lambda s, t: liger(s, weight, t, weight, labels_T), student, teacher
        )
    results = best_of(contenders, repeats, clock)
    setting = f"fused, TP=1, T={num_tokens}, H={hidden_size}, chunks of {chunk_tokens}"
    base = results["matrix products only"][0]
    rows = [
        Row(setting, name, seconds, mib, f"{seconds / base:.2f}x the products")
        for name, (seconds, mib) in results.items()
    ]
    if LigerFusedLinearJSDLoss is None:
        rows.append(Row(setting, "Liger fused linear JSD", None))
    return rows


class WireCounter:
    """Counts the bytes that this rank sends, by wrapping torch's collectives with the cost of their ring algorithms."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.all_gather, self.all_reduce = dist.all_gather, dist.all_reduce

    def __enter__(self) -> WireCounter:
        def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None) -> Any:
            self.sent += (len(outputs) - 1) * tensor.nbytes
            return self.all_gather(outputs, tensor, group=group)

        def all_reduce(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            ranks = dist.get_world_size(group)
            self.sent += 2 * (ranks - 1) / ranks * tensor.nbytes
            return self.all_reduce(tensor, *args, group=group, **kwargs)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self.all_gather, self.all_reduce


def tensor_parallel_rows(
    rank: int, port: int, num_tokens: int, vocab: int, repeats: int, clock: Callable[[], float], results: Any
) -> None:
    """Runs on each of two ranks; rank 0 reports. They wait for each other in every collective: its times are both's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.group.WORLD
    torch.manual_seed(rank)
    width = vocab // 2
    student = (torch.randn(num_tokens, width) * 3).requires_grad_()
    teacher = torch.randn(num_tokens, width) * 3

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return vocab_parallel_clipped_kl(s, t, clip=CLIP, group=group)

    contenders: dict[str, Callable[[], None]] = {"ours": lambda: forward_backward(ours, student, teacher)}
    if LogitsKLLoss is not None:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
        rival = LogitsKLLoss.__new__(LogitsKLLoss)  # its constructor wants a whole Megatron configuration
        torch.nn.Module.__init__(rival)
        rival._config, rival._temperature, rival._reverse, rival._projection = config, 1.0, False, None
        contenders["modelopt LogitsKLLoss (unclipped)"] = lambda: forward_backward(
            lambda s, t: LogitsKLLoss.forward(rival, s.unsqueeze(1), t.unsqueeze(1))[0].flatten(), student, teacher
        )
    wire = {}
    for name, run in contenders.items():
        with WireCounter() as counter:
            run()
        wire[name] = counter.sent / num_tokens
    best = best_of(contenders, repeats, clock)

    hidden = torch.randn(num_tokens, 64, requires_grad=True)
    weight = torch.randn(1024, 64)
    settings: dict[str, Any] = {"temperature": 1.0, "group": group, "chunk_tokens": 64}
    with WireCounter() as counter:
        loss_T, _ = linear_clipped_kl_with_stats(hidden, hidden.detach(), weight, clip=CLIP, **settings)
    fused_forward = counter.sent / num_tokens
    with WireCounter() as counter:
        loss_T.sum().backward()
    fused_backward = counter.sent / num_tokens
    setting = f"logits, TP=2, T={num_tokens}, float32"
    if rank == 0:
        for name, (seconds, mib) in best.items():
            note = f"{seconds / best['ours'][0]:.2f}x ours; {wire[name]:.0f} bytes/token sent by a rank"
            results.append(Row(setting, name, seconds, mib, note))
        if LogitsKLLoss is None:
            results.append(Row(setting, "modelopt LogitsKLLoss", None))
        note = f"{fused_forward:.0f} bytes/token, and in the backward {fused_backward / 64:.0f} per hidden unit"
        results.append(Row("fused, TP=2", "ours, traffic of a rank", None, None, note))
    dist.destroy_process_group()


def table(rows: list[Row]) -> str:
    lines = ["| setting | contender | seconds | extra MiB | |", "|---|---|---|---|---|"]
    for row in rows:
        missing = "" if row.note else NOT_INSTALLED
        seconds = missing if row.seconds is None else f"{row.seconds:.3f}"
        mib = "" if row.extra_mib is None else f"{row.extra_mib:.0f}"
        lines.append(f"| {row.setting} | {row.contender} | {seconds} | {mib} | {row.note} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    timed = [row for row in rows if row.seconds is not None]
    settings = list(dict.fromkeys(row.setting for row in timed))
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 1.9 * len(settings)), squeeze=False)
    for (time_axis, memory_axis), setting in zip(axes, settings, strict=True):
        group = [row for row in timed if row.setting == setting][::-1]
        names = [row.contender for row in group]
        colors = ["tab:green" if name.startswith("ours") else "tab:gray" for name in names]
        time_axis.barh(names, [row.seconds or 0 for row in group], color=colors)
        time_axis.set_title(f"{setting}: seconds", fontsize=8)
        memory_axis.barh(names, [row.extra_mib or 0 for row in group], color=colors)
        memory_axis.set_title("extra MiB", fontsize=8)
        memory_axis.set_yticks([])
        for axis in (time_axis, memory_axis):
            axis.tick_params(labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_section(text: str, path: Path) -> None:
    """Replaces what stands between our marks, or appends it."""
    start, end = "<!-- ops:start -->", "<!-- ops:end -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2] if rest else ""
    path.write_text(f"{before.rstrip()}\n\n{start}\n{text}\n{end}\n{after.lstrip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="T of the logits form")
    parser.add_argument("--fused-tokens", type=int, nargs="+", default=[256], help="T of the fused form")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.clock == "cpu":
        clock = time.process_time
        torch.set_num_threads(1)
    load_before = os.getloadavg()[0]

    rows: list[Row] = []
    for num_tokens in arguments.tokens:
        for dtype in (torch.float32, torch.bfloat16):
            rows += logits_rows(num_tokens, arguments.vocab, dtype, arguments.repeats, clock)
            print(table(rows[-4:]), flush=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    for num_tokens in arguments.tokens:
        with mp.Manager() as manager:
            shared = manager.list()
            settings = (port, num_tokens, arguments.vocab, arguments.repeats, clock, shared)
            mp.spawn(tensor_parallel_rows, settings, nprocs=2)
            rows += list(shared)
            print(table(list(shared)), flush=True)
    for num_tokens in arguments.fused_tokens:
        for hidden_size in arguments.hidden:
            rows += fused_rows(
                num_tokens, arguments.vocab, hidden_size, arguments.chunk_tokens, max(2, arguments.repeats // 2), clock
            )
            print(table(rows[-4:]), flush=True)

    flags = (
        f"--clock {arguments.clock} --tokens {' '.join(map(str, arguments.tokens))} "
        f"--fused-tokens {' '.join(map(str, arguments.fused_tokens))} --hidden {' '.join(map(str, arguments.hidden))}"
    )
    unit = "CPU seconds of one thread" if arguments.clock == "cpu" else "seconds by the wall clock"
    intro = (
        f"## Clipped KL\n\n`python benchmarks/ops.py {flags}`: V = {arguments.vocab}, forward and backward, {unit}, "
        f"best of {arguments.repeats} runs that take turns (fused: {max(2, arguments.repeats // 2)}); "
        f"torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), load average {load_before:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after.\nExtra memory is above the inputs and includes the gradient. "
        "Nothing here ran on a GPU.\n\n![time and memory](images/ops.png)\n\n"
    )
    plot(rows, ROOT / "docs/images/ops.png")
    write_section(intro + table(rows), ROOT / "docs/benchmarks.md")


if __name__ == "__main__":
    main()
