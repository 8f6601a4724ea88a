"""Megatron-Core's GPTModel from a Hugging Face config: Transformer Engine layers on CUDA, local layers without it.

    model = build_model(hf, config.model, config.parallel, runtime)     # weights still to be loaded
    hidden_SH = hidden_states(model, tokens_S, bounds=(0, 5, 12))       # two sequences end to end, apart in attention
    weight_WH = output_weight(model)                                    # this rank's rows of the output layer

The model returns the final hidden states, not logits: the vocab-parallel losses multiply with the output weight
themselves, in chunks. They also all-reduce the gradient of the hidden states over the tensor-parallel group, so the
model does not.

S tokens of a micro-batch, H hidden size, W a rank's shard of the (padded) vocabulary.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_ssopd.config.sections import ModelConfig, ParallelConfig
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.models.family import HFModelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def build_model(hf: HFModelConfig, model: ModelConfig, parallel: ParallelConfig, runtime: Runtime) -> GPTModel:
    """Build this rank's shard on its device, with weights not yet set: `load_hf_weights` comes next."""
    config = _transformer_config(hf, model, parallel, runtime)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(hf, config, with_te=HAVE_TE and runtime.device.type == "cuda"),
        vocab_size=padded_vocab_size(hf, parallel.tensor),
        max_sequence_length=hf.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tied,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,
        rope_scaling=hf.rope_scaling is not None,
        rope_scaling_factor=hf.rope_scaling or 1.0,
    )
    gpt.output_layer.__class__ = _OutputWeight
    return gpt.to(runtime.device)


def hidden_states(
    model: torch.nn.Module, tokens_S: torch.Tensor, bounds: tuple[int, ...], starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the final hidden states, [S, H].

    Sequence b is tokens_S[bounds[b] : bounds[b + 1]]; positions and attention begin anew with each. `model` is the
    GPTModel or Megatron's data-parallel wrapper of it. `starts` is `bounds` as int32 on the device. Without it,
    `bounds` is sent here, which waits for the device.
    """
    if starts is None:
        starts = torch.tensor(bounds, dtype=torch.int32, device=tokens_S.device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    hidden_1SH = model(tokens_S[None], position_ids=None, attention_mask=None, packed_seq_params=packed)
    return hidden_1SH.squeeze(0)


def output_weight(model: GPTModel) -> torch.Tensor:
    """Return the output layer's weight [W, H], a parameter: the embedding's own when they are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def padded_vocab_size(hf: HFModelConfig, tensor: int) -> int:
    """Round the vocabulary up so that all ranks hold equally many rows; the padding is zero and the losses mask it."""
    return -(-hf.vocab_size // tensor) * tensor


class _OutputWeight(ColumnParallelLinear):
    """Megatron's output layer, kept for its weight and its place in checkpoints; hidden states pass through it."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if self.sequence_parallel:
            # The gradient that arrives is complete on every rank, so each keeps its part of it: no reduce-scatter.
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return input_, None


class _TorchRMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with the mark on the weight that sequence parallelism needs; Megatron's wrapper refuses it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _TorchAttention(DotProductAttention):
    """Megatron's local attention; for packed sequences, which that refuses, torch's. T tokens, N heads, D head size."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        assert self.attn_mask_type is AttnMaskType.causal and attention_bias is None
        outputs_TND = []
        for start, end in itertools.pairwise(packed_seq_params.cu_seqlens_q.tolist()):
            q_1NTD, k_1NTD, v_1NTD = (x_TND[start:end].transpose(0, 1)[None] for x_TND in (query, key, value))
            output_1NTD = F.scaled_dot_product_attention(
                q_1NTD, k_1NTD, v_1NTD, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            outputs_TND.append(output_1NTD[0].transpose(0, 1))
        return torch.cat(outputs_TND)


class _LocalBackend(LocalSpecProvider):
    """Megatron's local modules, which need no CUDA."""

    def core_attention(self) -> type:
        return _TorchAttention


class _TEBackend(LocalSpecProvider):
    """Transformer Engine modules in the arrangement of the local ones: no norm is fused into a linear layer.

    Weights and adapters then have one layout on both devices.
    """

    def column_parallel_linear(self) -> type:
        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TERowParallelLinear

    def core_attention(self) -> type:
        return TEDotProductAttention


def _block_spec(hf: HFModelConfig, config: TransformerConfig, *, with_te: bool) -> TransformerBlockSubmodules:
    backend, norm = (_TEBackend(), TENorm) if with_te else (_LocalBackend(), _TorchRMSNorm)
    fields = hf.family.megatron(hf)
    head_norm = norm if fields["qk_layernorm"] else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=fields.get("num_moe_experts")),
        mlp_bda=get_bias_dropout_add,
        # Checkpoints name the norms as Megatron's own layers do, fused or not.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    layers = [ModuleSpec(module=TransformerLayer, submodules=layer)] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _transformer_config(
    hf: HFModelConfig, model: ModelConfig, parallel: ParallelConfig, runtime: Runtime
) -> TransformerConfig:
    on_cuda = runtime.device.type == "cuda"
    dtype = DTYPES[model.dtype]
    fields = hf.family.megatron(hf)
    return TransformerConfig(
        **{**fields, "activation_func": getattr(F, fields["activation_func"])},
        bias_dropout_fusion=False,
        # Both exist on CUDA only, and rotate in float32. Without fusion, Megatron's rotary code reads the sequences'
        # bounds on the host in every layer.
        apply_rope_fusion=on_cuda and HAVE_TE,
        bias_activation_fusion=on_cuda,
        masked_softmax_fusion=on_cuda,
        gradient_accumulation_fusion=on_cuda and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_shards > 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu_initialization=not on_cuda,
        # The loss is a sum; the objective divides it, not Megatron.
        calculate_per_token_loss=True,
        deterministic_mode=runtime.deterministic,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        # Every weight is loaded, so none is drawn.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight
