"""The parts of a checkpoint of all weights, in addition to the weights, that Megatron-Bridge 0.5 and 0.6 need."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_ssopd.config.sections import ModelConfig
from nemo_ssopd.models.family import HFModelConfig

PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"


def extra_states(hf: HFModelConfig) -> dict[str, ShardedObject]:
    """Return an empty FP8 state for every module that Bridge loads one for; our modules have none, and read none."""

    def empty(name: str, count: int, place: int) -> ShardedObject:
        return ShardedObject(f"{name}._extra_state", torch.empty(0, dtype=torch.uint8), (count,), (place,))

    states = {
        f"decoder.layers.{i}.{module}": empty(f"decoder.layers.{module}", hf.num_layers, i)
        for i in range(hf.num_layers)
        for module in hf.family.fp8_modules
    }
    return states | {name: empty(name, 1, 0) for name in ("decoder.final_layernorm", "output_layer")}


def run_config(hf: HFModelConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the contents of run_config.yaml, from which Bridge learns what the model is.

    They are the two sections that its `load_megatron_model` and `load_tokenizer` read. Options left out keep the
    provider's defaults: layers of Transformer Engine, one process.
    """
    fields = hf.family.megatron(hf)
    scaling = {"rope_scaling": True, "rope_scaling_factor": hf.rope_scaling} if hf.rope_scaling else {}
    return {
        "model": {
            "_target_": PROVIDER,
            **fields,
            "activation_func": _named(f"torch.nn.functional.{fields['activation_func']}"),
            "seq_length": hf.max_position_embeddings,
            "vocab_size": hf.vocab_size,
            "make_vocab_size_divisible_by": 1,
            "should_pad_vocab": False,
            "share_embeddings_and_output_weights": hf.tied,
            "position_embedding_type": "rope",
            "rotary_base": hf.rope_theta,
            **scaling,
            "gradient_accumulation_fusion": False,
            "bf16": model.dtype == "bfloat16",
            "fp16": model.dtype == "float16",
            "params_dtype": _named(f"torch.{model.dtype}"),
            "hf_model_id": model.path,
        },
        "tokenizer": {"_target_": TOKENIZER, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model.path},
    }


def _named(target: str) -> dict[str, Any]:
    """Return the entry of an object that Bridge looks up and does not call."""
    return {"_call_": False, "_target_": target}
