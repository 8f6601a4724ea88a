"""Time, memory and traffic of the clipped KL against what else can compute it.

    python benchmarks/ops.py                           # writes docs/benchmarks.md and docs/images/ops.png
    python benchmarks/ops.py --tokens 512 --fused 512x2048 --runs 7
    python benchmarks/ops.py --device cuda             # the same on one GPU; TP = 2 where there are two

Contenders take turns, and the best of their runs counts: on a shared machine ratios within one run mean something,
seconds do not. `--clock cpu` counts the CPU seconds of one thread, which other load hardly stretches. Memory is the
peak above what the inputs take, so it includes the gradient: of the resident set on CPU, of the allocator on CUDA.
Rivals that are not installed, or do not fit into memory, are named as such. At TP = 2 on CPU each rank has one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nemo_ssopd.ops.clipped_kl import linear_clipped_kl, linear_clipped_kl_with_stats, vocab_parallel_clipped_kl
from nemo_ssopd.ops.logprobs import linear_logprobs

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
except ImportError:
    LigerFusedLinearJSDLoss = None
try:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
except ImportError:
    LogitsKLLoss = None

CLIP = 0.05
LIGER = "Liger fused linear JSD, beta 0 (unclipped)"
MODELOPT = "modelopt LogitsKLLoss (unclipped)"
ROOT = Path(__file__).parents[1]
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table. Example: Row("logits, TP=1, T=256", "ours", 0.31, 155.2, "8 B")."""

    setting: str
    contender: str
    seconds: float | None  # None: the note says why it did not run
    extra_mib: float | None = None
    note: str = "not installed"


