"""One optimizer step the way Megatron-Core does it, on CPU: its DDP, its schedule over micro-batches, its optimizer.

This is also the shortest example of what the actor has to call. Every split of the same batch, over tensor-parallel ranks,
data-parallel ranks and micro-batches, must give the same gradient norm and the same weights after the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

from nemo_ssopd.config import LoraConfig, ParallelConfig
from nemo_ssopd.megatron.lora import add_lora
from nemo_ssopd.megatron.model import output_weight
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.megatron.weights import hf_weights
from tests.distributed import run_distributed
from tests.megatron.hf_models import hidden_BSH, load_megatron, save_random_model, tokens_BS

ROWS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 97 tokens: the padded row takes part in this test's plain cross-entropy at TP=2 only, so leave it out.
    return save_random_model("qwen2", tmp_path_factory.mktemp("qwen2"))


def step(
    path: str, parallel: ParallelConfig, rows_per_microbatch: int, distributed_optimizer: bool, lora: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """The gradient norm, and the weights after one step of next-token cross-entropy, summed over all tokens."""
    runtime = initialize(parallel, seed=1)
    gpt, hf = load_megatron(path, parallel, runtime, recompute=True)
    if lora:
        add_lora(gpt, LoraConfig(rank=4, alpha=8.0), seed=1, runtime=runtime)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    model = DistributedDataParallel(gpt.config, ddp_config, gpt)
    model.broadcast_params()
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=distributed_optimizer
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    # Called by the schedule after the last micro-batch: sums gradients over the data-parallel ranks, and over the
    # tensor-parallel ranks those of the q and k norms (and of what sees part of the sequence only).
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss

    tokens = tokens_BS(hf.vocab_size, rows=ROWS).chunk(runtime.dp_size)[runtime.dp_rank]
    micro_batches = tokens.split(rows_per_microbatch)

    def forward_step(
        batches: Iterator[torch.Tensor], model: torch.nn.Module
    ) -> tuple[torch.Tensor, partial[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
        batch_BS = next(batches)
        return hidden_BSH(model, batch_BS), partial(loss_function, batch_BS)

    def loss_function(
        batch_BS: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # The model leaves the reduction of the hidden gradient to the loss: here Megatron's mapping does it.
        hidden = copy_to_tensor_model_parallel_region(hidden, group=runtime.tp_group)
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
        micro_batch_size=rows_per_microbatch,
        forward_only=False,
    )
    successful, grad_norm, _ = optimizer.step()
    assert successful
    assert dist.get_world_size() == runtime.tp_size * runtime.dp_size
    return float(grad_norm), {name: tensor.clone() for name, tensor in hf_weights(gpt, hf, runtime)}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_split_gives_the_same_step(path: str, lora: bool) -> None:
    (whole_norm, whole), *_ = run_distributed(step, 1, path, ParallelConfig(world_size=1), ROWS, False, lora)
    splits = {
        "two micro-batches, distributed optimizer": (ParallelConfig(world_size=1), 2, True),
        "tensor-parallel": (ParallelConfig(world_size=2, tensor=2), 2, False),
        "tensor-parallel, distributed optimizer": (ParallelConfig(world_size=2, tensor=2), 4, True),
        "data-parallel": (ParallelConfig(world_size=2), 1, False),
        "data-parallel, distributed optimizer": (ParallelConfig(world_size=2), 2, True),
    }
    for split, (parallel, rows, distributed_optimizer) in splits.items():
        results = run_distributed(step, parallel.world_size, path, parallel, rows, distributed_optimizer, lora)
        for norm, weights in results:
            assert norm == pytest.approx(whole_norm, rel=1e-5), split
            for name, weight in weights.items():
                torch.testing.assert_close(weight, whole[name], rtol=0, atol=2e-5, msg=lambda m: f"{split}: {name}: {m}")
