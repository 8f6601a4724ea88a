"""One optimizer step the way Megatron-Core does it, on CPU: its DDP, its schedule over micro-batches, its optimizer.

This is also the shortest example of what the actor has to call. Every split of the same batch, over tensor-parallel
ranks, data-parallel ranks and micro-batches, must give the same gradient norm and the same weights after the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

from nemo_ssopd.config.sections import LoraConfig, ParallelConfig
from nemo_ssopd.megatron.lora import add_lora
from nemo_ssopd.megatron.model import output_weight
from nemo_ssopd.megatron.runtime import Runtime, initialize
from nemo_ssopd.megatron.weights import hf_weights
from tests.distributed import run_distributed
from tests.megatron.hf_models import hidden_BSH, load_megatron, save_random_model, tokens_BS

pytestmark = pytest.mark.heavy

ROWS = 4


LAYOUTS = {
    "tp2": ParallelConfig(world_size=2, tensor=2),
    "tp2_sequence": ParallelConfig(world_size=2, tensor=2, sequence=True),
    "dp2": ParallelConfig(world_size=2),
}
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """How one step is made."""

    lora: bool
    distributed_optimizer: bool
    rows_per_microbatch: int


CASES = [Case(lora, False, 2) for lora in (True, False)] + [Case(lora, True, 1) for lora in (True, False)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model("qwen3_tied", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def whole(path: str) -> dict[bool, tuple[float, Weights]]:
    """One process, one micro-batch: with adapters (True) and without."""
    cases = [Case(lora, distributed_optimizer=False, rows_per_microbatch=ROWS) for lora in (True, False)]
    (outcomes,) = run_distributed(steps, 1, path, ParallelConfig(world_size=1), cases)
    return {case.lora: outcome for case, outcome in zip(cases, outcomes, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_split_gives_the_same_step(path: str, whole: dict[bool, tuple[float, Weights]], layout: str) -> None:
    for outcomes in run_distributed(steps, 2, path, LAYOUTS[layout], CASES):
        for case, (norm, weights) in zip(CASES, outcomes, strict=True):
            whole_norm, whole_weights = whole[case.lora]
            assert norm == pytest.approx(whole_norm, rel=1e-5), case
            for name, weight in weights.items():
                torch.testing.assert_close(weight, whole_weights[name], rtol=0, atol=2e-6, msg=f"{case} {name}")


def steps(path: str, parallel: ParallelConfig, cases: list[Case]) -> list[tuple[float, Weights]]:
    runtime = initialize(parallel, seed=1)
    return [step(path, parallel, runtime, case) for case in cases]


def step(path: str, parallel: ParallelConfig, runtime: Runtime, case: Case) -> tuple[float, Weights]:
    """The gradient norm, and the weights after one step of next-token cross-entropy, summed over all tokens."""
    gpt, hf = load_megatron(path, parallel, runtime, recompute=True)
    if case.lora:
        add_lora(gpt, hf, LoraConfig(rank=4, alpha=8.0), seed=1, runtime=runtime)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed_optimizer, overlap_grad_reduce=False
    )
    model = DistributedDataParallel(gpt.config, ddp_config, gpt)
    model.broadcast_params()
    # A large eps: with a small one the first step of Adam is lr times the gradient's sign, rounding noise included.
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        adam_eps=1e-3,
        weight_decay=0.0,
        clip_grad=1.0,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    # Called by the schedule after the last micro-batch: sums gradients over the data-parallel ranks, and over the
    # tensor-parallel ranks those of the q and k norms (and of what sees part of the sequence only).
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss

    tokens = tokens_BS(hf.vocab_size, rows=ROWS).chunk(runtime.layout.data.size)[runtime.layout.data.rank]
    micro_batches = tokens.split(case.rows_per_microbatch)

    def forward_step(
        batches: Iterator[torch.Tensor], model: torch.nn.Module
    ) -> tuple[torch.Tensor, partial[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
        batch_BS = next(batches)
        return hidden_BSH(model, batch_BS), partial(loss_function, batch_BS)

    def loss_function(
        batch_BS: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # The model leaves the reduction of the hidden gradient to the loss: here Megatron's mapping does it.
        hidden = copy_to_tensor_model_parallel_region(hidden, group=runtime.layout.tensor.group)
        logits_SBW = (hidden @ output_weight(gpt).T).transpose(0, 1)[:-1].contiguous()
        loss = vocab_parallel_cross_entropy(logits_SBW, batch_BS.T[1:].contiguous()).sum()
        # With calculate_per_token_loss: a sum and the count that finalize_model_grads divides by.
        return loss, torch.tensor(batch_BS.numel(), dtype=torch.int), {"loss": loss.detach()}

    model.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=tokens.shape[1],
        micro_batch_size=case.rows_per_microbatch,
        forward_only=False,
    )
    successful, grad_norm, _ = optimizer.step()
    assert successful
    return float(grad_norm), {name: tensor.clone() for name, tensor in hf_weights(gpt, hf, runtime)}
