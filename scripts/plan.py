"""Predict the memory per GPU of a run: python scripts/plan.py --config-name NAME [KEY=VALUE ...]

Prints the contents of each phase of a step on one GPU, from the config and the model's config.json alone: no weights,
no GPU. Exits with 1 and says what to change when a phase does not fit. With --cpu, for one CPU process.
Without models/NAME on this machine, the shape comes from assets/model_shapes/NAME.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from nemo_ssopd.config.run import Config
from nemo_ssopd.models.family import HFModelConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from tools.counts import adapters, parameters  # noqa: E402
from tools.memory_plan import GIB, Machine, MemoryPlan, load, plan, refusal  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="NAME", help="conf/NAME.yaml, as for training")
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0, help="of one GPU, or CPU process (80: H100)")
    parser.add_argument("--cpu", action="store_true", help="plan CPU processes instead")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    machine = Machine(memory_gib=arguments.gpu_memory_gib)
    if arguments.cpu:
        machine = Machine(memory_gib=arguments.gpu_memory_gib, on_cuda=False)
    try:
        config, hf = load(arguments.config_name, arguments.overrides)
    except (ValueError, HydraException) as error:
        sys.exit(f"error: {error}")
    show(arguments.config_name, config, hf, plan(config, hf, machine))
    if message := refusal(config, hf, machine):
        sys.exit(f"does not fit: {message}")


def show(name: str, config: Config, hf: HFModelConfig, memory: MemoryPlan) -> None:
    """Print a table in GiB: one row for each content of the memory, one column for each phase."""
    parallel = config.parallel
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{name}: GiB on each of {parallel.world_size} ranks (tensor {parallel.tensor})")
    table.add_column("")
    for phase in memory.phases:
        table.add_column(phase, justify="right")
    for row in dict.fromkeys(row for rows in memory.phases.values() for row in rows):
        table.add_row(row, *(f"{rows[row] / GIB:.2f}" if row in rows else "" for rows in memory.phases.values()))
    table.add_section()
    table.add_row("total", *(f"{memory.total(phase) / GIB:.2f}" for phase in memory.phases), style="bold")
    verdicts = ("[red]no[/red]" if phase in memory.too_large else "yes" for phase in memory.phases)
    table.add_row(f"within {memory.usable / GIB:.1f}", *verdicts)
    console.print(table)
    counts = f"parameters {parameters(hf, parallel.tensor):,}"
    if config.lora.enabled:
        counts += f", adapters {adapters(hf, parallel.tensor, config.lora.rank):,}"
    console.print(f"On one rank: {counts}.", highlight=False)
    console.print(
        f"Engine: {memory.kv_bytes_per_token:,.0f} bytes of cache per token, {max(0, memory.kv_tokens):,} tokens, "
        f"{max(0, memory.kv_tokens) / memory.longest_request:.1f} requests of the longest length "
        f"({memory.longest_request:,}).",
        highlight=False,
    )
    for what, size in memory.host.items():
        console.print(f"Host memory, per rank: {what}, {size / GIB:.2f} GiB.", highlight=False)


if __name__ == "__main__":
    main()
