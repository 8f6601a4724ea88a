"""What a path is taken for, and adapters merged as PEFT merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_ssopd.config.evaluation import EvalConfig
from nemo_ssopd.config.run import RewardConfig
from nemo_ssopd.evaluation.data import load_sets
from nemo_ssopd.evaluation.identity import Identity, identities
from nemo_ssopd.evaluation.merge import write_merged_adapter
from nemo_ssopd.evaluation.models import ModelSource, find_model

pytestmark = pytest.mark.heavy

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "demo_model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, **options: object) -> Path:
    """A PEFT adapter of the demo model with random weights, as PEFT saves it."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL),
        LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def checkpoint(folder: Path, *, lora: bool) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "config.yaml").write_text(f"lora: {{enabled: {lora}}}\nmodel: {{path: {DEMO_MODEL}}}\n")
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(rslora: bool, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", use_rslora=rslora)
    source = find_model(str(folder), base=str(DEMO_MODEL))
    write_merged_adapter(source, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert (tmp_path / "merged" / "chat_template.jinja").is_file() and not (tmp_path / "merged.tmp").exists()
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), folder).merge_and_unload()
    reference.save_pretrained(tmp_path / "reference")
    expected, base = (
        load_file(tmp_path / "reference" / "model.safetensors"),
        load_file(DEMO_MODEL / "model.safetensors"),
    )
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
        assert ("_proj." in name) == (not torch.equal(merged[name], base[name])), name


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    source = ModelSource("adapter", str(folder), str(DEMO_MODEL))
    options = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"peft_type": "IA3"}):
        (folder / "adapter_config.json").write_text(json.dumps(options | change))
        with pytest.raises(ValueError, match="is not a plain LoRA adapter .*merge_and_unload"):
            write_merged_adapter(source, tmp_path / "merged")
    (folder / "adapter_config.json").write_text(json.dumps(options))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({name.replace("layers.0", "layers.9"): tensors[name]}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapts model.layers.9.*trained on as base=PATH"):
        write_merged_adapter(source, tmp_path / "merged")
    save_file({"base_model.model.lm_head.weight": tensors[name]}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds base_model.model.lm_head.weight, which is not a LoRA matrix"):
        write_merged_adapter(source, tmp_path / "merged")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read .*save the adapter as safetensors"):
        write_merged_adapter(source, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_run_is_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = (checkpoint(run / "checkpoints" / name, lora=True) for name in ("iter_0000009", "iter_0000010"))
    (run / "checkpoints" / ".iter_0000011.tmp").mkdir()
    expected = ModelSource("checkpoint", str(new), str(DEMO_MODEL))
    assert find_model(str(run)) == find_model(str(run / "checkpoints")) == find_model(str(new)) == expected
    assert find_model(str(old)).path == str(old)
    assert find_model(str(checkpoint(tmp_path / "full" / "iter_0000001", lora=False))).base is None


def test_hugging_face_directories_and_exports(tmp_path: Path) -> None:
    assert find_model(str(DEMO_MODEL)) == ModelSource("hf", str(DEMO_MODEL))
    (tmp_path / "hf").symlink_to(DEMO_MODEL)
    assert find_model(str(tmp_path)) == ModelSource("hf", str(tmp_path / "hf"))


def test_an_evaluation_by_another_reward_or_of_other_columns_is_another_one(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    settings = {"run_dir": "unused", "model": str(DEMO_MODEL), "data": str(rows)}

    def identity(level: int, **reward: Any) -> Identity:
        rows.write_text(json.dumps({"problem": "6*3", "answer": "8", "level": level}) + "\n")
        config = EvalConfig(**settings, reward=RewardConfig(**reward))
        return identities(config, find_model(str(DEMO_MODEL)), load_sets(config, DEMO_MODEL))["rows"]

    plain, by_function = identity(1), identity(1, function="rewards:grade")
    assert plain == identity(2)  # math-verify does not see the level
    assert by_function == identity(1, function="rewards:grade")
    for other in (identity(2, function="rewards:grade"), identity(1, function="rewards:other"), plain):
        assert other != by_function
    assert identity(1, threshold=0.7) != plain


def test_a_base_model_that_has_moved_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "iter_0000001", lora=True)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(DEMO_MODEL), "models/gone"))
    with pytest.raises(ValueError, match="their base model is not at 'models/gone'.* as base=PATH"):
        find_model(str(folder))
    assert find_model(str(folder), base=str(DEMO_MODEL)).base == str(DEMO_MODEL)