@dataclass(frozen=True)
class Meter:
    """Runs contenders in turns and measures them. Example: Meter("cpu", "wall", runs=5)."""

    device: str
    clock: str
    runs: int

    def measure(self, contenders: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
        """name -> (best seconds, peak extra MiB) of all runs after the first, which warms up."""
        best = dict.fromkeys(contenders, (float("inf"), float("inf")))
        for turn in range(self.runs + 1):
            for name, run in contenders.items():
                result = self._one_run(run)
                if turn > 0:
                    best[name] = min(best[name][0], result[0]), min(best[name][1], result[1])
        return best

    def _one_run(self, run: Callable[[], None]) -> tuple[float, float]:
        before = self._start_of_peak()
        start = self._now()
        run()
        seconds = self._now() - start
        return seconds, max(0.0, self._peak() - before) / MIB

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def _start_of_peak(self) -> int:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux resets its high-water mark on request
        return _status_bytes("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else _status_bytes("VmHWM")

    def has_room_for(self, num_bytes: float) -> bool:
        on_cuda = self.device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_cuda else _status_bytes("MemAvailable", Path("/proc/meminfo"))
        return num_bytes < 0.9 * free


def _status_bytes(key: str, table: Path = Path("/proc/self/status")) -> int:
    line = next(line for line in table.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def forward_backward(loss_of: Callable[..., Tensor], *inputs: Tensor) -> None:
    """With an upstream gradient that is not uniform, as prompts of different lengths give."""
    loss_T = loss_of(*inputs)
    upstream_T = None
    if loss_T.dim():
        upstream_T = torch.linspace(0.5, 1.5, loss_T.numel(), device=loss_T.device, dtype=loss_T.dtype).view_as(loss_T)
    loss_T.backward(upstream_T)
    for tensor in inputs:
        tensor.grad = None


def plain_autograd(student: Tensor, teacher: Tensor) -> Tensor:
    """What the public OPSD trainer does."""
    student_logp, teacher_logp = student.log_softmax(-1), teacher.log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - student_logp)).clamp(max=CLIP).sum(-1)


def logits_rows(num_tokens: int, vocab: int, dtype: torch.dtype, meter: Meter) -> list[Row]:
    torch._dynamo.reset()  # so that each shape is compiled for itself
    torch.manual_seed(0)
    student = (torch.randn(num_tokens, vocab, device=meter.device) * 3).to(dtype).requires_grad_()
    teacher = (torch.randn(num_tokens, vocab, device=meter.device) * 3).to(dtype)
    out = torch.empty_like(teacher)
    compiled = torch.compile(lambda s, t: plain_autograd(s.float(), t.float()), dynamic=False)

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return vocab_parallel_clipped_kl(s, t, clip=CLIP, group=None)

    setting = f"logits, TP=1, T={num_tokens}, {str(dtype).removeprefix('torch.')}"
    contenders: dict[str, Callable[[], None]] = {
        # The least that any implementation moves: both logits in, the gradient out.
        "bandwidth floor": lambda: torch.add(student.detach(), teacher, out=out),
        "torch.compile": lambda: forward_backward(compiled, student, teacher),
        "ours": lambda: forward_backward(ours, student, teacher),
    }
    rows = []
    if meter.has_room_for(7 * 4 * student.numel()):
        contenders["plain autograd"] = lambda: forward_backward(
            lambda s, t: plain_autograd(s.float(), t.float()), student, teacher
        )
    else:
        rows.append(Row(setting, "plain autograd", None, note="does not fit into memory"))
    results = meter.measure(contenders)
    logits_mib = student.numel() * student.element_size() / MIB
    for name, (seconds, mib) in results.items():
        beyond = (mib - logits_mib) / (2 * logits_mib)
        note = "" if name == "bandwidth floor" else f"; {beyond:+.1%} of the inputs beyond the gradient"
        rows.append(Row(setting, name, seconds, mib, f"{seconds / results['ours'][0]:.2f}x ours{note}"))
    return rows


def make_fused(
    num_tokens: int, width: int, hidden_size: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of student and teacher, and a weight that makes logits with a standard deviation of 3."""
    student = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    return student, teacher, torch.randn(width, hidden_size, device=device, dtype=dtype) * (3 / hidden_size**0.5)


def fused_contenders(
    student: Tensor, teacher: Tensor, weight: Tensor, chunk_tokens: int, group: dist.ProcessGroup | None
) -> dict[str, Callable[[], None]]:
    """Ours, and the three matrix products of every chunk alone, into buffers that are there already."""
    num_tokens, hidden_size = student.shape
    buffer_CW = weight.new_empty(chunk_tokens, weight.shape[0])
    grad_CH = weight.new_empty(chunk_tokens, hidden_size)

    def products() -> None:
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            count = student[rows].shape[0]
            torch.mm(student.detach()[rows], weight.t(), out=buffer_CW[:count])
            torch.mm(teacher[rows], weight.t(), out=buffer_CW[:count])
            torch.mm(buffer_CW[:count], weight, out=grad_CH[:count])

    def ours(s: Tensor, t: Tensor) -> Tensor:
        settings: dict[str, Any] = {"temperature": 1.1, "group": group, "chunk_tokens": chunk_tokens}
        return linear_clipped_kl(s, t, weight, clip=CLIP, **settings)

    return {
        "matrix products only": products,
        "ours, with statistics": lambda: forward_backward(ours, student, teacher),
    }


def relative_to_products(setting: str, results: dict[str, tuple[float, float]]) -> list[Row]:
    base = results["matrix products only"][0]
    return [
        Row(setting, name, seconds, mib, f"{seconds / base:.2f}x the products")
        for name, (seconds, mib) in results.items()
    ]


def fused_rows(
    num_tokens: int,
    vocab: int,
    hidden_size: int,
    chunk_tokens: int,
    meter: Meter,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    torch.manual_seed(0)
    student, teacher, weight = make_fused(num_tokens, vocab, hidden_size, meter.device, dtype)
    contenders = fused_contenders(student, teacher, weight, chunk_tokens, None)
    setting = f"fused, TP=1, T={num_tokens}, H={hidden_size}, chunks of {chunk_tokens}{_unless_float32(dtype)}"
    left_out = []
    if meter.has_room_for(9 * 4 * num_tokens * vocab):
        contenders["plain autograd"] = lambda: forward_backward(
            lambda s, t: plain_autograd(s @ weight.t() / 1.1, t @ weight.t() / 1.1), student, teacher
        )
    else:
        left_out.append(Row(setting, "plain autograd", None, note="does not fit into memory"))
    if LigerFusedLinearJSDLoss is None:
        left_out.append(Row(setting, LIGER, None))
    else:
        options: dict[str, Any] = {"beta": 0.0, "temperature": 1.1, "compiled": True, "chunk_size": chunk_tokens}
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
        labels_T = torch.zeros(num_tokens, dtype=torch.int64, device=meter.device)
        contenders[LIGER] = lambda: forward_backward(
            lambda s, t: liger(s, weight, t, weight, labels_T), student, teacher
        )
    return relative_to_products(setting, meter.measure(contenders)) + left_out


def _unless_float32(dtype: torch.dtype) -> str:
    return "" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}"


def logprob_rows(
    num_tokens: int, vocab: int, hidden_size: int, chunk_tokens: int, meter: Meter, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Log-probs from hidden states, and the gradient of the hidden states. Ours gives the entropy too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, _, weight = make_fused(num_tokens, vocab, hidden_size, meter.device, dtype)
    targets_T = torch.arange(num_tokens, device=meter.device) % vocab

    def plain(h: Tensor) -> Tensor:
        logp = (h @ weight.t() / 1.1).float().log_softmax(-1)
        return logp.gather(1, targets_T.unsqueeze(1)).squeeze(1)

    def ours(h: Tensor) -> Tensor:
        return linear_logprobs(h, weight, targets_T, temperature=1.1, group=None, chunk_tokens=chunk_tokens)[0]

    setting = f"log-probs, TP=1, T={num_tokens}, H={hidden_size}, chunks of {chunk_tokens}{_unless_float32(dtype)}"
    contenders: dict[str, Callable[[], None]] = {"ours": lambda: forward_backward(ours, hidden)}
    rivals = {"torch.compile": torch.compile(plain, dynamic=False), "plain autograd": plain}
    rows = []
    for name, rival in rivals.items():
        if meter.has_room_for(7 * 4 * num_tokens * vocab):
            contenders[name] = lambda rival=rival: forward_backward(rival, hidden)
        else:
            rows.append(Row(setting, name, None, note="does not fit into memory"))
    best = meter.measure(contenders)
    for name, (seconds, mib) in best.items():
        rows.append(Row(setting, name, seconds, mib, f"{seconds / best['ours'][0]:.2f}x ours"))
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
    rank: int, port: int, num_tokens: int, vocab: int, hidden_size: int, chunk_tokens: int, meter: Meter, results: Any
) -> None:
    """Runs on each of two ranks; rank 0 reports. They wait for each other in every collective: its times are both's."""
    if meter.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if meter.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.group.WORLD
    torch.manual_seed(rank)
    rows = logits_rows_of_shards(num_tokens, vocab // 2, meter, group)
    rows += fused_rows_of_shards(num_tokens, vocab // 2, hidden_size, chunk_tokens, meter, group)
    if rank == 0:
        results.extend(rows)
    dist.destroy_process_group()


def logits_rows_of_shards(num_tokens: int, width: int, meter: Meter, group: Any) -> list[Row]:
    student = (torch.randn(num_tokens, width, device=meter.device) * 3).requires_grad_()
    teacher = torch.randn(num_tokens, width, device=meter.device) * 3

    def ours(s: Tensor, t: Tensor) -> Tensor:
        return vocab_parallel_clipped_kl(s, t, clip=CLIP, group=group)

    setting = f"logits, TP=2, T={num_tokens}, float32"
    contenders: dict[str, Callable[[], None]] = {"ours": lambda: forward_backward(ours, student, teacher)}
    left_out = []
    if LogitsKLLoss is None:
        left_out.append(Row(setting, MODELOPT, None))
    else:
        from megatron.core import parallel_state  # noqa: PLC0415 -- slow, and modelopt is seldom there

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
        rival = LogitsKLLoss.__new__(LogitsKLLoss)  # its constructor wants a whole Megatron configuration
        torch.nn.Module.__init__(rival)
        rival._config, rival._temperature, rival._reverse, rival._projection = config, 1.0, False, None
        contenders[MODELOPT] = lambda: forward_backward(
            lambda s, t: LogitsKLLoss.forward(rival, s.unsqueeze(1), t.unsqueeze(1))[0].flatten(), student, teacher
        )
    wire = {}
    for name, run in contenders.items():
        with WireCounter() as counter:
            run()
        wire[name] = counter.sent / num_tokens
    best = meter.measure(contenders)
    rows = []
    for name, (seconds, mib) in best.items():
        note = f"{seconds / best['ours'][0]:.2f}x ours; {wire[name]:.0f} bytes/token sent by a rank"
        rows.append(Row(setting, name, seconds, mib, note))
    return rows + left_out


def fused_rows_of_shards(
    num_tokens: int, width: int, hidden_size: int, chunk_tokens: int, meter: Meter, group: Any
) -> list[Row]:
    student, teacher, weight = make_fused(num_tokens, width, hidden_size, meter.device)
    setting = f"fused, TP=2, T={num_tokens}, H={hidden_size}, chunks of {chunk_tokens}"
    rows = relative_to_products(setting, meter.measure(fused_contenders(student, teacher, weight, chunk_tokens, group)))
    options: dict[str, Any] = {"temperature": 1.0, "group": group, "chunk_tokens": chunk_tokens}
    with WireCounter() as forward:
        loss_T, _ = linear_clipped_kl_with_stats(student, teacher, weight, clip=CLIP, **options)
    with WireCounter() as backward:
        loss_T.sum().backward()
    of_forward, of_backward = forward.sent / num_tokens, backward.sent / num_tokens / hidden_size
    note = f"{of_forward:.0f} bytes/token, and in the backward {of_backward:.0f} per hidden unit"
    return [*rows, Row(setting, "ours, traffic of a rank", None, None, note)]


def table(rows: list[Row]) -> str:
    lines = ["| setting | contender | seconds | extra MiB | |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.3f}"
        mib = "" if row.extra_mib is None else f"{row.extra_mib:.0f}"
        lines.append(f"| {row.setting} | {row.contender} | {seconds} | {mib} | {row.note} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 -- a GPU machine may lack it
    except ModuleNotFoundError:
        print("matplotlib is not installed: no figure")
        return
    plt.switch_backend("Agg")
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="T of the logits form")
    parser.add_argument(
        "--fused", nargs="+", default=["256x1024", "256x4096", "1024x2048"], metavar="TxH", help="of the fused form"
    )
    parser.add_argument("--tensor-parallel", default="256x1024", metavar="TxH", help="of both forms at TP = 2")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=4, help="of each contender, after one that warms up")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    meter = Meter(arguments.device, arguments.clock, arguments.runs)
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    load_before = os.getloadavg()[0]

    rows: list[Row] = []

    def report(more: list[Row]) -> None:
        print(table(more), flush=True)
        rows.extend(more)

    for num_tokens in arguments.tokens:
        for dtype in (torch.float32, torch.bfloat16):
            report(logits_rows(num_tokens, arguments.vocab, dtype, meter))
    if arguments.device == "cpu" or torch.cuda.device_count() > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
        del store
        num_tokens, hidden_size = map(int, arguments.tensor_parallel.split("x"))
        with mp.Manager() as manager:
            shared = manager.list()
            sizes = (num_tokens, arguments.vocab, hidden_size, arguments.chunk_tokens)
            mp.spawn(tensor_parallel_rows, (port, *sizes, meter, shared), nprocs=2)
            report(list(shared))
    for shape in arguments.fused:
        num_tokens, hidden_size = map(int, shape.split("x"))
        report(fused_rows(num_tokens, arguments.vocab, hidden_size, arguments.chunk_tokens, meter))

    unit = "CPU seconds of one thread" if arguments.clock == "cpu" else "seconds by the wall clock"
    where = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{os.cpu_count()} cores ({platform.machine()}), load average {load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after. Nothing here ran on a GPU"
    )
    intro = (
        f"## Clipped KL\n\n`python {' '.join(sys.argv)}`: V = {arguments.vocab}, forward and backward, {unit}, "
        f"best of {arguments.runs} runs that take turns; torch {torch.__version__}, {where}.\n"
        "Extra memory is above the inputs and includes the gradient.\n\n![time and memory](images/ops.png)\n\n"
    )
    plot(rows, ROOT / "docs/images/ops.png")
    write_section(intro + table(rows), ROOT / "docs/benchmarks.md")


if __name__ == "__main__":
    main()
