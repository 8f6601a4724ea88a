"""config.json as transformers 4 and 5 write it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_ssopd.models.family import HFModelConfig, read_hf_config

# The published file of Qwen3-8B (transformers 4), without the fields that nobody reads.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_qwen3_8b(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3_8B) == HFModelConfig(
        architecture="Qwen3ForCausalLM",
        hidden_size=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_hidden_size=12288,
        vocab_size=151936,
        max_position_embeddings=40960,
        tied=False,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
    )


def test_both_ways_of_writing_rope_parameters(tmp_path: Path) -> None:
    llama = {**QWEN3_8B, "architectures": ["LlamaForCausalLM"]}
    version_4 = {**llama, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    version_5 = {**without(llama, "rope_theta", "rope_scaling"), "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}
    for config in (version_4, version_5):
        hf = read(tmp_path, config)
        assert (hf.rope_theta, hf.rope_scaling, hf.architecture) == (5e5, 32.0, "LlamaForCausalLM")


def test_qwen2_derives_its_head_dim(tmp_path: Path) -> None:
    config = without({**QWEN3_8B, "architectures": ["Qwen2ForCausalLM"]}, "head_dim", "attention_bias")
    hf = read(tmp_path, {**config, "hidden_size": 2048, "num_attention_heads": 16, "tie_word_embeddings": True})
    assert (hf.head_dim, hf.architecture, hf.tied) == (128, "Qwen2ForCausalLM", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["Qwen3MoeForCausalLM"]},
            "'Qwen3MoeForCausalLM'.*use one of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3F",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling.*yarn"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 2.0}}, "'high_freq_factor': 2.0.*is not supported"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {**QWEN3_8B, **change})


def test_files_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json: point it at a Hugging Face model directory"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lacks 'num_hidden_layers'"):
        read(tmp_path, without(QWEN3_8B, "num_hidden_layers"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_hf_config(tmp_path)


@pytest.mark.heavy
def test_importing_it_is_cheap() -> None:
    """Validation reads it before anything heavy is loaded."""
    code = (
        "import sys; from nemo_ssopd.models.family import families; families(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'transformers', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def read(folder: Path, config: dict[str, Any]) -> HFModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_hf_config(folder)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
