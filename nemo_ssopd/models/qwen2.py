"""Qwen2: Llama with a bias on the query, key and value projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_ssopd.models import llama
from nemo_ssopd.models.family import HFModelConfig, Kind, Weight


def megatron(hf: HFModelConfig) -> dict[str, Any]:
    """Return the fields of Megatron-Core's TransformerConfig."""
    return {**llama.megatron(hf), "add_qkv_bias": True}


FAMILY = replace(
    llama.FAMILY,
    architecture="Qwen2ForCausalLM",
    layer=(
        *llama.FAMILY.layer,
        Weight(f"{llama.LAYER}.self_attn.q_proj.bias", "self_attention.linear_qkv.bias", Kind.QUERY),
        Weight(f"{llama.LAYER}.self_attn.k_proj.bias", "self_attention.linear_qkv.bias", Kind.KEY),
        Weight(f"{llama.LAYER}.self_attn.v_proj.bias", "self_attention.linear_qkv.bias", Kind.VALUE),
    ),
    megatron=megatron,
)
