"""Qwen3: Llama with an RMSNorm on each query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_ssopd.models import llama
from nemo_ssopd.models.family import HFModelConfig, Kind, Weight


def megatron(hf: HFModelConfig) -> dict[str, Any]:
    """Return the fields of Megatron-Core's TransformerConfig."""
    return {**llama.megatron(hf), "qk_layernorm": True}


FAMILY = replace(
    llama.FAMILY,
    architecture="Qwen3ForCausalLM",
    layer=(
        *llama.FAMILY.layer,
        Weight(f"{llama.LAYER}.self_attn.q_norm.weight", "self_attention.q_layernorm.weight", Kind.REPLICATED),
        Weight(f"{llama.LAYER}.self_attn.k_norm.weight", "self_attention.k_layernorm.weight", Kind.REPLICATED),
    ),
    megatron=megatron,
)
