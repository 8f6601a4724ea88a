"""Small random Hugging Face models on disk, and the pieces that several tests build from them."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from nemo_ssopd.config.sections import ModelConfig, ParallelConfig
from nemo_ssopd.megatron.model import build_model, hidden_states, output_weight
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import load_hf_weights
from nemo_ssopd.models.family import HFModelConfig, read_hf_config

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_ODD_VOCABULARY = {**_SHAPE, "vocab_size": 97}  # at tensor-parallel size 2, one padded row

HF_CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_tied": Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3_odd": Qwen3Config(**_ODD_VOCABULARY, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "qwen2": Qwen2Config(**_SHAPE, rms_norm_eps=1e-6),
    "llama_odd_tied": LlamaConfig(**_ODD_VOCABULARY, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "llama3_rope": LlamaConfig(**{**_SHAPE, "max_position_embeddings": 16384}, rope_parameters=_LLAMA3_ROPE),
}


def save_random_model(name: str, folder: Path) -> str:
    """Weights, norms and biases all far from their usual initial values, so that a misplaced one shows."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(HF_CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def load_megatron(
    path: str, parallel: ParallelConfig, runtime: Runtime, *, recompute: bool = False, dtype: str = "float32"
) -> tuple[GPTModel, HFModelConfig]:
    hf = read_hf_config(path)
    model = build_model(hf, ModelConfig(path=path, dtype=dtype, recompute=recompute), parallel, runtime)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # so that what is not loaded shows
    load_hf_weights(model, hf, path, runtime)
    return model, hf


def tokens_BS(vocab_size: int, *, rows: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def hidden_BSH(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of rows of one length, packed as the actor packs sequences."""
    rows, length = tokens.shape
    bounds = tuple(range(0, rows * length + 1, length))
    return hidden_states(model, tokens.flatten(), bounds).unflatten(0, (rows, length))


def logits_BSV(model: GPTModel, hf: HFModelConfig, runtime: Runtime, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        weight_VH = runtime.layout.gather_tensor(output_weight(model), dim=0)
        return hidden_BSH(model, tokens) @ weight_VH[: hf.vocab_size].T
