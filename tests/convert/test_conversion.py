"""Exports and imports against transformers, PEFT, vLLM and safetensors; other layouts, damage, full disks, memory."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import runpy
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from nemo_ssopd.checkpoint.checkpoint import LoopState, save_checkpoint
from nemo_ssopd.checkpoint.saved_model import open_checkpoint
from nemo_ssopd.checkpoint.storage import read_index
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig, EngineConfig, LoraConfig, ModelConfig, ParallelConfig
from nemo_ssopd.convert.exporting import HEADER_BYTES, write_safetensors
from nemo_ssopd.convert.launch import export_main, import_main
from nemo_ssopd.convert.verify import Comparison, compare_with_export, trainer_logprobs
from nemo_ssopd.megatron.lora import adapters
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.refit import refit
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.models.family import HFModelConfig, read_hf_config
from nemo_ssopd.types import TokenSequence
from tests.distributed import run_distributed
from tests.megatron.hf_models import load_megatron, save_random_model, tokens_BS

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "assets" / "demo_model")
M_MMAP_THRESHOLD = -3  # of malloc.h
RATE = 5e-6  # of Adam's first step: all of B
ONE, TP2 = ParallelConfig(world_size=1), ParallelConfig(world_size=2, tensor=2)


def done(main: Callable[[], None], *arguments: object, processes: int = 1) -> str:
    """What the command prints."""
    said, error = run_command(main, *arguments, processes=processes)
    assert error is None, error
    return said


def refused(main: Callable[[], None], *arguments: object, largest_file: int = resource.RLIM_INFINITY) -> str:
    """The one line that it ends with."""
    _, error = run_command(main, *arguments, largest_file=largest_file)
    assert isinstance(error, str) and error.startswith("error: ")
    return error


def run_command(
    main: Callable[[], None], *arguments: object, processes: int = 1, largest_file: int = resource.RLIM_INFINITY
) -> tuple[str, str | None]:
    return run_distributed(called, processes, main, list(map(str, arguments)), largest_file)[0]


def called(main: Callable[[], None], arguments: list[str], largest_file: int) -> tuple[str, str | None]:
    """A command in a process of its own: what it prints, and its last words when it does not succeed."""
    sys.argv = [main.__name__, *arguments]
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    with redirect_stdout(io.StringIO()) as said:
        try:
            main()
        except SystemExit as error:
            return said.getvalue(), str(error.code)
    return said.getvalue(), None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints written at tensor-parallel size 2, of adapters with a B that is not zero, or of all weights."""
    folder = tmp_path_factory.mktemp("saved")
    models = {
        "tied": (save_random_model("qwen3_tied", folder / "tied_base"), True, "float32", 0.1),
        "untied, odd vocabulary": (save_random_model("qwen3_odd", folder / "odd_base"), True, "float32", 0.1),
        "demo": (DEMO, True, "float32", 0.1),
        "demo, bfloat16": (DEMO, True, "bfloat16", 0.1),
        "demo, float16": (DEMO, True, "float16", 0.1),
        "one step": (DEMO, True, "float32", RATE),
        "one step, bfloat16": (DEMO, True, "bfloat16", RATE),
        "no step": (DEMO, True, "float32", 0.0),
        "all weights": (save_random_model("qwen2", folder / "qwen2_base"), False, "float32", 0.0),
    }
    configs = {
        name: Config(
            run_dir=str(folder / name),
            model=ModelConfig(path=path, dtype=dtype, recompute=False),
            lora=LoraConfig(enabled=lora, rank=4, alpha=8.0),
            parallel=TP2,
            data=DataConfig(train="train.jsonl"),
        )
        for name, (path, lora, dtype, _) in models.items()
    }
    run_distributed(train_and_save, 2, [(configs[name], size) for name, (*_, size) in models.items()])
    for config in configs.values():
        rows = [
            {"step": 0, "eval/avg_at_n": 0.25},
            {"step": 3, "eval/avg_at_n": 0.5},
            {"step": 4, "eval/avg_at_n": 0.9},
        ]
        Path(config.run_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: Path(config.run_dir) for name, config in configs.items()}


def train_and_save(runs: list[tuple[Config, float]]) -> None:
    runtime = initialize(TP2, seed=1)
    for config, size in runs:
        save_checkpoint(changed_actor(config, runtime, size=size), config, LoopState(step=3))


