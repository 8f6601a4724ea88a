"""What our source does not say of itself: the packages, types that are nowhere written down, and who calls back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PACKAGES = {"megatron-core": "megatron.core", "vllm": "vllm", "transformer_engine": "transformer_engine"}
"""The package that pip knows, and the name that it is imported by."""

_CORE, _OURS, _TE = "megatron.core", "nemo_ssopd.megatron", "megatron.core.extensions.transformer_engine"
_GPT, _CONFIG = f"{_CORE}.models.gpt.GPTModel", f"{_CORE}.transformer.TransformerConfig"
_LAYER, _BLOCK = f"{_CORE}.transformer.transformer_layer.TransformerLayer", f"{_CORE}.transformer.transformer_block"
_ATTENTION, _MLP = f"{_CORE}.transformer.attention.SelfAttention", f"{_CORE}.transformer.mlp.MLP"
_COLUMN, _ROW = f"{_CORE}.tensor_parallel.ColumnParallelLinear", f"{_CORE}.tensor_parallel.layers.RowParallelLinear"
_CHAINED, _PART = f"{_CORE}.optimizer.ChainedOptimizer", f"{_CORE}.optimizer.distrib_optimizer.DistributedOptimizer"
_TENSOR = f"{_CORE}.dist_checkpointing.mapping.ShardedTensor"
_OF_ACTORS = ("_spread_adapters", "_adam", "_weights")
_ENGINE, _LLM_ENGINE = "nemo_ssopd.rollout.engine.RolloutEngine", "vllm.v1.engine.llm_engine.LLMEngine"
_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_RUNNERS = ("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner")
_LORA_WORKER = "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager"
_LORA_MANAGER = "vllm.lora.model_manager.LRUCacheLoRAModelManager"
_LORA_LINEAR, _LINEAR = "vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA", "vllm.model_executor.layers.linear"
_LINEARS_HELD = (f"{_LINEAR}.ColumnParallelLinear", f"{_LINEAR}.RowParallelLinear")
_VOCABULARY, _HELD = "vllm.model_executor.layers.vocab_parallel_embedding", "nemo_ssopd.rollout.held"
_METHODS = (f"{_LINEAR}.UnquantizedLinearMethod", f"{_VOCABULARY}.UnquantizedEmbeddingMethod")
_MODELS = tuple(
    f"vllm.model_executor.models.{name}ForCausalLM" for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3")
)
_OUTPUT = "vllm.outputs.CompletionOutput"
_HEAD = f"{_VOCABULARY}.ParallelLMHead"

# What an attribute or a local variable is, `f()` returns, and `x[]` holds. None: a tensor, or another thing of torch or
# of Python. Several: it may be of each of these classes, so what is read must be in all of them.
TYPES: dict[str, str | tuple[str, ...] | None] = {
    f"{_OURS}.policy.MegatronPolicy.optimizer": _CHAINED,
    **{f"benchmarks.gpu_report.actor.{name}.actor": f"{_OURS}.policy.MegatronPolicy" for name in _OF_ACTORS},
    f"{_CORE}.pipeline_parallel.get_forward_backward_func()": (
        f"{_CORE}.pipeline_parallel.schedules.forward_backward_no_pipelining"
    ),
    f"{_CORE}.optimizer.get_megatron_optimizer()": _CHAINED,
    f"{_CHAINED}.chained_optimizers[]": _PART,
    f"{_CHAINED}.param_groups": None,
    f"{_PART}.optimizer": None,
    f"{_PART}.param_groups": None,
    f"{_PART}.config": f"{_CORE}.optimizer.OptimizerConfig",
    f"{_PART}.init_state_fn": None,  # a function that get_megatron_optimizer hands over
    f"{_GPT}.config": _CONFIG,
    f"{_GPT}.decoder": f"{_BLOCK}.TransformerBlock",
    f"{_BLOCK}.TransformerBlock.layers[]": _LAYER,
    f"{_BLOCK}.TransformerBlock.final_layernorm": None,
    f"{_GPT}.embedding": f"{_CORE}.models.common.embeddings.language_model_embedding.LanguageModelEmbedding",
    f"{_CORE}.models.common.embeddings.language_model_embedding.LanguageModelEmbedding.word_embeddings": (
        f"{_CORE}.tensor_parallel.layers.VocabParallelEmbedding"
    ),
    f"{_CORE}.tensor_parallel.layers.VocabParallelEmbedding.weight": None,
    f"{_GPT}.output_layer": _COLUMN,
    f"{_LAYER}.self_attention": _ATTENTION,
    f"{_LAYER}.mlp": _MLP,
    f"{_LAYER}.input_layernorm": None,
    f"{_LAYER}.pre_mlp_layernorm": None,
    f"{_LAYER}.layer_number": None,
    f"{_ATTENTION}.linear_qkv": _COLUMN,
    f"{_ATTENTION}.linear_proj": _ROW,
    f"{_ATTENTION}.q_layernorm": None,
    f"{_ATTENTION}.k_layernorm": None,
    f"{_MLP}.linear_fc1": _COLUMN,
    f"{_MLP}.linear_fc2": _ROW,
    f"{_COLUMN}.weight": None,
    f"{_COLUMN}.bias": None,
    f"{_ROW}.weight": None,
    f"{_TENSOR}.data": None,
    f"{_CORE}.packed_seq_params.PackedSeqParams.cu_seqlens_q": None,
    "nemo_ssopd.checkpoint.checkpoint._with_data.weight": _TENSOR,
    f"{_OURS}.model.hidden_states.model": _GPT,
    "nemo_ssopd.rollout.engine._completion.output": _OUTPUT,
    "nemo_ssopd.rollout.engine._completion.step": f"{_OUTPUT}.logprobs[]",
    f"{_ENGINE}.load_weights.reload.worker": _WORKER,
    f"{_ENGINE}.load_weights.reload.head": _HEAD,
    f"{_ENGINE}.load_adapter.activate.worker": _WORKER,
    f"{_ENGINE}.differing.compare.worker": _WORKER,
    "vllm.LLM.llm_engine": _LLM_ENGINE,
    f"{_LLM_ENGINE}.engine_core": "vllm.v1.engine.core_client.InprocClient",
    "vllm.LLM.generate()": "vllm.LLM.generate()",
    "vllm.LLM.generate()[]": "vllm.outputs.RequestOutput",
    "vllm.outputs.RequestOutput.outputs[]": _OUTPUT,
    f"{_OUTPUT}.token_ids": None,
    f"{_OUTPUT}.logprobs": None,
    f"{_OUTPUT}.logprobs[][]": "vllm.logprobs.Logprob",
    f"{_HEAD}.quant_method": f"{_VOCABULARY}.UnquantizedEmbeddingMethod",
    f"{_WORKER}.model_runner": _RUNNERS,
    **{f"{runner}.lora_manager": _LORA_WORKER for runner in _RUNNERS},
    f"{_LORA_WORKER}._adapter_manager": _LORA_MANAGER,
    "vllm.lora.lora_model.LoRAModel.from_lora_tensors()": "vllm.lora.lora_model.LoRAModel",
    # What `held` compares with.
    f"{_HELD}.differing_adapters.manager": _LORA_MANAGER,
    **{f"{_LORA_MANAGER}.{name}": None for name in ("lora_index_to_id", "modules", "packed_modules")},
    f"{_HELD}._holds_matrix.layer": _LORA_LINEAR,
    **{f"{_LORA_LINEAR}.{name}": None for name in ("lora_a_stacked", "lora_b_stacked")},
    f"{_HELD}._first.layer": (*_LINEARS_HELD, _LORA_LINEAR),
    f"{_HELD}._places.model": _MODELS,
    **{f"{model}.packed_modules_mapping": None for model in _MODELS},
    f"{_HELD}._places.layer": f"{_LINEAR}.ColumnParallelLinear",
    f"{_HELD}._Place.layer": _LINEARS_HELD,
    **{f"{layer}.quant_method": _METHODS for layer in _LINEARS_HELD},  # or the output layer's
    f"{_HELD}._own_tokens.embedding": f"{_VOCABULARY}.VocabParallelEmbedding",
    f"{_VOCABULARY}.VocabParallelEmbedding.shard_indices": f"{_VOCABULARY}.VocabParallelEmbeddingShardIndices",
}

# Classes that are older than their use in the package: the first version recorded that uses them.
USED_FROM = {_RUNNERS[1]: "0.32.0"}

# Classes that are mixed into others when they run: what `super()` and `self` then are.
MIXED_INTO = {
    f"{_OURS}.lora._AdaptedLinear": (_COLUMN, _ROW, f"{_TE}.TEColumnParallelLinear", f"{_TE}.TERowParallelLinear")
}

# Overrides that take less than their base on purpose. How they are called is in CALLBACKS.
NARROWER = (f"{_OURS}.lora._AdaptedLinear.forward",)

# Functions that hand their further keywords to another.
FORWARDS = {"vllm.LLM": "vllm.engine.arg_utils.EngineArgs"}


@dataclass(frozen=True)
class Callback:
    """A call that a package makes, and where it can end up: in our code, or in that of another package."""

    scope: str
    """The module or class that calls."""
    callees: tuple[str, ...]
    """The expression that it calls; more than one where versions differ."""
    targets: tuple[str, ...]
    some: bool = False
    """Only some of the places that call it are ever reached."""

    @property
    def key(self) -> str:
        return f"{self.scope} -> {self.callees[0]}"


def _callback(scope: str, *callees: str, to: Sequence[str], some: bool = False) -> Callback:
    return Callback(scope, callees, tuple(to), some)


_NORMS = (f"{_OURS}.model._TorchRMSNorm", f"{_TE}.TENorm")
_COLUMNS, _ROWS = (_COLUMN, f"{_TE}.TEColumnParallelLinear"), (_ROW, f"{_TE}.TERowParallelLinear")
_LINEARS = (f"{_OURS}.lora._AdaptedLinear.forward", *(f"{each}.forward" for each in (*_COLUMNS, *_ROWS)))
_SCHEDULES, _TRANSFORMER = f"{_CORE}.pipeline_parallel.schedules", f"{_CORE}.transformer"

CALLBACKS = (
    # The layers of our specification, built and run.
    _callback(f"{_TRANSFORMER}.attention", "submodules.linear_qkv", to=_COLUMNS),
    _callback(f"{_TRANSFORMER}.attention", "submodules.linear_proj", to=_ROWS),
    _callback(
        f"{_TRANSFORMER}.attention",
        "submodules.core_attention",
        to=(f"{_OURS}.model._TorchAttention", f"{_TE}.TEDotProductAttention"),
    ),
    _callback(f"{_TRANSFORMER}.attention", "submodules.q_layernorm", "q_norm_cls", to=_NORMS),
    _callback(f"{_TRANSFORMER}.attention", "submodules.k_layernorm", "k_norm_cls", to=_NORMS),
    _callback(f"{_TRANSFORMER}.mlp", "submodules.linear_fc1", to=_COLUMNS),
    _callback(f"{_TRANSFORMER}.mlp", "submodules.linear_fc2", to=_ROWS),
    _callback(f"{_TRANSFORMER}.transformer_layer", "submodules.input_layernorm", to=_NORMS),
    _callback(f"{_TRANSFORMER}.transformer_layer", "submodules.pre_mlp_layernorm", to=_NORMS),
    _callback(f"{_TRANSFORMER}.transformer_block", "self.submodules.layer_norm", to=_NORMS),
    _callback(f"{_TRANSFORMER}.attention", "self.linear_qkv", to=_LINEARS),
    _callback(f"{_TRANSFORMER}.attention", "self.linear_proj", to=_LINEARS),
    _callback(f"{_TRANSFORMER}.mlp", "self.linear_fc1", to=_LINEARS),
    _callback(f"{_TRANSFORMER}.mlp", "self.linear_fc2", to=_LINEARS),
    _callback(
        f"{_TRANSFORMER}.attention",
        "self.core_attention",
        to=(f"{_OURS}.model._TorchAttention.forward", f"{_TE}.TEDotProductAttention.forward"),
    ),
    _callback(f"{_CORE}.models.gpt.gpt_model", "self.output_layer", to=(f"{_OURS}.model._OutputWeight.forward",)),
    # Transformer Engine's own constructors, for Megatron's layers around them.
    _callback(f"{_TE}.TELinear", "super().__init__", to=("transformer_engine.pytorch.Linear",)),
    _callback(
        f"{_TE}.TEDotProductAttention", "super().__init__", to=("transformer_engine.pytorch.DotProductAttention",)
    ),
    _callback(f"{_TE}.TENorm", "te.pytorch.RMSNorm", "norm_module", to=("transformer_engine.pytorch.RMSNorm",)),
    # The training step.
    _callback(_SCHEDULES, "forward_step_func", to=(f"{_OURS}.policy.MegatronPolicy._forward_step",), some=True),
    _callback(_SCHEDULES, "loss_func", to=(f"{_OURS}.policy.MegatronPolicy._loss",), some=True),
    _callback(_SCHEDULES, "config.finalize_model_grads_func", to=(f"{_OURS}.policy._finish_gradients",)),
    _callback(_SCHEDULES, "config.grad_scale_func", to=(f"{_CHAINED}.scale_loss",)),
    _callback(_SCHEDULES, "no_sync_func", to=(f"{_CORE}.distributed.DistributedDataParallel.no_sync",)),
    # Checkpoints.
    _callback(
        f"{_CORE}.dist_checkpointing.serialization",
        "sharded_strategy.load",
        to=("nemo_ssopd.checkpoint.storage._CheckedLoad.load",),
    ),
    _callback(
        f"{_TRANSFORMER}.utils",
        "module.sharded_state_dict",
        to=(f"{_OURS}.lora._AdaptedLinear.sharded_state_dict", f"{_OURS}.lora.Adapter.sharded_state_dict"),
    ),
)
