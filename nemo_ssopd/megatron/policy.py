"""The policy on Megatron-Core: scoring, the teacher's pass, and one optimizer step with auxiliary losses.

Shapes: S tokens of a micro-batch, T completion tokens among them, K prefix positions, H hidden size, W this rank's
vocabulary shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_ssopd.algo.losses import AuxLoss, TokenInputs, TokenLoss
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import OptimizerConfig
from nemo_ssopd.data.packing import micro_batches, pack, send, unpack
from nemo_ssopd.megatron.lora import adapters_disabled, adapters_enabled, add_lora
from nemo_ssopd.megatron.model import DTYPES, build_model, hidden_states, output_weight
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.megatron.weights import Rounding, hf_weights, load_hf_weights
from nemo_ssopd.metrics import Max, Metrics, Sum, fetch, merge
from nemo_ssopd.models.family import HFModelConfig
from nemo_ssopd.ops.logprobs import linear_logprobs
from nemo_ssopd.types import PackedBatch, TokenSequence, TrainExample

# float16 only. Losses are divided by the tokens of a global batch, millions of them, so that gradients of one token are
# far under float16's smallest number, 6e-8; the scale lifts them. It doubles after LOSS_SCALE_WINDOW steps without an
# overflow; each overflow skips its step and halves it. 2^16 is where torch's own scaler starts; Megatron's 2^32 would
# begin with skipped steps. (ours)
LOSS_SCALE, LOSS_SCALE_WINDOW = 2.0**16, 1000

CHANGE = 0.1
"""Standard deviation of the noise that `changed` adds. At rank 64 an adapter's output is then as large as its input."""

MakeInputs: TypeAlias = Callable[..., TokenInputs]
"""A function that adds `logprobs_T` and `entropy_T` to what is known of a micro-batch's tokens."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step. When `skipped`, the weights were left alone: see `MegatronPolicy.update`.

    >>> StepResult(skipped=False, metrics={"optim/grad_norm": Max(0.31)})
    """

    skipped: bool
    metrics: Metrics


@dataclass(frozen=True)
class _Denominators:
    """Global counts of one optimizer step, as scalars on the device: nothing waits for them."""

    tokens: torch.Tensor
    completions: torch.Tensor
    aux: tuple[torch.Tensor, ...]


