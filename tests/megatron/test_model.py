"""GPTModel as we build it against transformers, at TP=1 and TP=2, and what the shim for the CPU leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megatron.core.tensor_parallel.mappings as megatron_mappings
import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM

from nemo_ssopd.config.sections import LoraConfig, ParallelConfig
from nemo_ssopd.data.packing import pack
from nemo_ssopd.megatron.lora import adapters, add_lora
from nemo_ssopd.megatron.model import hidden_states, output_weight
from nemo_ssopd.megatron.runtime import initialize, shutdown
from nemo_ssopd.types import TokenSequence
from tests.distributed import run_distributed
from tests.megatron.hf_models import HF_CONFIGS, hidden_BSH, load_megatron, logits_BSV, save_random_model, tokens_BS

pytestmark = pytest.mark.heavy

LAYOUTS = {
    "tp1": ParallelConfig(world_size=1),
    "tp2": ParallelConfig(world_size=2, tensor=2),
    "tp2_sequence": ParallelConfig(world_size=2, tensor=2, sequence=True),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: save_random_model(name, tmp_path_factory.mktemp(name)) for name in HF_CONFIGS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(paths: dict[str, str], layout: str) -> None:
    parallel = LAYOUTS[layout]
    for logits_by_name in run_distributed(megatron_logits, parallel.world_size, paths, parallel):
        for name, path in paths.items():
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                reference = model(tokens_BS(model.config.vocab_size)).logits
            assert reference.std() > 0.3
            torch.testing.assert_close(logits_by_name[name], reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_odd", "llama3_rope"])
def test_packed_sequences_equal_each_alone(paths: dict[str, str], layout: str, name: str) -> None:
    """Hidden states and adapters' gradients: packed with torch's attention, alone with Megatron's own."""
    parallel = LAYOUTS[layout]
    for recompute in (False, True):
        ranks = run_distributed(packed_and_alone, parallel.world_size, paths[name], parallel, recompute)
        for packed, alone in ranks:
            assert alone.hidden_SH.std() > 0.3
            torch.testing.assert_close(packed.hidden_SH, alone.hidden_SH, rtol=0, atol=2e-5)
        for adapter in ranks[0][0].gradients:
            # Over ranks: with sequence parallelism each has the part of its own tokens.
            packed_sum, alone_sum = (sum(rank[i].gradients[adapter] for rank in ranks) for i in (0, 1))
            assert (packed_sum - alone_sum).norm() < 2e-5 * alone_sum.norm(), adapter


def test_padded_rows_and_tied_weights(paths: dict[str, str]) -> None:
    (rows, last_row, tied, bf16), (_, padding, _, _) = run_distributed(output_layer, 2, paths["llama_odd_tied"])
    assert rows == 49 and tied and bf16
    assert (padding == 0).all() and (last_row != 0).all()


def test_the_shim_touches_megatron_only() -> None:
    for outcome in run_distributed(what_changes, 2):
        assert outcome == {"torch.cuda": False, "torch.zeros": False, "Tensor.type": False, "megatron": True}


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="parallel.world_size=4 but the launcher started 1 processes"):
        run_distributed(initialize_with, 1, ParallelConfig(world_size=4))


# --- what runs in the workers ----------------------------------------------------------------------------------------


def megatron_logits(paths: dict[str, str], parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    runtime = initialize(parallel, seed=1)
    logits = {}
    for name, path in paths.items():
        model, hf = load_megatron(path, parallel, runtime)
        logits[name] = logits_BSV(model, hf, runtime, tokens_BS(hf.vocab_size))
    return logits


@dataclass(frozen=True)
class Pass:
    """Hidden states of some sequences, end to end, and the gradients of the adapters by name."""

    hidden_SH: torch.Tensor
    gradients: dict[str, torch.Tensor]


def packed_and_alone(path: str, parallel: ParallelConfig, recompute: bool) -> tuple[Pass, Pass]:
    """One micro-batch of unlike lengths with padding behind, and its sequences one by one."""
    runtime = initialize(parallel, seed=1)
    model, hf = load_megatron(path, parallel, runtime, recompute=recompute)
    add_lora(model, hf, LoraConfig(rank=4, alpha=6.0), seed=1, runtime=runtime)
    for adapter in adapters(model):  # B begins as zero, which would hide the gradient of A
        torch.nn.init.normal_(adapter.B, std=0.1, generator=torch.Generator().manual_seed(5))
    lengths = (9, 24, 1, 17, 2)
    tokens = tokens_BS(hf.vocab_size, rows=1, length=sum(lengths))[0].split(lengths)
    batch = pack(
        [TokenSequence(tuple(sequence.tolist()), 1) for sequence in tokens],
        tuple(range(len(lengths))),
        pad_id=0,
        multiple=2,
        device="cpu",
    )
    assert batch.bounds == (0, 9, 33, 34, 51, 53, 54)

    def alone(sequence: torch.Tensor) -> torch.Tensor:
        even = F.pad(sequence, (0, len(sequence) % 2))[None]
        return model(even, position_ids=None, attention_mask=None)[0, : len(sequence)]

    return (
        _pass(model, lambda: hidden_states(model, batch.tokens_S, batch.bounds)[: sum(lengths)]),
        _pass(model, lambda: torch.cat([alone(sequence) for sequence in tokens])),
    )


def _pass(model: GPTModel, run: Callable[[], torch.Tensor]) -> Pass:
    model.zero_grad()
    hidden_SH = run()
    (hidden_SH * torch.randn(hidden_SH.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return Pass(hidden_SH.detach(), gradients)


def output_layer(path: str) -> tuple[int, torch.Tensor, bool, bool]:
    """(rows on this rank, the last of them, whether it is the embedding's, whether a bfloat16 model computes so)."""
    runtime = initialize(LAYOUTS["tp2"], seed=1)
    model, hf = load_megatron(path, LAYOUTS["tp2"], runtime)
    weight = output_weight(model)
    tied = weight is model.embedding.word_embeddings.weight and weight.requires_grad
    half, _ = load_megatron(path, LAYOUTS["tp2"], runtime, dtype="bfloat16")
    hidden = hidden_BSH(half, tokens_BS(hf.vocab_size))
    return weight.shape[0], weight[-1].detach(), tied, hidden.dtype is torch.bfloat16


def what_changes() -> dict[str, bool]:
    """Which of these names mean something else once Megatron has been taught the CPU."""
    before = torch.cuda.current_device, torch.zeros, torch.Tensor.type, megatron_mappings.torch
    runtime = initialize(LAYOUTS["tp2"], seed=1)
    layout = runtime.layout
    assert (layout.tensor.size, layout.tensor.rank, layout.data.size, layout.data.rank) == (2, runtime.rank, 1, 0)
    assert [axis.size for axis in (layout.pipeline, layout.context, layout.expert)] == [1, 1, 1]
    assert runtime.layout.gather_tensor(torch.full((1, 2), float(runtime.rank)), dim=0)[:, 0].tolist() == [0.0, 1.0]
    shutdown()
    after = torch.cuda.current_device, torch.zeros, torch.Tensor.type, megatron_mappings.torch
    names = ("torch.cuda", "torch.zeros", "Tensor.type", "megatron")
    return {name: old is not new for name, old, new in zip(names, before, after, strict=True)}


def initialize_with(parallel: ParallelConfig) -> None:
    initialize(parallel, seed=1)
