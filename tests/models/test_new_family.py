"""A family that is added by one file: load, adapt, export and plan a model, against transformers and PEFT.

The toy has Qwen3's norms of heads and Qwen2's biases together, and names of its own in config.json and the weights.
transformers computes it as a Qwen3 with biases.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from nemo_ssopd import models
from nemo_ssopd.config.sections import LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.convert.bridge import extra_states, run_config
from nemo_ssopd.convert.exporting import export_adapter, export_hf
from nemo_ssopd.megatron.lora import ColumnAdapter, adapters, add_lora
from nemo_ssopd.megatron.runtime import Runtime, initialize
from nemo_ssopd.megatron.weights import hf_weights, peft_weights
from nemo_ssopd.models.family import families, read_hf_config
from tests.distributed import run_distributed
from tests.megatron.hf_models import load_megatron, logits_BSV, tokens_BS
from tools import counts

pytestmark = pytest.mark.heavy

RECORD = """
from __future__ import annotations

from typing import Any

from nemo_ssopd.models import llama
from nemo_ssopd.models.family import Family, HFModelConfig, Kind, Weight

BLOCK = "body.{layer}"
QKV = "self_attention.linear_qkv"


def read(raw: dict[str, Any]) -> HFModelConfig:
    return HFModelConfig(
        architecture="ToyForCausalLM",
        hidden_size=raw["width"],
        num_layers=raw["depth"],
        num_heads=raw["heads"],
        num_kv_heads=raw["kv_heads"],
        head_dim=raw["head_width"],
        ffn_hidden_size=raw["mlp_width"],
        vocab_size=raw["tokens"],
        max_position_embeddings=64,
        tied=False,
        norm_eps=1e-6,
        rope_theta=raw["theta"],
        rope_scaling=None,
    )


def megatron(hf: HFModelConfig) -> dict[str, Any]:
    return {**llama.megatron(hf), "qk_layernorm": True, "add_qkv_bias": True}