class MegatronPolicy:
    """A policy with its optimizer. All ranks of a tensor-parallel group call every method together."""

    def __init__(self, config: Config, hf: HFModelConfig, runtime: Runtime, *, pad_id: int) -> None:
        self.hf, self.runtime = hf, runtime
        self.temperature = config.rollout.temperature
        self.chunk_tokens = config.trainer.chunk_tokens
        self._normalization = config.algorithm.normalization
        self._max_new_tokens = config.rollout.max_new_tokens
        self._pad_id = pad_id
        self._multiple = config.parallel.sequence_shards
        self._token_budget = config.trainer.token_budget // self._multiple * self._multiple
        self.model = build_model(hf, config.model, config.parallel, runtime)
        load_hf_weights(self.model, hf, config.model.path, runtime)
        self.base_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        """Bytes of this rank's shard, without adapters."""
        if config.lora.enabled:
            add_lora(self.model, hf, config.lora, seed=config.trainer.seed, runtime=runtime)
        self._initial = None if config.lora.enabled else _copy_of_weights(self.model)
        self._teacher, self._ema_decay = config.algorithm.teacher, config.algorithm.ema_decay
        self.teacher_average = _trained_in_float32(self.model) if self._teacher == "ema" else {}
        self._ddp, self.optimizer = _optimizer(self.model, config.optimizer, DTYPES[config.model.dtype])
        self.scheduler = _scheduler(self.optimizer, config.optimizer)
        self._forward_backward = get_forward_backward_func()
        self.grad_norm_limit = math.inf
        """Largest gradient norm; a step over it is skipped. The loop sets it from the norms of the steps before."""

    # The passes without gradients.

    def logprobs(self, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, ...]:
        """Score each completion under the current weights, at the sampling temperature: [completion length] each."""
        return self._without_gradient(sequences, lambda hidden_TH, packed: self._logprobs(hidden_TH, packed)[0])

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, ...]:
        """Return the final hidden states that predict each completion token: [completion length, H] each."""
        return self._without_gradient(sequences, lambda hidden_TH, packed: hidden_TH)

    def _without_gradient(
        self, sequences: Sequence[TokenSequence], compute: Callable[[torch.Tensor, PackedBatch], torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Run all sequences through Megatron's schedule; return what `compute` makes of each one's hidden states."""
        microbatches = list(self._packed(sequences))
        if not microbatches:
            return ()
        with torch.no_grad():
            parts: list[dict[int, torch.Tensor]] = self._forward_backward(
                forward_step_func=partial(self._pass_step, compute=compute),
                data_iterator=iter(microbatches),
                model=[self.model],
                num_microbatches=len(microbatches),
                seq_length=0,  # unused without pipeline stages, as is the next
                micro_batch_size=0,
                forward_only=True,
                collect_non_loss_data=True,
            )
        by_row = {row: values for part in parts for row, values in part.items()}
        return tuple(by_row[row] for row in range(len(sequences)))

    def _pass_step(
        self,
        microbatches: Iterator[PackedBatch],
        model: torch.nn.Module,
        *,
        compute: Callable[[torch.Tensor, PackedBatch], torch.Tensor],
    ) -> tuple[torch.Tensor, Callable[..., dict[int, torch.Tensor]]]:
        packed = next(microbatches)

        def collect(hidden_SH: torch.Tensor, non_loss_data: bool) -> dict[int, torch.Tensor]:
            return unpack(compute(hidden_SH.index_select(0, packed.index_T), packed), packed)

        return self._forward(packed, model), collect

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run every pass inside on the fixed initial weights: pi_ref and, by default, the teacher."""
        weights: AbstractContextManager[None] = (
            adapters_disabled(self.model) if self._initial is None else _swapped(self.model, self._initial)
        )
        with weights:
            yield

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Run every pass inside on the teacher's weights: the initial ones, the current ones or their average."""
        weights: dict[str, AbstractContextManager[None]] = {
            "fixed": self.reference(),
            "live": nullcontext(),
            "ema": _swapped(self.model, self.teacher_average),
        }
        with weights[self._teacher]:
            yield

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Make the policy, inside, another one far from it, the same on every rank: see `setup.check_refit`.

        The adapters' B are moved or, when all weights train, the norms' weights: these are small. They are moved by
        random numbers. What one constant adds to every element of B has one sign in all outputs. It squares from layer
        to layer, up to 1e6; float16 ends at 65 504.
        """
        generator = torch.Generator(self.runtime.device).manual_seed(1)
        moved = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith(".B") if self._initial is None else parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                moved[name] = parameter.detach() / 2 + CHANGE * noise.to(parameter.dtype)
        with _swapped(self.model, moved):
            yield

    # The optimizer step.

    def update(
        self, examples: Sequence[TrainExample], token_loss: TokenLoss, aux_losses: Sequence[AuxLoss] = ()
    ) -> StepResult:
        """Take one optimizer step on this rank's examples.

        The weights stay as they are, and `skipped` is true, when loss or gradient is not finite or the gradient norm
        is over `grad_norm_limit`. `loss/total` in the metrics is this data-parallel rank's share.
        """
        # All that the device needs from the host goes over before the first pass; metrics come back after the last.
        denominators = self._denominators(examples, aux_losses)
        microbatches = [
            (packed, self._known_inputs([examples[row] for row in packed.rows]))
            for packed in self._packed([example.sequence for example in examples])
        ]
        loss_scale = self.optimizer.get_loss_scale()
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = partial(
            self._loss, examples=examples, token_loss=token_loss, aux_losses=aux_losses, denominators=denominators
        )
        logs: list[list[Metrics]] = self._forward_backward(
            forward_step_func=partial(self._forward_step, loss=loss),
            data_iterator=iter(microbatches),
            model=[self._ddp],
            num_microbatches=len(microbatches),
            seq_length=0,
            micro_batch_size=0,
            forward_only=False,
        )
        # Every rank takes the same branch: the norm is over all of them, and so is the verdict on the loss.
        metrics = merge(*fetch(chain.from_iterable(logs)))
        self.optimizer.prepare_grads()  # an overflow of scaled gradients is infinite in the norm too
        grad_norm = float(self.optimizer.get_grad_norm())
        usable = math.isfinite(grad_norm) and grad_norm <= self.grad_norm_limit
        skipped = not (usable and self._everywhere(math.isfinite(metrics["loss/total"].value())))
        if not skipped:
            self._apply_gradients()
            self.scheduler.step(increment=1)
            self._move_average()
        metrics["optim/grad_norm"] = Max(grad_norm)
        metrics["optim/lr"] = Max(self.optimizer.param_groups[0]["lr"])
        metrics["optim/skipped_steps"] = Max(float(skipped))
        if self.model.config.fp16:
            metrics["optim/loss_scale"] = Max(float(loss_scale))
        return StepResult(skipped=skipped, metrics=metrics)

    def _denominators(self, examples: Sequence[TrainExample], aux_losses: Sequence[AuxLoss]) -> _Denominators:
        """Count over all data-parallel ranks. A count of zero becomes 1, which then divides a sum of zero."""
        own = [
            sum(sum(example.token_weights) for example in examples),
            sum(any(example.token_weights) for example in examples),
            *(aux.denominator(examples) for aux in aux_losses),
        ]
        counts = send(torch.tensor(own, dtype=torch.float64), self.runtime.device)
        dist.all_reduce(counts, group=self.runtime.layout.data.group)
        tokens, completions, *aux = counts.clamp(min=1).float().unbind()
        return _Denominators(tokens, completions, tuple(aux))

    def _apply_gradients(self) -> None:
        """Clip the gradients and take Adam's step.

        `optimizer.step()` would prepare the gradients a second time: divide them by the loss scale once more, and count
        the step twice toward the scale's window.
        """
        for part in self.optimizer.chained_optimizers:
            if part.config.clip_grad > 0:
                part.clip_grad_norm(part.config.clip_grad)
        self.optimizer.step_with_ready_grads()

    def _move_average(self) -> None:
        """Move an averaged teacher toward the trained weights, in float32: in bfloat16 small moves would be lost."""
        parameters = dict(self.model.named_parameters())
        for name, average in self.teacher_average.items():
            average.lerp_(parameters[name].detach().float(), 1 - self._ema_decay)

    def _everywhere(self, condition: bool) -> bool:
        flag = torch.tensor(int(condition))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.runtime.cpu_group)
        return bool(flag)

    def _forward_step(
        self, microbatches: Iterator[tuple[PackedBatch, MakeInputs]], model: torch.nn.Module, *, loss: partial
    ) -> tuple[torch.Tensor, partial]:
        packed, inputs = next(microbatches)
        return self._forward(packed, model), partial(loss, packed=packed, inputs=inputs)

    def _loss(
        self,
        hidden_SH: torch.Tensor,
        *,
        packed: PackedBatch,
        inputs: MakeInputs,
        examples: Sequence[TrainExample],
        token_loss: TokenLoss,
        aux_losses: Sequence[AuxLoss],
        denominators: _Denominators,
    ) -> tuple[torch.Tensor, torch.Tensor, list[Metrics]]:
        """Return this micro-batch's share of the global loss: every sum divided by its own global count.

        This is the one place where scales are decided. What comes out only has to be added up over micro-batches
        and data-parallel ranks, which is what `calculate_per_token_loss` makes Megatron's schedule and its
        DistributedDataParallel do (factor 1 each); `_finish_gradients` withholds the token count by which
        Megatron would then divide.
        """
        hidden_TH = hidden_SH.index_select(0, packed.index_T)
        logprobs_T, entropy_T = self._logprobs(hidden_TH, packed)
        known = inputs(logprobs_T=logprobs_T, entropy_T=entropy_T)
        loss_T, metrics = token_loss(known)
        loss, logs = self._normalized(loss_T, known.weights_T, packed, denominators), [metrics]
        weight_WH = output_weight(self.model)
        spans = list(zip(packed.rows, packed.offsets, strict=False))
        for aux, denominator in zip(aux_losses, denominators.aux, strict=True):
            read = [(examples[row], start, aux.positions(examples[row])) for row, start in spans]
            read = [(example, start, positions) for example, start, positions in read if positions]
            if read:
                hidden_KH = torch.cat([hidden_TH[start : start + positions] for _, start, positions in read])
                aux_sum, aux_metrics = aux([example for example, _, _ in read], hidden_KH, weight_WH)
                loss = loss + aux_sum / denominator
                logs.append({f"{aux.area}/{name}": metric for name, metric in aux_metrics.items()})
        logs.append({"loss/total": Sum(loss.detach())})
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), logs

    def _normalized(
        self, loss_T: torch.Tensor, weights_T: torch.Tensor, packed: PackedBatch, counts: _Denominators
    ) -> torch.Tensor:
        """Return this micro-batch's share of the average of the token losses.

        token: over the batch's tokens (paper eq. 2; DAPO). sequence: over each completion's tokens, then over
        completions (GRPO, arXiv 2402.03300). constant: each completion's sum divided by rollout.max_new_tokens, then
        over completions (Dr. GRPO, arXiv 2503.20783). Tokens and completions of weight 0 do not count.
        """
        weighted_T = loss_T * weights_T
        if self._normalization == "token":
            return weighted_T.sum() / counts.tokens
        if self._normalization == "constant":
            return weighted_T.sum() / self._max_new_tokens / counts.completions
        lengths = [end - start for start, end in itertools.pairwise(packed.offsets)]
        parts = zip(weighted_T.split(lengths), weights_T.split(lengths), strict=True)
        means = [losses.sum() / weights.sum().clamp(min=1) for losses, weights in parts]
        return torch.stack(means).sum() / counts.completions

    def _known_inputs(self, examples: Sequence[TrainExample]) -> MakeInputs:
        """Send what is known of a micro-batch's tokens before its forward pass to the device, each once."""
        device = self.runtime.device

        def joined(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            present = [value for value in values if value is not None]
            if not present:
                return None
            assert len(present) == len(values), "some examples were scored, and others were not"
            values_T = torch.cat(present)
            return send(values_T, device) if values_T.device.type == "cpu" else values_T

        def listed(values: Iterable[float]) -> torch.Tensor:
            return send(torch.tensor(list(values)), device)

        sampler = [None if e.sampler_logprobs is None else torch.tensor(e.sampler_logprobs) for e in examples]
        return partial(
            TokenInputs,
            weights_T=listed(weight for e in examples for weight in e.token_weights),
            advantages_T=listed(e.advantage for e in examples for _ in e.token_weights),
            old_logprobs_T=joined([e.old_logprobs for e in examples]),
            reference_logprobs_T=joined([e.reference_logprobs for e in examples]),
            sampler_logprobs_T=joined(sampler),
        )

    # Weights out.

    def weights(self, rounding: Rounding | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over Hugging Face names and full tensors, adapters merged unless disabled; all ranks go in step."""
        return hf_weights(self.model, self.hf, self.runtime, merged=adapters_enabled(self.model), rounding=rounding)

    # What all passes share.

    def _packed(self, sequences: Sequence[TokenSequence]) -> Iterator[PackedBatch]:
        lengths = [len(sequence.tokens) for sequence in sequences]
        for rows in micro_batches(lengths, self._token_budget):
            yield pack(sequences, rows, pad_id=self._pad_id, multiple=self._multiple, device=self.runtime.device)

    def _forward(self, packed: PackedBatch, model: torch.nn.Module | None = None) -> torch.Tensor:
        return hidden_states(model or self.model, packed.tokens_S, packed.bounds, packed.starts)

    def _logprobs(self, hidden_TH: torch.Tensor, packed: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprobs(
            hidden_TH,
            output_weight(self.model),
            packed.token_ids_T,
            temperature=self.temperature,
            group=self.runtime.layout.tensor.group,
            chunk_tokens=self.chunk_tokens,
            vocab_size=self.hf.vocab_size,
        )


def _copy_of_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _trained_in_float32(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().to(torch.float32, copy=True) for name, parameter in trained.items()}


@contextmanager
def _swapped(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Run on `weights`, then restore the current ones bit for bit. In place: Megatron's buffers own the storage."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(current[name])


def _finish_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **kwargs) -> None:
    """Reduce gradients over ranks; losses arrive divided by their global counts, so nothing is divided here."""
    finalize_model_grads(model, None, **kwargs)


def _optimizer(
    model: GPTModel, config: OptimizerConfig, dtype: torch.dtype
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Build Megatron's data-parallel wrapper, and Adam over the trainable parameters."""
    assert model.config.calculate_per_token_loss, "see MegatronPolicy._loss"
    ddp = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.distributed,
            overlap_grad_reduce=False,
            check_for_nan_in_grad=False,  # update() looks at the gradient norm, skips the step and counts it
        ),
        module=model,
    )
    model.config.no_sync_func = ddp.no_sync
    model.config.finalize_model_grads_func = _finish_gradients
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.grad_clip,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            initial_loss_scale=LOSS_SCALE,
            loss_scale_window=LOSS_SCALE_WINDOW,
            hysteresis=1,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
        ),
        [ddp],
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return ddp, optimizer


def _scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Build the learning-rate schedule: linear warm-up, then constant, or cosine to zero at decay_steps."""
    decay_steps = config.decay_steps or config.warmup_steps + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if config.warmup_steps else config.lr,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style="cosine" if config.decay_steps else "constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
    )
