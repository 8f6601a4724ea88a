"""Adapters against PEFT's own on the transformers model: outputs, gradients, merging, names; and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_tensor_model_parallel_region
from transformers import AutoModelForCausalLM

from nemo_ssopd.config.sections import LoraConfig, ParallelConfig
from nemo_ssopd.megatron.lora import ColumnAdapter, adapters, adapters_disabled, add_lora
from nemo_ssopd.megatron.model import output_weight
from nemo_ssopd.megatron.runtime import Runtime, initialize
from nemo_ssopd.megatron.weights import hf_weights, peft_weights
from nemo_ssopd.models.family import HFModelConfig
from tests.distributed import run_distributed
from tests.megatron.hf_models import hidden_BSH, load_megatron, logits_BSV, save_random_model, tokens_BS

pytestmark = pytest.mark.heavy

LORA = LoraConfig(rank=4, alpha=6.0)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYOUTS = {
    "tp1": ParallelConfig(world_size=1),
    "tp2": ParallelConfig(world_size=2, tensor=2),
    "tp2_sequence": ParallelConfig(world_size=2, tensor=2, sequence=True),
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Result:
    """Of one rank. Names are PEFT's, and Hugging Face's for `merged`."""

    initial: Tensors
    adapted: torch.Tensor
    """Logits with adapters on and B no longer zero."""
    weights: Tensors
    gradients: Tensors
    merged: Tensors


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [save_random_model(name, tmp_path_factory.mktemp(name)) for name in ("qwen3_tied", "qwen2")]


@pytest.fixture(scope="module", params=LAYOUTS)
def results(request: pytest.FixtureRequest, paths: list[str]) -> list[list[Result]]:
    """By rank, then by model."""
    parallel = LAYOUTS[request.param]
    return run_distributed(adapted_models, parallel.world_size, paths, parallel)


def test_outputs_gradients_and_merged_weights_equal_pefts(paths: list[str], results: list[list[Result]]) -> None:
    for of_rank in results:
        for path, result in zip(paths, of_rank, strict=True):
            _compare_with_peft(path, result)


def test_initial_values_depend_on_seed_and_projection_only(paths: list[str], results: list[list[Result]]) -> None:
    (whole, other_seed), *_ = run_distributed(initial_adapters, 1, paths[0])
    for of_rank in results:
        initial = of_rank[0].initial
        assert initial.keys() == whole.keys() and all(torch.equal(initial[name], whole[name]) for name in whole)
    for name, matrix in whole.items():
        assert (matrix == 0).all() if "lora_B" in name else not torch.equal(matrix, other_seed[name])
    bound = (1 / 32) ** 0.5  # kaiming-uniform with a = sqrt(5), as PEFT draws it: sqrt(1 / in_features)
    first = whole["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0.8 * bound < first.abs().max() <= bound
    assert not torch.equal(first, whole["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"])


def test_checkpoint_loads_at_another_tensor_parallel_size(paths: list[str], tmp_path: Path) -> None:
    saved, _ = run_distributed(save_adapters, 2, paths[0], tmp_path)
    (loaded,) = run_distributed(load_adapters, 1, paths[0], tmp_path)
    assert saved.keys() == loaded.keys() and len(saved) == 2 * 7 * 2
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


# --- what runs in the workers ----------------------------------------------------------------------------------------


def adapted_models(paths: list[str], parallel: ParallelConfig) -> list[Result]:
    """The first model recomputes activations, the others keep them."""
    runtime = initialize(parallel, seed=1)
    return [adapted_model(path, parallel, runtime, recompute=path == paths[0]) for path in paths]


def adapted_model(path: str, parallel: ParallelConfig, runtime: Runtime, *, recompute: bool) -> Result:
    model, hf = load_megatron(path, parallel, runtime, recompute=recompute)
    tokens = tokens_BS(hf.vocab_size)
    model.requires_grad_(False)  # as add_lora leaves it: torch.matmul chooses its kernel by it, and so the last bits
    base = logits_BSV(model, hf, runtime, tokens)
    add_lora(model, hf, LORA, seed=1, runtime=runtime)
    assert torch.equal(logits_BSV(model, hf, runtime, tokens), base), "step 0 must equal the base"

    initial = {name: tensor.clone() for name, tensor in peft_weights(model, runtime)}
    _set_random_b(model, runtime)
    adapted = logits_BSV(model, hf, runtime, tokens)
    assert (adapted - base).abs().max() > 0.1
    _check_switch(model, hf, runtime, tokens, base=base, adapted=adapted)

    _cross_entropy(model, runtime, tokens).backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".lora_" not in name)
    merged = {name: tensor.clone() for name, tensor in hf_weights(model, hf, runtime)}
    weights = {name: tensor.clone() for name, tensor in peft_weights(model, runtime)}
    for adapter in adapters(model):
        for parameter in (adapter.A, adapter.B):
            if getattr(parameter, "sequence_parallel", False):  # as Megatron's finalize_model_grads does
                dist.all_reduce(parameter.grad, group=runtime.layout.tensor.group)
            parameter.data = parameter.grad
    gradients = {name: tensor.clone() for name, tensor in peft_weights(model, runtime)}
    return Result(initial, adapted, weights, gradients, merged)


def save_adapters(path: str, folder: Path) -> Tensors:
    runtime = initialize(LAYOUTS["tp2"], seed=1)
    model, hf = load_megatron(path, LAYOUTS["tp2"], runtime)
    add_lora(model, hf, LORA, seed=1, runtime=runtime)
    _set_random_b(model, runtime)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    return {name: tensor.clone() for name, tensor in peft_weights(model, runtime)}


def load_adapters(path: str, folder: Path) -> Tensors:
    runtime = initialize(LAYOUTS["tp1"], seed=1)
    model, hf = load_megatron(path, LAYOUTS["tp1"], runtime)
    base = {name: tensor.clone() for name, tensor in hf_weights(model, hf, runtime)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    add_lora(model, hf, LORA, seed=2, runtime=runtime)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    assert all(torch.equal(tensor, base[name]) for name, tensor in hf_weights(model, hf, runtime, merged=False))
    return {name: tensor.clone() for name, tensor in peft_weights(model, runtime)}


def initial_adapters(path: str) -> list[Tensors]:
    """With seeds 1 and 2."""
    runtime = initialize(LAYOUTS["tp1"], seed=1)
    tensors = []
    for seed in (1, 2):
        model, hf = load_megatron(path, LAYOUTS["tp1"], runtime)
        add_lora(model, hf, LORA, seed=seed, runtime=runtime)
        tensors.append(dict(peft_weights(model, runtime)))
    return tensors


def _set_random_b(model: GPTModel, runtime: Runtime) -> None:
    """The same whole matrices at every tensor-parallel size."""
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model):
        rows = adapter.B.shape[0] * (runtime.layout.tensor.size if isinstance(adapter, ColumnAdapter) else 1)
        whole = torch.randn(rows, LORA.rank, generator=generator) * 0.1
        part = (
            whole.chunk(runtime.layout.tensor.size)[runtime.layout.tensor.rank]
            if isinstance(adapter, ColumnAdapter)
            else whole
        )
        adapter.B.data = part.clone()


def _check_switch(
    model: GPTModel,
    hf: HFModelConfig,
    runtime: Runtime,
    tokens: torch.Tensor,
    base: torch.Tensor,
    adapted: torch.Tensor,
) -> None:
    with adapters_disabled(model):
        with adapters_disabled(model):
            pass
        assert torch.equal(logits_BSV(model, hf, runtime, tokens), base), "still off after the inner block"
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(logits_BSV(model, hf, runtime, tokens), adapted), "on again after an exception"


def _cross_entropy(model: GPTModel, runtime: Runtime, tokens_BS: torch.Tensor) -> torch.Tensor:
    hidden = copy_to_tensor_model_parallel_region(hidden_BSH(model, tokens_BS), group=runtime.layout.tensor.group)
    logits = gather_from_tensor_model_parallel_region(
        hidden @ output_weight(model).T, group=runtime.layout.tensor.group
    )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


# --- the reference ---------------------------------------------------------------------------------------------------


def _compare_with_peft(path: str, result: Result) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = tokens_BS(model.config.vocab_size)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=PROJECTIONS)
    reference = peft.get_peft_model(model, config)
    loading = peft.set_peft_model_state_dict(reference, result.weights)
    assert not loading.unexpected_keys and not [key for key in loading.missing_keys if "lora" in key]

    logits = reference(tokens).logits
    torch.testing.assert_close(result.adapted, logits, rtol=0, atol=1e-5)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert result.gradients.keys() == expected.keys() and len(expected) == 2 * 7 * 2
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}")

    merged = reference.merge_and_unload()
    for name, weight in merged.state_dict().items():
        if name in result.merged:  # all but the second name of a tied weight
            torch.testing.assert_close(result.merged[name], weight, rtol=0, atol=1e-6, msg=f"{name}")
    merged.load_state_dict(result.merged, strict=False)
    torch.testing.assert_close(merged(tokens).logits, result.adapted, rtol=0, atol=1e-5)
