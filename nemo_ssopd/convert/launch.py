"""The commands that convert between checkpoints and Hugging Face or PEFT directories.

    python scripts/export_hf.py --checkpoint runs/x --output out [--adapter-only | --dtype float32] [--verify]
        [--base PATH]
    python scripts/import_hf.py --model models/Qwen3-8B --output out [--dtype bfloat16]

Everything happens on the CPU. Under torchrun, the processes share the model as tensor-parallel ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path


def export_main() -> None:
    """Run the console command `nemo-ssopd-export`."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face model or a PEFT adapter.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run_dir, or its checkpoints/iter_0000100")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter by itself, for PEFT and vLLM")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the merged weights, by default the one trained in; float32 keeps all of the adapters' update",
    )
    parser.add_argument("--base", help="Hugging Face base model, where it has moved or the checkpoint is not ours")
    parser.add_argument("--verify", action="store_true", help="reload the output and compare it with the checkpoint")
    _run("export", parser.parse_args())


def import_main() -> None:
    """Run the console command `nemo-ssopd-import`."""
    parser = argparse.ArgumentParser(description="Write a Hugging Face model as a distributed checkpoint.")
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--output", required=True, type=Path, help="folder for iter_0000000 and its tracker")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="type of the weights; by default as they are"
    )
    _run("import", parser.parse_args())


def _run(command: str, arguments: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from nemo_ssopd.convert import commands  # noqa: PLC0415 -- now that it will see no GPU

    try:
        {"export": commands.export_checkpoint, "import": commands.import_model}[command](arguments)
    except (ValueError, OSError, commands.CheckpointError) as error:
        sys.exit(f"error: {error}")
