"""The memory plan: its counts equal the real Megatron-Core model's, and it refuses what does not fit with a way out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import grpo_loss
from nemo_ssopd.config.run import Config, context_length
from nemo_ssopd.config.sections import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from nemo_ssopd.megatron.model import hidden_states
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.models.family import HFModelConfig, read_hf_config
from nemo_ssopd.types import TokenSequence, TrainExample
from scripts.plan import main
from tests.commands import run_command
from tests.distributed import run_distributed
from tests.megatron.hf_models import save_random_model, tokens_BS
from tests.ops.test_memory import peak_bytes
from tools.counts import adapters, parameters
from tools.memory_plan import GIB, Activations, Machine, load, plan, refusal

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
ON_CPU = Machine(on_cuda=False)
Command = Callable[..., tuple[str, str]]
"""Standard output, and the message that the command exits with."""
LENGTHS = (24, 11, 30, 7)
MODELS = ("qwen3_odd", "qwen2", "llama_odd_tied")
LAYOUTS = {
    "tp1": ParallelConfig(world_size=1),
    "tp2": ParallelConfig(world_size=2, tensor=2),
    "tp2_sequence": ParallelConfig(world_size=2, tensor=2, sequence=True),
    "dp2": ParallelConfig(world_size=2),
}


@dataclass(frozen=True)
class Case:
    """One way to build a policy. Saved bytes are compared in float32, which is what CPU runs train in."""

    path: str
    lora: bool
    recompute: bool
    distributed: bool = True
    dtype: str = "float32"


@dataclass(frozen=True)
class Counted:
    """Of one rank's real model: elements, and bytes that its layers saved for the backward."""

    base: int
    adapters: int
    gradients: int
    moments: int
    main_weights: int
    saved: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    paths = [save_random_model(name, tmp_path_factory.mktemp(name)) for name in MODELS]
    plain = [Case(path, lora, recompute) for path in paths for lora in (True, False) for recompute in (True, False)]
    return [*plain, Case(paths[0], True, True, distributed=False), Case(paths[0], True, True, dtype="bfloat16")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_equal_the_real_models(cases: list[Case], layout: str) -> None:
    parallel = LAYOUTS[layout]
    ranks = run_distributed(count_all, parallel.world_size, cases, parallel)
    dp = parallel.world_size // parallel.tensor
    for number, case in enumerate(cases):
        config, hf = config_of(case, parallel), read_hf_config(case.path)
        trained = adapters(hf, parallel.tensor, 4) if case.lora else parameters(hf, parallel.tensor)
        for counted in (counts[number] for counts in ranks):
            assert counted.base == parameters(hf, parallel.tensor), case
            assert counted.adapters == (trained if case.lora else 0), case
            # Megatron aligns each tensor to 64 elements, and the distributed optimizer pads the end of the buffer.
            assert trained <= counted.gradients <= trained + 64 * 200, case
            if case.dtype == "float32":
                predicted = Activations(config, hf, sum(LENGTHS), max(LENGTHS), on_cuda=False).stored()
                assert counted.saved == predicted, (layout, case)
        # The ranks that share the optimizer's state hold it once together.
        shared = [counts[number] for counts in ranks[:: parallel.tensor]] if case.distributed else [ranks[0][number]]
        assert sum(counted.moments for counted in shared) == 2 * trained, case
        assert sum(counted.main_weights for counted in shared) == (trained if case.dtype == "bfloat16" else 0), case
        rows = plan(config, hf, ON_CPU).phases["update"]
        state_bytes = 4 * sum(counted.moments + counted.main_weights for counted in shared)
        assert rows["optimizer"] * (dp if case.distributed else 1) == state_bytes, case
        assert rows["gradients"] == 4 * trained


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("parallel", ["cpu_tp2", "cpu_dp2"])
def test_the_peak_of_an_update_is_near_what_is_allocated(parallel: str, recompute: bool) -> None:
    """Tensors only, counted. The plan adds up the largest moment from its parts: up to a quarter above what is."""
    overrides = [f"parallel={parallel}", f"model.recompute={recompute}"]
    for counted in run_distributed(update_peak, 2, overrides):
        config, hf = load("tiny_cpu", overrides)
        predicted = plan(config, hf, ON_CPU).phases["update"]["activations"]
        assert 0.75 * predicted <= counted <= 1.05 * predicted, (counted, predicted)


def test_the_8b_config_by_hand() -> None:
    """Qwen3 8B at tensor-parallel size 2 with sequence parallelism, on four data-parallel ranks."""
    config, hf = load("qwen3_8b_tp2", [])
    memory = plan(config, hf, Machine())
    update, rollout = memory.phases["update"], memory.phases["rollout"]
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288
    replicated = 36 * (2 * 4096 + 2 * 128) + 4096
    base = (2 * 151936 * 4096 + 36 * layer) // 2 + replicated
    adapted = 36 * 64 * ((4096 + 2048) + 2 * (4096 + 512) + (2048 + 4096) + 2 * (4096 + 6144) + (6144 + 4096))
    assert update["parameters"] == 2 * base and update["adapters"] == 2 * adapted
    assert update["gradients"] == 4 * adapted and update["optimizer"] == 12 * adapted / 4
    assert update["teacher states"] == 8 * 1024 * 4096 * 2
    assert rollout["engine weights"] == 2 * base
    assert memory.kv_bytes_per_token == 2 * 36 * 4 * 128 * 2
    engine = sum(rollout[row] for row in ("engine weights", "engine workspace", "KV cache"))
    assert engine == pytest.approx(0.45 * 80 * GIB)
    assert "engine weights" not in update and "engine weights" in memory.phases["refit"]
    # Recomputation keeps 36 layer inputs of 32768 tokens, half of each on a rank.
    student = Activations(config, hf, 32768, context_length(config), on_cuda=True)
    angles, final_norm = 4 * 18048 * 128, 32768 * (4096 * 2 + 4) / 2
    assert student.stored() == 36 * 32768 * 4096 * 2 / 2 + angles + final_norm


def test_the_script_runs_by_itself() -> None:
    done = run_command("scripts/plan.py", "--config-name", "tiny_cpu", "--cpu")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "On one rank: parameters 154,752, adapters 47,104." in done.stdout


@pytest.mark.parametrize("name", ["qwen3_1p7b_tp1", "qwen3_4b_tp1", "qwen3_8b_tp2"])
def test_the_command_accepts_every_shipped_gpu_config(name: str, command: Command) -> None:
    output, error = command("--config-name", name)
    assert not error
    assert name in output and "KV cache" in output and "total" in output
    memory = plan(*load(name, []), Machine())
    totals = " | ".join(f"{memory.total(phase) / GIB:.1f}" for phase in memory.phases)
    documented = (ROOT / "docs" / "gpu.md").read_text()
    assert f"| `{name}` | {totals} | {memory.kv_tokens:,} | {sum(memory.host.values()) / GIB:.1f} |" in documented


def test_the_command_refuses_with_a_way_out_that_works(command: Command) -> None:
    crowded = ("--config-name", "qwen3_8b_tp2", "--gpu-memory-gib", "40", "engine.gpu_memory_utilization=0.7")
    _, error = command(*crowded)
    assert "does not fit: rollout needs" in error and "38.0 GiB usable" in error
    remedy = error.split("alone would fit: ")[1].split(";")[0].split()
    assert remedy == ["engine.gpu_memory_utilization=0.65"]
    assert command(*crowded[:-1], *remedy)[1] == ""
    _, error = command("--config-name", "qwen3_8b_tp2", "trainer.tokens=3")
    assert error.startswith("error: ") and "trainer" in error


def test_each_kind_of_excess_is_named() -> None:
    config, hf = load("qwen3_8b_tp2", ["model.recompute=false"])
    message = refusal(config, hf, Machine())
    assert message and message.startswith("update needs") and "activations" in message
    assert "model.recompute=true" in message and "trainer.token_budget=18048" in message
    config, hf = load("qwen3_8b_tp2", ["engine.gpu_memory_utilization=0.1"])
    message = refusal(config, hf, Machine())
    assert message and "cache holds 0 tokens, less than one request of 40960" in message
    config, hf = load("qwen3_8b_tp2", [])
    assert refusal(config, hf, Machine()) is None
    assert "No single change would fit" in (refusal(config, hf, Machine(memory_gib=4)) or "")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run scripts/plan.py in this process."""

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        try:
            main()
        except SystemExit as end:
            return capsys.readouterr().out, str(end.code)
        return capsys.readouterr().out, ""

    return run


# --- what runs in the workers ----------------------------------------------------------------------------------------


def config_of(case: Case, parallel: ParallelConfig) -> Config:
    return Config(
        run_dir="unused",
        model=ModelConfig(path=case.path, dtype=case.dtype, recompute=case.recompute),
        lora=LoraConfig(enabled=case.lora, rank=4),
        parallel=parallel,
        optimizer=OptimizerConfig(distributed=case.distributed),
    )


def count_all(cases: list[Case], parallel: ParallelConfig) -> list[Counted]:
    runtime = initialize(parallel, seed=1)
    counted = []
    for case in cases:
        hf = read_hf_config(case.path)
        actor = MegatronPolicy(config_of(case, parallel), hf, runtime, pad_id=0)
        saved = saved_bytes(actor.model, hf)
        for parameter in actor.model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(1.0)
        actor.optimizer.step()  # Adam makes its state at its first step
        sizes = {name: parameter.numel() for name, parameter in actor.model.named_parameters()}
        states = [optimizer.optimizer.state for optimizer in actor.optimizer.chained_optimizers]
        main = [weight for state in states for weight in state]
        moments = [values[key] for state in states for values in state.values() for key in ("exp_avg", "exp_avg_sq")]
        counted.append(
            Counted(
                base=sum(size for name, size in sizes.items() if ".lora_" not in name),
                adapters=sum(size for name, size in sizes.items() if ".lora_" in name),
                gradients=sum(buffer.grad_data.numel() for buffer in actor._ddp.buffers),
                moments=sum(moment.numel() for moment in moments),
                main_weights=sum(weight.numel() for weight in main) if case.dtype == "bfloat16" else 0,
                saved=saved,
            )
        )
    return counted


def saved_bytes(model: torch.nn.Module, hf: HFModelConfig) -> int:
    """Every storage that a forward keeps for the backward, once, parameters and token indices aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.dtype != torch.int64:
            sizes[storage.data_ptr()] = (tensor, storage.nbytes())  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model, tokens_BS(hf.vocab_size, rows=1, length=sum(LENGTHS))[0], (0, *accumulate(LENGTHS)))
    return sum(size for _, size in sizes.values())


def update_peak(overrides: list[str]) -> int:
    """Bytes that the second update of the run's largest micro-batch allocates at most, above what stays."""
    config, hf = load("tiny_cpu", overrides)
    runtime = initialize(config.parallel, seed=1)
    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    length, prompt = context_length(config), config.rollout.max_prompt_tokens
    count = config.trainer.prompts_per_step * 8 // runtime.layout.data.size
    whole, rest = divmod(min(config.trainer.token_budget, count * length), length)
    lengths = (length,) * whole + ((rest,) if rest else ())
    sequences = [TokenSequence((3,) * length, min(prompt, length)) for length in lengths]
    examples = [TrainExample(s, (1.0,) * s.completion_length, group=0, advantage=1.0) for s in sequences]
    loss = partial(grpo_loss, clip=RatioClip(0.2, 0.2), reference_kl=0.0)
    actor.update(examples, loss)  # Adam makes its state
    return peak_bytes(lambda: actor.update(examples, loss))
