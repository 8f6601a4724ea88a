"""Llama: the dense decoder that the other families differ from in a few lines."""

from __future__ import annotations

from typing import Any

from nemo_ssopd.models.family import Family, HFModelConfig, Kind, Weight

# The constants of llama3's RoPE scaling that Megatron-Core has fixed; only its factor is free there.
LLAMA3_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# The switches in config.json that would silently give another model, and the value that each must have.
SWITCHES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
}

LAYER = "model.layers.{layer}"


def read(raw: dict[str, Any]) -> HFModelConfig:
    """Turn config.json into sizes."""
    for key, value in SWITCHES.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key}={raw[key]!r} is not supported, only {value!r}")
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 1e4)}
    hidden_size, num_heads = raw["hidden_size"], raw["num_attention_heads"]
    return HFModelConfig(
        architecture=raw["architectures"][0],
        hidden_size=hidden_size,
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or hidden_size // num_heads,
        ffn_hidden_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        tied=raw.get("tie_word_embeddings", False),
        norm_eps=raw["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_llama3_factor(rope),
    )


def megatron(hf: HFModelConfig) -> dict[str, Any]:
    """Return the fields of Megatron-Core's TransformerConfig."""
    return {
        "num_layers": hf.num_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.ffn_hidden_size,
        "num_attention_heads": hf.num_heads,
        "num_query_groups": hf.num_kv_heads,
        "kv_channels": hf.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.norm_eps,
        "qk_layernorm": False,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _llama3_factor(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    constants = {key: rope.get(key) for key in LLAMA3_ROPE_SCALING}
    if kind != "llama3" or constants != LLAMA3_ROPE_SCALING:
        raise ValueError(
            f"RoPE scaling {rope} is not supported: only none, or 'llama3' with {LLAMA3_ROPE_SCALING} and any factor"
        )
    return float(rope["factor"])


FAMILY = Family(
    architecture="LlamaForCausalLM",
    read=read,
    embedding=Weight("model.embed_tokens.weight", "embedding.word_embeddings.weight", Kind.VOCABULARY),
    layer=(
        Weight(f"{LAYER}.input_layernorm.weight", "input_layernorm.weight", Kind.REPLICATED),
        Weight(f"{LAYER}.self_attn.q_proj.weight", "self_attention.linear_qkv.weight", Kind.QUERY, adapter="lora_q"),
        Weight(f"{LAYER}.self_attn.k_proj.weight", "self_attention.linear_qkv.weight", Kind.KEY, adapter="lora_k"),
        Weight(f"{LAYER}.self_attn.v_proj.weight", "self_attention.linear_qkv.weight", Kind.VALUE, adapter="lora_v"),
        Weight(f"{LAYER}.self_attn.o_proj.weight", "self_attention.linear_proj.weight", Kind.COLUMNS, adapter="lora_o"),
        Weight(f"{LAYER}.post_attention_layernorm.weight", "pre_mlp_layernorm.weight", Kind.REPLICATED),
        Weight(f"{LAYER}.mlp.gate_proj.weight", "mlp.linear_fc1.weight", Kind.GATE, adapter="lora_gate"),
        Weight(f"{LAYER}.mlp.up_proj.weight", "mlp.linear_fc1.weight", Kind.UP, adapter="lora_up"),
        Weight(f"{LAYER}.mlp.down_proj.weight", "mlp.linear_fc2.weight", Kind.COLUMNS, adapter="lora_down"),
    ),
    final_norm=Weight("model.norm.weight", "decoder.final_layernorm.weight", Kind.REPLICATED),
    output=Weight("lm_head.weight", "output_layer.weight", Kind.VOCABULARY),
    megatron=megatron,
    fp8_modules=(
        "self_attention.linear_qkv",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "self_attention.core_attention",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ),
)
