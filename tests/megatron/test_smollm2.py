"""A real pretrained model through our loader: SmolLM2-135M-Instruct, prepared by scripts/prepare_smollm2.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.megatron.runtime import initialize
from tests.distributed import run_distributed
from tests.megatron.hf_models import load_megatron, logits_BSV

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory that the CPU config names, where it exists; otherwise the script makes one."""
    ready = ROOT / "models" / "SmolLM2-135M-Instruct"
    if (ready / "config.json").is_file():
        return str(ready)
    output = tmp_path_factory.mktemp("smollm2")
    script = [sys.executable, str(ROOT / "scripts" / "prepare_smollm2.py"), str(output)]
    subprocess.run(script, check=True)
    return str(output)


def test_logits_equal_transformers(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and tokenizer.eos_token == "<|im_end|>"
    tokens = torch.tensor([tokenizer.encode(text + "The capital of France is")])
    assert tokenizer.decode(tokens[0]).startswith(text)

    (logits,) = run_distributed(megatron_logits, 1, path, tokens)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    # Logits reach 38. By the kind of CPU, each side's largest rounding error against float64 is 0.8e-4 to 1.4e-4.
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-4)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def megatron_logits(path: str, tokens: torch.Tensor) -> torch.Tensor:
    parallel = ParallelConfig(world_size=1)
    runtime = initialize(parallel, seed=1)
    model, hf = load_megatron(path, parallel, runtime)
    return logits_BSV(model, hf, runtime, tokens)