FAMILY = Family(
    architecture="ToyForCausalLM",
    read=read,
    embedding=Weight("tokens.weight", "embedding.word_embeddings.weight", Kind.VOCABULARY),
    layer=(
        Weight(f"{BLOCK}.norm_1.weight", "input_layernorm.weight", Kind.REPLICATED),
        # Out of their order in Megatron's parameter, which is nobody's concern.
        Weight(f"{BLOCK}.value.weight", f"{QKV}.weight", Kind.VALUE, adapter="lora_v"),
        Weight(f"{BLOCK}.key.weight", f"{QKV}.weight", Kind.KEY, adapter="lora_k"),
        Weight(f"{BLOCK}.query.weight", f"{QKV}.weight", Kind.QUERY, adapter="lora_q"),
        Weight(f"{BLOCK}.value.bias", f"{QKV}.bias", Kind.VALUE),
        Weight(f"{BLOCK}.key.bias", f"{QKV}.bias", Kind.KEY),
        Weight(f"{BLOCK}.query.bias", f"{QKV}.bias", Kind.QUERY),
        Weight(f"{BLOCK}.query_norm.weight", "self_attention.q_layernorm.weight", Kind.REPLICATED),
        Weight(f"{BLOCK}.key_norm.weight", "self_attention.k_layernorm.weight", Kind.REPLICATED),
        Weight(f"{BLOCK}.mix.weight", "self_attention.linear_proj.weight", Kind.COLUMNS, adapter="lora_o"),
        Weight(f"{BLOCK}.norm_2.weight", "pre_mlp_layernorm.weight", Kind.REPLICATED),
        Weight(f"{BLOCK}.wide.weight", "mlp.linear_fc1.weight", Kind.UP, adapter="lora_up"),
        Weight(f"{BLOCK}.gate.weight", "mlp.linear_fc1.weight", Kind.GATE, adapter="lora_gate"),
        Weight(f"{BLOCK}.narrow.weight", "mlp.linear_fc2.weight", Kind.COLUMNS, adapter="lora_down"),
    ),
    final_norm=Weight("norm.weight", "decoder.final_layernorm.weight", Kind.REPLICATED),
    output=Weight("output.weight", "output_layer.weight", Kind.VOCABULARY),
    megatron=megatron,
    fp8_modules=llama.FAMILY.fp8_modules,
)
"""

# transformers' names in the toy's place, longest first.
NAMES = {
    "model.embed_tokens.": "tokens.",
    "model.layers.": "body.",
    "self_attn.q_proj.": "query.",
    "self_attn.k_proj.": "key.",
    "self_attn.v_proj.": "value.",
    "self_attn.o_proj.": "mix.",
    "self_attn.q_norm.": "query_norm.",
    "self_attn.k_norm.": "key_norm.",
    "mlp.gate_proj.": "gate.",
    "mlp.up_proj.": "wide.",
    "mlp.down_proj.": "narrow.",
    "input_layernorm.": "norm_1.",
    "post_attention_layernorm.": "norm_2.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(rank=4, alpha=6.0)
VOCABULARY = 97  # at tensor-parallel size 2, one padded row
CONFIG = {
    "architectures": ["ToyForCausalLM"],
    "width": 32,
    "depth": 2,
    "heads": 8,
    "kv_heads": 4,
    "head_width": 16,
    "mlp_width": 56,
    "tokens": VOCABULARY,
    "theta": 5e5,
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Toy:
    """The record's folder, the model's, and the same model by transformers."""

    record: Path
    path: Path
    reference: PreTrainedModel


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    base: torch.Tensor
    """Logits before there were adapters."""
    adapted: torch.Tensor
    adapters: Tensors


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "record").mkdir()
    (folder / "record" / "toy.py").write_text(RECORD)
    torch.manual_seed(7)
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
    )
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()  # the one bias that the toy does not have
            else:
                parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    state = {name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("o_proj.bias")}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    save_file({renamed(name): tensor.clone() for name, tensor in state.items()}, folder / "model" / "model.safetensors")
    return Toy(folder / "record", folder / "model", reference.eval())


@pytest.mark.parametrize("tensor", [1, 2])
def test_it_equals_transformers_and_peft_and_goes_back_as_it_came(toy: Toy, tensor: int, tmp_path: Path) -> None:
    ranks = run_distributed(use, tensor, toy.record, toy.path, tensor, tmp_path)
    tokens = tokens_BS(VOCABULARY)
    with torch.no_grad():
        expected = toy.reference(tokens).logits
    assert expected.std() > 0.3
    for found in ranks:
        torch.testing.assert_close(found.base, expected, rtol=0, atol=1e-5)

    original = load_file(toy.path / "model.safetensors")
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {**CONFIG, "torch_dtype": "float32"}

    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(written) == ["gate", "key", "mix", "narrow", "query", "value", "wide"]
    ours = {by_transformers(name): matrix for name, matrix in ranks[0].adapters.items()}
    base = Qwen3ForCausalLM(toy.reference.config)
    base.load_state_dict(toy.reference.state_dict())
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=PROJECTIONS)
    reference = peft.get_peft_model(base, config)
    loading = peft.set_peft_model_state_dict(reference, ours)
    assert not loading.unexpected_keys and not [key for key in loading.missing_keys if "lora" in key]
    with torch.no_grad():
        expected = reference(tokens).logits
    assert (expected - ranks[0].base).abs().max() > 0.1
    for found in ranks:
        torch.testing.assert_close(found.adapted, expected, rtol=0, atol=1e-5)

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    by_peft = {renamed(name): weight for name, weight in reference.merge_and_unload().state_dict().items()}
    for name, weight in merged.items():
        torch.testing.assert_close(weight, by_peft[name], rtol=0, atol=1e-6, msg=name)


def test_what_is_derived_from_the_record(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ToyForCausalLM" not in families()
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(toy.record)])
    hf = read_hf_config(toy.path)
    assert list(families()) == ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "ToyForCausalLM"]
    sys.modules.pop("nemo_ssopd.models.toy")

    # Of Megatron-Bridge.
    layout = run_config(hf, ModelConfig(path="toy", dtype="float32"))["model"]
    assert layout["qk_layernorm"] is True and layout["add_qkv_bias"] is True and layout["rotary_base"] == 5e5
    assert layout["activation_func"] == {"_call_": False, "_target_": "torch.nn.functional.silu"}
    assert "decoder.layers.1.self_attention.q_layernorm" in extra_states(hf)

    # Counts on one of two ranks: 8 query heads, 4 key-value heads, 16 wide; half of 56; 97 padded to 98.
    q, kv, ffn, vocabulary = 8 * 16 // 2, 4 * 16 // 2, 56 // 2, 49
    layer = 32 * (q + 2 * kv) + (q + 2 * kv) + 2 * 16 + q * 32 + 3 * 32 * ffn + 2 * 32
    assert counts.parameters(hf, 2) == 2 * vocabulary * 32 + 2 * layer + 32
    adapted = (32 + q) + 2 * (32 + kv) + (q + 32) + 2 * (32 + ffn) + (ffn + 32)
    assert counts.adapters(hf, 2, 4) == 2 * 4 * adapted


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def by_transformers(name: str) -> str:
    """`renamed`, backwards: no name of the toy's is the end of another that could stand in its place."""
    for theirs, ours in NAMES.items():
        name = name.replace(f".{ours}", f".{theirs}")
    return name


# --- what runs in the workers ----------------------------------------------------------------------------------------


def use(record: Path, path: Path, tensor: int, output: Path) -> Found:
    models.__path__.append(str(record))
    parallel = ParallelConfig(world_size=tensor, tensor=tensor)
    runtime = initialize(parallel, seed=1)
    model, hf = load_megatron(str(path), parallel, runtime)
    tokens = tokens_BS(hf.vocab_size)
    base = logits_BSV(model, hf, runtime, tokens)
    export_hf(hf_weights(model, hf, runtime), path, output / "plain", runtime, dtype=torch.float32)

    add_lora(model, hf, LORA, seed=1, runtime=runtime)
    set_random_b(model, runtime)
    adapted = logits_BSV(model, hf, runtime, tokens)
    export_adapter(peft_weights(model, runtime), LORA, path, output / "adapter", runtime)
    export_hf(hf_weights(model, hf, runtime), path, output / "merged", runtime, dtype=torch.float32)
    return Found(base, adapted, {name: matrix.clone() for name, matrix in peft_weights(model, runtime)})


def set_random_b(model: torch.nn.Module, runtime: Runtime) -> None:
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model):
        ranks = runtime.layout.tensor.size if isinstance(adapter, ColumnAdapter) else 1
        whole = torch.randn(adapter.B.shape[0] * ranks, LORA.rank, generator=generator) * 0.1
        adapter.B.data = whole.chunk(ranks)[runtime.layout.tensor.rank % ranks].clone()
