"""What Megatron-Bridge 0.5 and 0.6 want of a checkpoint of all weights, beside the weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_ssopd.config.sections import ModelConfig
from nemo_ssopd.models.hf_config import HFModelConfig

PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"

# The modules of a Transformer Engine layer that have FP8 scales.
OF_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def extra_states(hf: HFModelConfig) -> dict[str, ShardedObject]:
    """An empty FP8 state for every module that asks for one when Bridge loads; ours have none, and never read one."""

    def empty(name: str, count: int, place: int) -> ShardedObject:
        return ShardedObject(f"{name}._extra_state", torch.empty(0, dtype=torch.uint8), (count,), (place,))

    states = {
        f"decoder.layers.{i}.{module}": empty(f"decoder.layers.{module}", hf.num_layers, i)
        for i in range(hf.num_layers)
        for module in OF_LAYERS
    }
    return states | {name: empty(name, 1, 0) for name in ("decoder.final_layernorm", "output_layer")}


def run_config(hf: HFModelConfig, model: ModelConfig) -> dict[str, Any]:
    """run_config.yaml, by which Bridge learns what the model is: the two sections that its `load_megatron_model` and
    `load_tokenizer` read. What is left out is the provider's default: layers of Transformer Engine, one process.
    """
    scaling = {"rope_scaling": True, "rope_scaling_factor": hf.rope_scaling} if hf.rope_scaling else {}
    return {
        "model": {
            "_target_": PROVIDER,
            "num_layers": hf.num_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": hf.ffn_hidden_size,
            "num_attention_heads": hf.num_heads,
            "num_query_groups": hf.num_kv_heads,
            "kv_channels": hf.head_dim,
            "seq_length": hf.max_position_embeddings,
            "vocab_size": hf.vocab_size,
            "make_vocab_size_divisible_by": 1,
            "should_pad_vocab": False,
            "share_embeddings_and_output_weights": hf.tied,
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf.norm_eps,
            "qk_layernorm": hf.qk_norm,
            "gated_linear_unit": True,
            "activation_func": _named("torch.nn.functional.silu"),
            "add_bias_linear": False,
            "add_qkv_bias": hf.qkv_bias,
            "position_embedding_type": "rope",
            "rotary_base": hf.rope_theta,
            **scaling,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "gradient_accumulation_fusion": False,
            "bf16": model.dtype == "bfloat16",
            "fp16": model.dtype == "float16",
            "params_dtype": _named(f"torch.{model.dtype}"),
            "hf_model_id": model.path,
        },
        "tokenizer": {"_target_": TOKENIZER, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model.path},
    }


def _named(target: str) -> dict[str, Any]:
    """An object that is not called."""
    return {"_call_": False, "_target_": target}