def changed_actor(config: Config, runtime: Any, *, size: float = 0.1) -> MegatronPolicy:
    """As after training: each rank adds its part of the same random whole, of standard deviation `size`."""
    actor = MegatronPolicy(config, read_hf_config(config.model.path), runtime, pad_id=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters(actor.model):
            axis = adapter.sharded_axis.get("B")
            shape = list(adapter.B.shape)
            if axis is not None:
                shape[axis] *= runtime.layout.tensor.size
            whole = size * torch.randn(shape, generator=generator)
            adapter.B.copy_(
                whole if axis is None else whole.chunk(runtime.layout.tensor.size, axis)[runtime.layout.tensor.rank]
            )
        if not config.lora.enabled:
            for parameter in actor.model.parameters():
                parameter.mul_(1.25)
    return actor


@pytest.mark.parametrize("name", ["tied", "untied, odd vocabulary", "demo, bfloat16", "demo, float16", "all weights"])
def test_merged_export_is_the_trained_model(saved: dict[str, Path], name: str, tmp_path: Path) -> None:
    out, out2 = tmp_path / "out", tmp_path / "out2"
    said = done(export_main, "--checkpoint", saved[name], "--output", out, "--verify")
    shares = {"demo, bfloat16": "99."}
    assert f"verified by transformers: {out} keeps {shares.get(name, '100.00%')}" in said
    done(export_main, "--checkpoint", iteration(saved[name]), "--output", out2, "--verify", processes=2)
    assert (out / "README.md").read_text() == (out2 / "README.md").read_text(), "the share is summed over ranks"
    one, two = load_file(out / "model.safetensors"), load_file(out2 / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert ("lm_head.weight" in one) == (name in ("untied, odd vocabulary", "all weights"))
    dtype = {"demo, bfloat16": torch.bfloat16, "demo, float16": torch.float16}.get(name, torch.float32)
    assert {tensor.dtype for tensor in one.values()} == {dtype}


def test_exported_logits_equal_the_trainers(saved: dict[str, Path], tmp_path: Path) -> None:
    """The check of --verify, once by hand: at TP=2 by the trainer, by transformers and by PEFT."""
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    done(export_main, "--checkpoint", saved["tied"], "--output", merged)
    said = done(export_main, "--checkpoint", saved["tied"], "--output", adapter, "--adapter-only", "--verify")
    assert "verified by PEFT" in said
    trained, _ = run_distributed(logprobs_of, 2, iteration(saved["tied"]))
    tokens = tokens_BS(96)
    base = AutoModelForCausalLM.from_pretrained(saved["tied"].parent / "tied_base")
    with torch.no_grad():
        from_base = base(tokens).logits.log_softmax(-1)
        from_merged = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits.log_softmax(-1)
        from_adapter = peft.PeftModel.from_pretrained(base, adapter)(tokens).logits.log_softmax(-1)
    assert (trained - from_base).abs().mean() > 0.1
    assert (trained - from_merged).abs().max() < 1e-4
    assert (trained - from_adapter).abs().max() < 1e-4


def logprobs_of(checkpoint: Path) -> torch.Tensor:
    runtime = initialize(TP2, seed=1)
    return trainer_logprobs(open_checkpoint(checkpoint, runtime), tokens_BS(96), TP2, runtime).policy


def test_an_export_comes_with_everything_beside_the_weights(saved: dict[str, Path], tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    done(export_main, "--checkpoint", saved["demo"], "--output", out)
    done(export_main, "--checkpoint", saved["demo"], "--output", adapter, "--adapter-only")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == Path(DEMO, name).read_bytes()
    assert (adapter / "tokenizer.json").is_file() and not (adapter / "config.json").exists()
    card = (out / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {DEMO}\nlibrary_name: transformers\n")
    assert "| Avg@n on held-out problems | 0.25 | 0.5 |" in card, "up to the checkpoint's step"
    assert "| trained | LoRA, rank 4, alpha 8 |" in card and "lambda_0: 1.0" in card
    assert "library_name: peft" in (adapter / "README.md").read_text()


def test_vllm_lora_equals_the_trainer(saved: dict[str, Path], tmp_path: Path) -> None:
    """One engine: the exported adapter, then two refits; log-probs of its samples against the trainer's."""
    done(export_main, "--checkpoint", saved["demo"], "--output", tmp_path / "adapter", "--adapter-only")
    [(exported, first, second, base)] = run_distributed(vllm_against_trainer, 1, str(tmp_path / "adapter"), tmp_path)
    assert base > 0.05
    assert max(exported, first, second) < 1e-4


def vllm_against_trainer(adapter: str, run_dir: Path) -> tuple[float, ...]:
    from nemo_ssopd.rollout.engine import LoRARequest, RolloutEngine  # noqa: PLC0415 -- vLLM, for this test alone

    runtime = initialize(ONE, seed=1)
    config = Config(
        run_dir=str(run_dir),
        model=ModelConfig(path=DEMO, dtype="float32", recompute=False),
        lora=LoraConfig(rank=4, alpha=8.0),
        parallel=ONE,
        data=DataConfig(train="train.jsonl"),
    )
    config = replace(config, rollout=replace(config.rollout, refit="adapter", temperature=1.0))
    actor = changed_actor(config, runtime)
    actor.logprobs([TokenSequence((1, 2, 3), 1)])  # the engine must also start where Numba is loaded already
    engine = RolloutEngine(
        DEMO,
        EngineConfig(tensor=1, max_sequences=8, cpu_cache_gib=0.1),
        dtype="float32",
        max_model_len=64,
        seed=1,
        lora_rank=4,
    )

    def differences(version: int) -> float:
        prompts = tokens_BS(30, rows=8, length=12).tolist()
        completions = engine.generate(
            [tuple(p) for p in prompts],
            seeds=list(range(8)),
            temperature=1.0,
            max_new_tokens=24,
            stop_token_ids=(),
        )
        assert {completion.policy_version for completion in completions} == {version}
        trained = actor.logprobs(
            [TokenSequence((*p, *c.tokens), 12) for p, c in zip(prompts, completions, strict=True)]
        )
        sampled = [torch.tensor(completion.logprobs) for completion in completions]
        return float((torch.cat(sampled) - torch.cat(trained)).abs().max())

    base = differences(0)
    engine._adapter = LoRARequest("exported", 1000, adapter)  # by vLLM's own reading of the folder
    exported = differences(0)
    refit(actor, engine, config, policy_version=4)
    first = differences(4)
    with torch.no_grad():
        for each in adapters(actor.model):
            each.B.mul_(-2)
    refit(actor, engine, config, policy_version=5)
    return exported, first, differences(5), base


def iteration(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000003"


def scale_one_matrix(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """One matrix of 16, by 1 %."""
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01


def swap_two_heads(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].roll(weights[name].shape[0] // 4, 0)


def lose_the_update(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    weights.update({name: base[name].to(tensor.dtype) for name, tensor in weights.items()})


def lose_one_projection(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = base[name].to(weights[name].dtype)


@pytest.mark.parametrize("name", ["tied", "untied, odd vocabulary", "demo, bfloat16", "one step"])
def test_verify_finds_what_is_wrong(saved: dict[str, Path], name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(export_main, "--checkpoint", saved[name], "--output", out)
    bases = {"tied": saved[name].parent / "tied_base", "untied, odd vocabulary": saved[name].parent / "odd_base"}
    base = load_file(Path(bases.get(name, DEMO)) / "model.safetensors")
    damages = (scale_one_matrix, swap_two_heads, lose_one_projection, lose_the_update)
    for damage in damages:
        weights = load_file(out / "model.safetensors")
        damage(weights, base)
        copy = shutil.copytree(out, tmp_path / damage.__name__)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    folders = [out, *(tmp_path / damage.__name__ for damage in damages)]
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    [(right, *wrong)] = run_distributed(compare, 1, iteration(saved[name]), folders, dtype)

    assert right.problem() is None and right.is_measurable
    for comparison in wrong:
        assert "is not the trained model" in comparison.problem()
    lost = wrong[-1]
    assert lost.error == pytest.approx(lost.update, rel=0.02) and abs(lost.kept) < 0.02
    assert lost.unexplained > 3 * lost.limit


def compare(checkpoint: Path, outputs: list[Path], dtype: str) -> list[Comparison | None]:
    runtime = initialize(ONE, seed=1)
    saved = open_checkpoint(checkpoint, runtime)
    return [compare_with_export(saved, out, ONE, runtime, is_adapter=False, dtype=dtype) for out in outputs]


def test_what_rounding_costs_is_said(saved: dict[str, Path], tmp_path: Path) -> None:
    """One step at 5e-6 in bfloat16: the export is right, and almost the base. Shares are computed again by hand."""
    name = "one step, bfloat16"
    out, whole, adapter = tmp_path / "out", tmp_path / "whole", tmp_path / "adapter"
    said = done(export_main, "--checkpoint", saved[name], "--output", adapter, "--adapter-only", "--verify")
    assert f"verified by PEFT: {adapter} keeps 100.00%" in said
    assert "nothing was rounded" in (adapter / "README.md").read_text()
    said = done(export_main, "--checkpoint", saved[name], "--output", whole, "--verify", "--dtype", "float32")
    assert f"verified by transformers: {whole} keeps 100." in said
    message = refused(export_main, "--checkpoint", saved[name], "--output", out, "--verify")
    assert "is what rounding makes of the trained model" in message and "--dtype float32" in message

    base = {key: tensor.bfloat16().float() for key, tensor in load_file(Path(DEMO, "model.safetensors")).items()}
    policy, rounded = dict(base), dict(base)
    matrices, dots = load_file(adapter / "adapter_model.safetensors"), torch.zeros(3, dtype=torch.float64)
    for key in [key for key in matrices if "lora_A" in key]:
        projection = key.removeprefix("base_model.model.").replace("lora_A.", "")
        update = 2 * matrices[key.replace("lora_A", "lora_B")].float() @ matrices[key].float()
        policy[projection] = base[projection] + update
        rounded[projection] = policy[projection].bfloat16().float()
        kept = (rounded[projection] - base[projection]).double()
        dots += torch.stack([(update * update).sum(), (kept * update).sum(), (kept - update).square().sum()])
    share, error = float(dots[1] / dots[0]), float(dots[2] / dots[0]) ** 0.5
    assert 0 < share < 0.2
    card = (out / "README.md").read_text()
    assert f"keep {share:.2%} of the adapters' update" in card and f"errors of {error:.2%}" in card
    assert "keep 100.00% of the adapters' update" in (whole / "README.md").read_text()

    exported = load_file(whole / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert max(float((exported[key] - policy[key]).abs().max()) for key in policy) < 1e-8
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    from_base, from_policy, from_rounded = (hf_logprobs(weights) for weights in (base, policy, rounded))
    step = from_policy - from_base
    by_logprobs = float(((from_rounded - from_base) * step).sum() / (step * step).sum())
    [[comparison]] = run_distributed(compare, 1, iteration(saved[name]), [out], "bfloat16")

    assert comparison.kept == pytest.approx(by_logprobs, abs=0.02)
    assert comparison.update == pytest.approx(float(step.square().mean().sqrt()), rel=0.05)


def hf_logprobs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the demo model with other weights, on the tokens of --verify."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    tokens = torch.randint(102, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1).double()


def test_an_update_within_the_noise_is_not_measured(saved: dict[str, Path], tmp_path: Path) -> None:
    said = done(export_main, "--checkpoint", saved["no step"], "--output", tmp_path / "out", "--verify")
    assert "holds an update too small to be seen" in said and "keeps" not in said
    assert "trained in float32 and are written in float32" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_import_and_export_give_the_same_tensors(tmp_path: Path, processes: int) -> None:
    for name in ("qwen3_odd", "llama_odd_tied"):
        base = save_random_model(name, tmp_path / name)
        checkpoint, out = tmp_path / f"{name}-checkpoint", tmp_path / f"{name}-out"
        done(import_main, "--model", base, "--output", checkpoint, processes=processes)
        assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "0"
        check_layout(checkpoint / "iter_0000000", read_hf_config(base))
        done(export_main, "--checkpoint", checkpoint, "--output", out)
        before, after = load_file(Path(base) / "model.safetensors"), load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def check_layout(folder: Path, hf: HFModelConfig) -> None:
    """Files, keys and shapes that Megatron-Bridge's load_megatron_model reads; see docs/nemo.md."""
    model = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]
    assert model["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert (model["num_layers"], model["vocab_size"]) == (hf.num_layers, hf.vocab_size)
    assert model["share_embeddings_and_output_weights"] == hf.tied
    common = torch.load(folder / "common.pt", weights_only=True)
    assert common["content_metadata"]["chained_optim_avoid_prefix"] and common["iteration"] == 0
    entries = read_index(folder).state_dict_metadata
    fused = (hf.num_heads + 2 * hf.num_kv_heads) * hf.head_dim
    shapes = {
        "self_attention.linear_qkv.weight": (fused, hf.hidden_size),
        "self_attention.linear_qkv.layer_norm_weight": (hf.hidden_size,),
        "mlp.linear_fc1.weight": (2 * hf.ffn_hidden_size, hf.hidden_size),
        "mlp.linear_fc1.layer_norm_weight": (hf.hidden_size,),
    }
    for name, shape in shapes.items():
        assert tuple(entries[f"decoder.layers.{name}"].size) == (hf.num_layers, *shape)
    for i in range(hf.num_layers):
        assert f"decoder.layers.self_attention.linear_qkv._extra_state/shard_{i}_{hf.num_layers}" in entries
    assert "decoder.final_layernorm.weight" in entries and ("output_layer.weight" in entries) != hf.tied


def test_what_megatron_saved_is_exported_with_a_base(tmp_path: Path) -> None:
    """By Megatron-Core's own save, with none of our files beside it."""
    base = save_random_model("qwen3_tied", tmp_path / "base")
    run_distributed(save_as_megatron_does, 2, base, tmp_path / "megatron" / "iter_0000007")
    assert "give the Hugging Face directory" in refused(
        export_main, "--checkpoint", tmp_path / "megatron", "--output", tmp_path / "out"
    )
    done(export_main, "--checkpoint", tmp_path / "megatron", "--output", tmp_path / "out", "--base", base, "--verify")
    before, after = load_file(Path(base) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def save_as_megatron_does(base: str, folder: Path) -> None:
    model, _ = load_megatron(base, TP2, initialize(TP2, seed=1))
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))


def test_what_cannot_be_converted_is_refused_in_one_line(saved: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    damaged = shutil.copytree(saved["tied"], tmp_path / "damaged")
    data = next((damaged / "checkpoints" / "iter_0000003").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    other = save_random_model("qwen3_tied", tmp_path / "other")
    weights = load_file(Path(other) / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, Path(other) / "model.safetensors", metadata={"format": "pt"})

    assert "another checksum" in refused(export_main, "--checkpoint", damaged, "--output", out)
    os.truncate(data, 100)
    assert "has 100 bytes" in refused(export_main, "--checkpoint", damaged, "--output", out)
    message = refused(export_main, "--checkpoint", saved["tied"], "--output", out, "--base", other)
    assert "holds other weights" in message
    message = refused(export_main, "--checkpoint", saved["all weights"], "--output", out, "--adapter-only")
    assert "leave --adapter-only out" in message
    message = refused(
        export_main, "--checkpoint", saved["tied"], "--output", out, "--adapter-only", "--dtype", "float32"
    )
    assert "--dtype is for merged weights" in message
    assert "holds something" in refused(export_main, "--checkpoint", saved["tied"], "--output", tmp_path)
    assert not out.exists()


def test_a_full_disk_leaves_no_output(saved: dict[str, Path], tmp_path: Path) -> None:
    out, imported = tmp_path / "out", tmp_path / "imported"
    limit = HEADER_BYTES + 2**10
    message = refused(export_main, "--checkpoint", saved["demo"], "--output", out, largest_file=limit)
    assert "File too large" in message and "make room" in message
    message = refused(import_main, "--model", DEMO, "--output", imported, largest_file=limit)
    assert "could not be written" in message and "Make room" in message
    assert not list(tmp_path.glob("out*")) and not list(imported.glob("*iter*"))


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(40, 25) for i in range(9)} | {"b": torch.randn(3).bfloat16()}
    write_safetensors(tensors.items(), tmp_path, "model", shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        for name, tensor in load_file(tmp_path / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, tensors.pop(name))
    assert not tensors


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of five times the layers, both commands take less than a quarter of what the added layers weigh."""
    peaks = {}
    for layers in (8, 40):
        base = save_layers(tmp_path / f"base{layers}", layers)
        peaks[layers] = [
            peak_bytes("import_hf.py", "--model", base, "--output", tmp_path / f"checkpoint{layers}"),
            peak_bytes(
                "export_hf.py", "--checkpoint", tmp_path / f"checkpoint{layers}", "--output", tmp_path / f"o{layers}"
            ),
        ]
    added = Path(base, "model.safetensors").stat().st_size - (tmp_path / "base8" / "model.safetensors").stat().st_size
    assert added > 200 * 2**20
    for small, large in zip(peaks[8], peaks[40], strict=True):
        assert large - small < added / 4


def save_layers(folder: Path, layers: int) -> Path:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    config = Qwen3Config(vocab_size=512, num_hidden_layers=layers, num_key_value_heads=4, **shape)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def peak_bytes(script: str, *arguments: object) -> int:
    (peak,) = run_distributed(peak_of, 1, [str(ROOT / "scripts" / script), *map(str, arguments)])
    return peak


def peak_of(arguments: list[str]) -> int:
    """Largest anonymous memory of a script: what is mapped from files, the system may drop."""
    # glibc keeps freed blocks of up to 32 MiB for later, which are a few of these matrices and none of an 8B model's.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20) == 1
    peaks, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            status = Path("/proc/self/status").read_text()
            peaks.append(1024 * int(status.split("RssAnon:")[1].split()[0]))

    watching = threading.Thread(target=watch)
    watching.start()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    over.set()
    watching.join()
    return max(peaks)
