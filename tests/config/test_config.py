"""Every shipped config composes and checks; what cannot work is refused with the field, the value and the remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import MISMATCH_BOUNDS, Config, from_hydra, importance_cap, max_logprob_mismatch
from nemo_ssopd.config.sections import Dtype, ModelConfig, TrainerConfig

CONF = Path(__file__).parents[2] / "conf"
RUNS = sorted(path.stem for path in CONF.glob("*.yaml"))

# config.json of the models that the shipped configs name, reduced to what the checks read.
HF_CONFIGS = {
    "qwen3_1p7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
    "qwen3_4b": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32},
    "qwen3_8b": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32},
}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, list(overrides))


def qwen3(folder: Path, **fields: object) -> Path:
    """A directory that looks like a Qwen3 model to every check."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **HF_CONFIGS["qwen3_1p7b"],
        **fields,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_config_is_valid(name: str, tmp_path: Path) -> None:
    fields = next((fields for key, fields in HF_CONFIGS.items() if name.startswith(key)), None)
    if fields is None:
        fields = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 128,
            "max_position_embeddings": 2048,
        }
    config = from_hydra(composed(name, f"model.path={qwen3(tmp_path / 'model', **fields)}"))
    assert isinstance(config, Config)
    assert config.run_dir == f"runs/{name}"


def test_the_8b_config_is_the_layout_of_one_node(tmp_path: Path) -> None:
    model = qwen3(tmp_path / "model", **HF_CONFIGS["qwen3_8b"])
    config = from_hydra(composed("qwen3_8b_tp2", f"model.path={model}"))
    assert (config.parallel.world_size, config.parallel.tensor, config.parallel.sequence) == (8, 2, True)
    assert (config.model.dtype, config.lora.rank, config.lora.alpha) == ("bfloat16", 64, 128.0)
    assert (config.algorithm.kl_clip, config.algorithm.prefix_tokens, config.algorithm.lambda_0) == (0.05, 1024, 1.0)


def test_the_paper_s_runs_differ_in_their_recipe_alone(tmp_path: Path) -> None:
    """Four recipes on three models: one file each, and nothing else in it."""
    for size in ("qwen3_1p7b_tp1", "qwen3_4b_tp1", "qwen3_8b_tp2"):
        model = f"model.path={qwen3(tmp_path / size, **HF_CONFIGS[size.rpartition('_')[0]])}"
        ssopd = from_hydra(composed(size, model))
        for recipe in ("grpo", "opsd", "sft"):
            config = from_hydra(composed(f"{size}_{recipe}", model))
            assert config.algorithm.name == recipe
            assert replace(config, algorithm=ssopd.algorithm, run_dir=ssopd.run_dir) == ssopd
            override = from_hydra(composed(size, model, f"algorithm={recipe}"))
            assert override.algorithm == config.algorithm
    assert (ssopd.algorithm.name, ssopd.algorithm.witness, ssopd.algorithm.distilled) == ("ssopd", "own", "wrong")


def test_opsd_reads_the_reference_solution_on_every_rollout(tmp_path: Path) -> None:
    config = from_hydra(composed("tiny_cpu", f"model.path={qwen3(tmp_path / 'model')}", "algorithm=opsd"))
    algorithm = config.algorithm
    assert (algorithm.name, algorithm.witness, algorithm.distilled, algorithm.frontier) == (
        "opsd",
        "solution",
        "every",
        "fixed",
    )
    assert not algorithm.rewards and algorithm.distills


