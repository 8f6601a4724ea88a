"""What config.json of a Hugging Face directory says about the model, read without transformers, Megatron or vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")

# The constants of llama3's RoPE scaling that Megatron-Core has fixed; only its factor is free there.
LLAMA3_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class HFModelConfig:
    """A dense decoder: RMSNorm, SwiGLU, grouped-query attention, rotary positions.

    >>> hf = read_hf_config("models/Qwen3-8B")
    >>> hf.architecture, hf.num_layers, hf.num_heads, hf.num_kv_heads, hf.head_dim, hf.tied
    ('Qwen3ForCausalLM', 36, 32, 8, 128, False)
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding; it may exceed the tokenizer's length. Megatron's own may be padded beyond it."""
    max_position_embeddings: int
    tied: bool
    """The output layer shares the embedding's weight."""
    qk_norm: bool
    """RMSNorm on each query and key head (Qwen3)."""
    qkv_bias: bool
    """Bias on the q, k and v projections (Qwen2)."""
    norm_eps: float
    rope_theta: float
    rope_scaling: float | None
    """The factor of llama3's RoPE scaling; None without scaling."""


def read_hf_config(path: str | Path) -> HFModelConfig:
    """Read `path`/config.json, as transformers 4 or 5 writes it; ValueError where we cannot build that model."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={str(path)!r} has no config.json: point it at a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error

    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{file} describes {architecture!r}, which cannot be built: use one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _reject_unsupported(file, raw)
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 1e4)}
    try:
        hidden_size, num_heads = raw["hidden_size"], raw["num_attention_heads"]
        return HFModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or hidden_size // num_heads,
            ffn_hidden_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            max_position_embeddings=raw["max_position_embeddings"],
            tied=raw.get("tie_word_embeddings", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            qkv_bias=architecture == "Qwen2ForCausalLM",
            norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_llama3_factor(file, rope),
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: is it the file that the model was saved with?") from error


def _reject_unsupported(file: Path, raw: dict[str, Any]) -> None:
    """The switches of these architectures that would silently give another model."""
    supported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    }
    for key, value in supported.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{file}: {key}={raw[key]!r} is not supported, only {value!r}")


def _llama3_factor(file: Path, rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    constants = {key: rope.get(key) for key in LLAMA3_ROPE_SCALING}
    if kind != "llama3" or constants != LLAMA3_ROPE_SCALING:
        raise ValueError(
            f"{file}: RoPE scaling {rope} is not supported: only none, or 'llama3' "
            f"with {LLAMA3_ROPE_SCALING} and any factor"
        )
    return float(rope["factor"])
