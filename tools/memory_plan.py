"""Predict the memory of a run on each GPU from its config: the contents of each phase of a step, and whether it fits.

    memory = plan(config, hf, Machine(memory_gib=80))
    memory.phases["update"]["optimizer"]        # bytes
    refusal(config, hf, machine)                # None, or a text: what is too large, which overrides would fit

Parameters and adapters are counted in the model itself (`counts`). Gradients and optimizer state follow from them. The
activations of the CPU's layers are exact formulas: tests/tools/test_plan.py compares them with the real model. The
memory of Transformer Engine, vLLM and CUDA was read from their sources or assumed, and was not measured. The
assumptions are the fields of `Machine`.

Symbols, all on one rank: N tokens of a micro-batch, H hidden size, Q and KV the widths of its query and key (or value)
heads, F its share of the MLP width, W its share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from nemo_ssopd.config.compose import as_dataclasses, compose_run
from nemo_ssopd.config.run import Config, check_numbers, context_length, engine_tensor
from nemo_ssopd.models.family import HFModelConfig, read_hf_config
from tools.counts import adapters, parameters

SHAPES = Path(__file__).parents[1] / "assets" / "model_shapes"
GIB = 2**30
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Rows = dict[str, float]
"""Name of a content, such as the optimizer -> bytes."""
Overrides = dict[str, str | float]
"""KEY -> VALUE of overrides, as on the command line."""


@dataclass(frozen=True)
class Machine:
    """The machine of one rank, and assumptions about its libraries (ours; not measured)."""

    memory_gib: float = 80.0
    """GiB of one GPU; without CUDA, of one process."""
    on_cuda: bool = True
    """True: Transformer Engine layers. False: Megatron's local layers with torch's attention."""
    reserve: float = 0.05
    """Share of the memory that the allocator loses to fragmentation."""
    context_gib: float = 1.0
    """GiB of the CUDA context, loaded kernels, cuBLAS and cuDNN workspaces."""
    nccl_gib: float = 1.0
    """GiB of buffers of the tensor- and data-parallel communicators, of trainer and engine."""
    cuda_graphs_gib: float = 1.0
    """GiB of vLLM's captured graphs; they stay while the engine sleeps."""
    engine_batch_tokens: int = 16384
    """Most tokens of one engine step: vLLM's default for offline use on GPUs of 70 GiB and more."""