def test_the_stable_overrides_reach_their_fields(tmp_path: Path) -> None:
    overrides = {
        "trainer.max_steps": 7,
        "trainer.seed": 3,
        "run_dir": "elsewhere",
        "parallel.tensor": 1,
        "model.path": str(qwen3(tmp_path / "model")),
        "data.train": "demo:products",
        "data.eval": "demo:products?split=eval",
        "algorithm.lambda_0": 0.5,
        "algorithm.kl_clip": 0.1,
        "algorithm.prefix_tokens": 9,
        "rollout.group_size": 4,
        "reward.function": "rewards.mine:grade",
        "reward.threshold": 0.9,
        "verifier.workers": 2,
        "verifier.timeout_s": 7.0,
        "verifier.cpu_s": 3.0,
        "verifier.memory_gb": 2.0,
    }
    config = from_hydra(
        composed("tiny_cpu", "algorithm=grpo", *(f"{key}='{value}'" for key, value in overrides.items()))
    )
    assert config.algorithm.name == "grpo"
    tree = OmegaConf.structured(config)
    assert {key: OmegaConf.select(tree, key) for key in overrides} == overrides


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.world_size=3"], ("parallel.world_size=3", "parallel.tensor=2", "multiple")),
        (["parallel.tensor=16", "parallel.world_size=16"], ("parallel.tensor=16", "8 key-value heads")),
        (["rollout.max_new_tokens=60000"], ("rollout.max_new_tokens", "60000", "40960", "lower")),
        (["evaluation.max_new_tokens=60000"], ("evaluation.max_new_tokens", "lower")),
        (["rollout.group_size=1"], ("rollout.group_size=1", "at least 2")),
        (["engine.tensor=3"], ("engine.tensor=3", "divisor")),
        (["trainer.prompts_per_step=3", "parallel.tensor=1"], ("trainer.prompts_per_step=3", "data-parallel")),
        (["algorithm.kl_clip=0"], ("algorithm.kl_clip=0", "above 0")),
        (["algorithm.ratio_clip_dual=0.5"], ("algorithm.ratio_clip_dual=0.5", "above 1")),
        (["algorithm.ema_decay=1"], ("algorithm.ema_decay=1", "below 1")),
        (["algorithm.overlong_buffer=200"], ("algorithm.overlong_buffer=200", "rollout.max_new_tokens=112")),
        (["data.teacher_template=hello"], ("data.teacher_template", "{problem}")),
        (["data.train=missing.jsonl"], ("data.train='missing.jsonl'", "does not exist")),
        (["reward.function=grade"], ("reward.function='grade'", "package.module:name")),
        (["reward.function='rewards.py:grade'"], ("reward.function='rewards.py:grade'", "package.module:name")),
        (["reward.function='my-rewards:grade'"], ("reward.function='my-rewards:grade'", "package.module:name")),
        (["reward.function='rewards:'"], ("reward.function='rewards:'", "package.module:name")),
        (["reward.threshold=-0.1"], ("reward.threshold=-0.1", "at least 0")),
        (["reward.threshold=nan"], ("reward.threshold=nan", "at least 0")),
        (["verifier.cpu_s=0"], ("verifier.cpu_s=0", "above 0")),
        (["run_dir=???"], ("run_dir", "not set")),
        (["trainer.profile_steps=[3,0]"], ("trainer.profile_steps has 0", "from 1 to trainer.max_steps=40")),
        (["trainer.profile_steps=[41]"], ("trainer.profile_steps has 41", "trainer.max_steps=40")),
        (
            ["trainer.deterministic=true", "rollout.refit=adapter"],
            ("trainer.deterministic=true", "rollout.refit=merged"),
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        from_hydra(composed("tiny_cpu", f"model.path={qwen3(tmp_path / 'model')}", *overrides))
    for word in words:
        assert word in str(error.value)


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.*has no config.json"):
        from_hydra(composed("tiny_cpu", f"model.path={tmp_path / 'nowhere'}"))


def test_a_model_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = qwen3(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no .safetensors"):
        from_hydra(composed("tiny_cpu", f"model.path={folder}"))


@pytest.mark.parametrize("override", ["algorithm.lamda_0=1", "trainer.max_steps=many", "algoritm=grpo"])
def test_unknown_keys_and_wrong_types_are_refused(override: str) -> None:
    with pytest.raises(HydraException):
        composed("tiny_cpu", override)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [("algorithm.witness=mine", "own, solution, shuffled, none"), ("model.dtype=int4", "bfloat16, float16, float32")],
)
def test_a_choice_that_does_not_exist_names_those_that_do(override: str, allowed: str) -> None:
    with pytest.raises(HydraException) as error:
        composed("tiny_cpu", override)
    assert override.partition("=")[0] in str(error.value) and allowed in str(error.value.__cause__)


def test_configs_are_frozen(tmp_path: Path) -> None:
    config = from_hydra(composed("tiny_cpu", f"model.path={qwen3(tmp_path / 'model')}"))
    assert replace(config, run_dir="other").run_dir == "other"
    with pytest.raises(AttributeError):
        config.run_dir = "other"  # type: ignore[misc]


def test_importance_weights_and_the_mismatch_bound_follow_the_type_of_the_weights() -> None:
    caps, bounds = {}, {}
    for dtype in Dtype:
        config = Config(model=ModelConfig(dtype=dtype))
        caps[dtype], bounds[dtype] = importance_cap(config), max_logprob_mismatch(config)
        trainer = TrainerConfig(max_logprob_mismatch=0.0)
        given = replace(config, algorithm=AlgorithmConfig(importance_cap=0.0), trainer=trainer)
        assert (importance_cap(given), max_logprob_mismatch(given)) == (0.0, 0.0)
    assert caps == {"bfloat16": 2.0, "float16": 2.0, "float32": 0.0}
    assert bounds == MISMATCH_BOUNDS


def test_remote_code_is_off_in_every_shipped_config() -> None:
    for file in CONF.rglob("*.yaml"):
        assert "trust_remote_code: true" not in file.read_text(), file