@dataclass(frozen=True)
class Widths:
    """The symbols of this module, for one tensor-parallel size."""

    hf: HFModelConfig
    tensor: int

    @property
    def Q(self) -> int:
        return self.hf.num_heads * self.hf.head_dim // self.tensor

    @property
    def KV(self) -> int:
        return max(1, self.hf.num_kv_heads // self.tensor) * self.hf.head_dim

    @property
    def F(self) -> int:
        return self.hf.ffn_hidden_size // self.tensor

    @property
    def W(self) -> int:
        return -(-self.hf.vocab_size // self.tensor)


def load(name: str, overrides: Sequence[str]) -> tuple[Config, HFModelConfig]:
    """Load a run's config and its model's shape; weights are not needed. ValueError for a config that cannot work.

    If the folder that model.path names does not exist, the shape comes from assets/model_shapes/NAME, NAME being its
    last part.
    """
    config = as_dataclasses(compose_run(name, overrides))
    path = Path(config.model.path)
    shape = SHAPES / path.name
    hf = read_hf_config(shape if not path.exists() and shape.exists() else path)
    check_numbers(config, hf)
    return config, hf


# ---- Activations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one micro-batch on one rank, derived from the layers that `megatron/model.py` builds."""

    config: Config
    hf: HFModelConfig
    tokens: int
    longest: int
    """Tokens of the longest sequence in the micro-batch."""
    on_cuda: bool

    @cached_property
    def w(self) -> Widths:
        return Widths(self.hf, self.config.parallel.tensor)

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.config.model.dtype]

    @property
    def sequence_shards(self) -> int:
        return self.config.parallel.tensor if self.config.parallel.sequence else 1

    def residual(self) -> float:
        """Return the bytes of one copy of the hidden states between layers, [N, H]; sequence parallelism splits it."""
        return self.tokens * self.hf.hidden_size * self.width / self.sequence_shards

    def norm(self) -> float:
        """Return the bytes that RMSNorm keeps: input and 1 / rms. Torch's also keeps x / rms to train the weight."""
        keeps_normalised = not self.config.lora.enabled and not self.on_cuda
        return self.residual() * (1 + keeps_normalised) + 4 * self.tokens / self.sequence_shards

    def attention(self) -> float:
        """Return the bytes that attention keeps, from the fused projection to the input of the output projection."""
        N, Q, KV = self.tokens, self.w.Q, self.w.KV
        # q, k, v of flash attention (v inside the fused projection's output), its output and log-sum-exp.
        elements = (Q + 2 * KV) + Q + KV + Q
        other: float = 4 * N * Q / self.hf.head_dim
        if not self.on_cuda:
            elements += Q  # the sequences' outputs, joined
        if self.hf.family.megatron(self.hf)["qk_layernorm"]:
            elements += Q + (KV if self.on_cuda else 0)  # on CPU the key's input is inside the projection's output too
            elements += 0 if self.on_cuda or self.config.lora.enabled else Q + KV
            other += 4 * N * (Q + KV) / self.hf.head_dim
        rotary = 4 * N * self.hf.head_dim * self.width  # sine and cosine, each for q and for k
        return N * elements * self.width + other + rotary

    def adapters(self) -> float:
        """Return the bytes of the products A x.

        Those of column-parallel projections (q, k, v, gate, up) are whole on each rank; sequence parallelism splits the
        others.
        """
        if not self.config.lora.enabled:
            return 0.0
        axes = [weight.kind.axis for weight in self.hf.family.layer if weight.adapter]
        products = axes.count(0) + axes.count(1) / self.sequence_shards
        return self.tokens * self.config.lora.rank * products * self.width

    def mlp(self) -> float:
        """Return the bytes that the MLP keeps.

        These are gate and up together, silu(gate), up plus its offset, and their product, which the last projection
        reads. On CUDA, Megatron's fused SwiGLU keeps only the first and the last.
        """
        return self.tokens * (3 if self.on_cuda else 5) * self.w.F * self.width

    def layer(self) -> float:
        """Return the bytes that one layer saves for its backward pass, the outputs of its norms included."""
        return 2 * (self.norm() + self.residual()) + self.attention() + self.adapters() + self.mlp()

    def stored(self) -> float:
        """Return the bytes that all layers keep from forward to backward.

        Recomputation keeps each layer's input (Chen et al. 2016), and one table of rotary angles for all layers.
        """
        trained_shard = not self.config.lora.enabled and self.config.parallel.tensor > 1
        mask = self.tokens if trained_shard else 0  # of tokens whose embedding rows are on another rank
        if not self.config.model.recompute:
            return self.hf.num_layers * self.layer() + self.norm() + mask
        angles = 4 * self.longest * self.hf.head_dim
        return self.hf.num_layers * self.residual() + angles + self.norm() + mask

    def working_set(self) -> float:
        """Return the bytes needed in addition to `stored` while one layer is recomputed and differentiated.

        These are the layer and the gradients of its MLP. Sequence parallelism gathers the whole sequence before each
        column-parallel projection.
        """
        recomputed = self.layer() if self.config.model.recompute else 0.0
        mlp = 3 * self.tokens * self.w.F * self.width
        gathered = self.residual() * self.sequence_shards if self.sequence_shards > 1 else 0.0
        return recomputed + mlp + 2 * self.residual() + gathered

    def without_gradient(self) -> float:
        """Return the bytes of scoring and of the teacher's pass: one layer at its widest point, and nothing kept."""
        mlp = 8 * self.tokens * self.w.F * self.width  # output, adapters' outputs, both joined, and their sum
        gathered = self.residual() * self.sequence_shards
        return mlp + 2 * self.residual() + gathered

    def hidden(self) -> float:
        """Return the bytes of one copy of the final hidden states, [N, H], which every rank holds whole."""
        return self.tokens * self.hf.hidden_size * self.width

    def logits(self) -> float:
        """Return the bytes of one chunk of logits: the student's, and with distillation the teacher's too.

        Gradients are written in place. The output layer's own gradient, if it is trained, is summed in float32.
        """
        chunk = min(self.config.trainer.chunk_tokens, self.tokens)
        models = 2 if self.config.algorithm.distills else 1
        trained = 0 if self.config.lora.enabled else self.w.W * self.hf.hidden_size * (4 + self.width)
        return models * chunk * self.w.W * self.width + trained

    def update(self) -> float:
        """Return the bytes of the update, the larger of two moments.

        The loss: hidden states, those of completions, their gradient, a chunk of logits. The last layer's backward
        pass: hidden states, and the gradient on its way back to them.
        """
        loss = 3 * self.hidden() + self.logits()
        last_layer = 3 * self.hidden() + self.working_set()
        return self.stored() + max(loss, last_layer)


# ---- The plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank: phase of a step -> content -> bytes; and the capacity of the engine's KV cache."""

    phases: dict[str, Rows]
    usable: float
    """Bytes that may be in use: the memory minus the reserve."""
    kv_bytes_per_token: float
    kv_tokens: int
    """Tokens that an engine's cache holds; negative when the engine's weights alone exceed its share."""
    longest_request: int
    """Tokens of the longest sequence that the engine must be able to hold."""
    host: Rows
    """Bytes of host memory that the sleeping engine takes, by content; Python itself is not counted."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def too_large(self) -> list[str]:
        """Return the phases that exceed the usable memory."""
        return [phase for phase in self.phases if self.total(phase) > self.usable]

    @property
    def cache_too_small(self) -> bool:
        return self.kv_tokens < self.longest_request

    @property
    def fits(self) -> bool:
        return not self.too_large and not self.cache_too_small


def plan(config: Config, hf: HFModelConfig, machine: Machine) -> MemoryPlan:
    """Plan the memory of one rank: `rollout` with the engine awake, `teacher` and `update` with it asleep, `refit`."""
    width, tensor, dp = DTYPE_BYTES[config.model.dtype], config.parallel.tensor, config.parallel.data
    static = _static(config, hf, machine)
    engine = _engine(config, hf, machine)
    student = _largest_micro_batch(config, hf, context_length(config), machine)
    teacher = _largest_micro_batch(config, hf, _teacher_length(config, hf), machine)
    asleep = {"CUDA graphs": machine.cuda_graphs_gib * GIB} if machine.on_cuda else engine
    update_prompts = config.trainer.prompts_per_step // (dp * config.trainer.updates_per_step)
    states: Rows = {}
    if config.algorithm.distills:  # upper bound: every group mixed, every prefix K long
        prefix = min(config.algorithm.prefix_tokens, config.rollout.max_new_tokens)
        group = config.rollout.group_size
        distilled = {"wrong": 1, "every_wrong": group - 1, "every": group}[config.algorithm.distilled]
        distilled *= 2 if config.algorithm.contrast > 0 else 1  # states of the contrast teacher
        states = {"teacher states": update_prompts * distilled * prefix * hf.hidden_size * width}
    current = {} if config.lora.enabled else {"current weights": parameters(hf, tensor) * width}
    kv_bytes = 2 * hf.num_layers * Widths(hf, engine_tensor(config)).KV * width
    new_tokens = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens if config.data.eval else 0)
    awake = {"engine weights": engine["engine weights"]} if machine.on_cuda else {}
    keeps = config.rollout.refit == "adapter"  # otherwise the sleeping engine drops its weights
    return MemoryPlan(
        phases={
            "rollout": {**static, **asleep, **engine},
            "teacher": {**static, **asleep, **current, **states, "activations": teacher.without_gradient()},
            "update": {**static, **asleep, **states, "activations": student.update()},
            "refit": {**static, **asleep, **awake, "refit buffers": _refit(config, hf, machine)},
        },
        usable=machine.memory_gib * GIB * (1 - machine.reserve),
        kv_bytes_per_token=kv_bytes,
        kv_tokens=int(engine["KV cache"] // kv_bytes),
        longest_request=config.rollout.max_prompt_tokens + new_tokens,
        host={"engine weights, asleep": engine["engine weights"]} if machine.on_cuda and keeps else {},
    )


def _static(config: Config, hf: HFModelConfig, machine: Machine) -> Rows:
    """Return the bytes that stay for the whole run: weights, fp32 gradients and optimizer state.

    The optimizer state is Adam's two fp32 moments and, unless weights are float32, fp32 weights. The distributed
    optimizer splits it over the data-parallel ranks (ZeRO, Rajbhandari et al. 2020).
    """
    width, tensor = DTYPE_BYTES[config.model.dtype], config.parallel.tensor
    base = parameters(hf, tensor)
    added = adapters(hf, tensor, config.lora.rank) if config.lora.enabled else 0
    trained = added or base
    optimizer = trained * (8 if width == 4 else 12)
    rows: Rows = {"parameters": base * width}
    rows |= {"adapters": added * width} if added else {"initial weights": base * width}
    rows |= {
        "gradients": trained * 4,
        "optimizer": optimizer / config.parallel.data if config.optimizer.distributed else optimizer,
    }
    if config.algorithm.teacher == "ema":
        rows["teacher average"] = trained * 4
    if machine.on_cuda:
        rows["CUDA context, NCCL"] = (machine.context_gib + machine.nccl_gib) * GIB
    return rows


def _engine(config: Config, hf: HFModelConfig, machine: Machine) -> Rows:
    """Return the bytes of vLLM while awake.

    On CUDA it takes its share of the whole GPU: weights, the workspace of a step, and the rest as KV cache. On CPU its
    linear layers keep a copy packed for oneDNN.
    """
    tensor, width = engine_tensor(config), DTYPE_BYTES[config.model.dtype]
    weights: float = parameters(hf, tensor) * width
    if not machine.on_cuda:
        return {"engine weights": 2 * weights, "KV cache": config.engine.cpu_cache_gib * GIB}
    w = Widths(hf, tensor)
    # The widest layer of a full step; the sampler's float32 logits and log-probabilities.
    workspace = machine.engine_batch_tokens * (2 * hf.hidden_size + 3 * w.F) * width
    workspace += 2 * config.engine.max_sequences * hf.vocab_size * 4
    cache = config.engine.gpu_memory_utilization * machine.memory_gib * GIB - weights - workspace
    return {"engine weights": weights, "engine workspace": workspace, "KV cache": cache}


def engine_cache(config: Config, hf: HFModelConfig, machine: Machine) -> int:
    """Return the bytes of the engine's KV cache."""
    return int(_engine(config, hf, machine)["KV cache"])


def _refit(config: Config, hf: HFModelConfig, machine: Machine) -> float:
    """Return the bytes of the largest weight during a refit.

    It is gathered over the tensor-parallel ranks (its shards, then joined), buffered by vLLM until its layer is
    complete, then copied into the engine's layout (on CPU also packed). Merging is in float32.
    """
    width, tensor = DTYPE_BYTES[config.model.dtype], config.parallel.tensor
    copies = 2 if tensor > 1 else 0
    in_engine = (1 if machine.on_cuda else 2) / engine_tensor(config)
    embedding = hf.vocab_size * hf.hidden_size
    gate_up = 2 * hf.hidden_size * hf.ffn_hidden_size
    merge = 3 * 4 * hf.hidden_size * hf.ffn_hidden_size / tensor if config.lora.enabled else 0.0
    return max(
        embedding * width * (copies + in_engine),
        gate_up * width * (max(copies, 1) + in_engine) + merge,
    )


def _largest_micro_batch(config: Config, hf: HFModelConfig, longest: int, machine: Machine) -> Activations:
    """Return the largest micro-batch: the whole token budget, or one longer sequence, never over all of a rank's."""
    group = 1 if config.algorithm.name == "sft" else config.rollout.group_size
    sequences = config.trainer.prompts_per_step * group // (config.parallel.data * config.trainer.updates_per_step)
    tokens = min(max(config.trainer.token_budget, longest), sequences * longest)
    return Activations(config, hf, tokens, longest, machine.on_cuda)


def _teacher_length(config: Config, hf: HFModelConfig) -> int:
    """Return the longest teacher context in tokens: problem, witness and prefix. Longer ones are dropped."""
    return min(context_length(config) + config.algorithm.prefix_tokens, hf.max_position_embeddings)


# ---- Refusal ---------------------------------------------------------------------------------------------------------


def refusal(config: Config, hf: HFModelConfig, machine: Machine) -> str | None:
    """Return None for a layout that fits; else a text with phase, size, largest part, and overrides that would fit."""
    memory = plan(config, hf, machine)
    if memory.fits:
        return None
    problems = []
    for phase in memory.too_large:
        largest = max(memory.phases[phase], key=lambda row: memory.phases[phase][row])
        problems.append(
            f"{phase} needs {memory.total(phase) / GIB:.1f} GiB of {memory.usable / GIB:.1f} GiB usable, "
            f"{memory.phases[phase][largest] / GIB:.1f} GiB of it {largest}"
        )
    if memory.cache_too_small:
        problems.append(
            f"the engine's cache holds {max(0, memory.kv_tokens)} tokens, "
            f"less than one request of {memory.longest_request}"
        )
    helping = [next(filter(partial(_helps, config, hf, machine), ladder), None) for ladder in _remedies(config)]
    remedies = [" ".join(f"{name}={value}" for name, value in found.items()) for found in helping if found]
    advice = (
        f"Each of these alone would fit: {'; '.join(remedies)}"
        if remedies
        else "No single change would fit: raise parallel.tensor on more GPUs and shorten the sequences"
    )
    return f"{'; '.join(problems)}. {advice}"


def _remedies(config: Config) -> Iterator[list[Overrides]]:
    """Yield kinds of change, the cheapest in speed first; within a kind, the smallest change first."""
    share = round(config.engine.gpu_memory_utilization * 20)
    yield [{"optimizer.distributed": "true"}]
    yield [{"parallel.sequence": "true"}]
    yield [{"engine.gpu_memory_utilization": twentieths / 20} for twentieths in range(share - 1, 0, -1)]
    yield [{"engine.gpu_memory_utilization": twentieths / 20} for twentieths in range(share + 1, 20)]
    if config.trainer.token_budget > context_length(config):
        yield [{"trainer.token_budget": context_length(config)}]
    yield [{"model.recompute": "true"}]
    yield [
        {"parallel.tensor": tensor, "parallel.sequence": "true"}
        for tensor in (2, 4, 8, 16)
        if tensor > config.parallel.tensor
    ]
    yield [{"lora.enabled": "true"}]


def _helps(config: Config, hf: HFModelConfig, machine: Machine, overrides: Overrides) -> bool:
    changed = config
    for name, value in overrides.items():
        section, key = name.split(".")
        changed = replace(changed, **{section: replace(getattr(changed, section), **{key: value == "true" or value})})
    try:
        check_numbers(changed, hf)
    except ValueError:
        return False
    return plan(changed, hf, machine).fits
