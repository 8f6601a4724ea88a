"""Hugging Face -> Megatron -> Hugging Face, bit for bit, at every tensor-parallel size; and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ssopd.config.sections import ParallelConfig
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.megatron.weights import hf_weights
from tests.distributed import run_distributed
from tests.megatron.hf_models import HF_CONFIGS, load_megatron, save_random_model

pytestmark = pytest.mark.heavy

TP1 = ParallelConfig(world_size=1)
TP2 = ParallelConfig(world_size=2, tensor=2)
DP2 = ParallelConfig(world_size=2)


@pytest.mark.parametrize("parallel", [TP1, TP2, DP2], ids=["tp1", "tp2", "dp2"])
def test_round_trip_is_exact(parallel: ParallelConfig, tmp_path: Path) -> None:
    paths = [save_random_model(name, tmp_path / name) for name in HF_CONFIGS]
    for all_weights in run_distributed(there_and_back, parallel.world_size, paths, parallel):
        for path, weights in zip(paths, all_weights, strict=True):
            original = load_file(f"{path}/model.safetensors")
            assert weights.keys() == original.keys()
            assert all(torch.equal(weights[key], original[key]) for key in original)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    path = save_random_model("qwen3_odd", tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(original)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({key: original[key] for key in part}, tmp_path / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for (weights,) in run_distributed(there_and_back, 2, [path], TP2):
        assert all(torch.equal(weights[key], original[key]) for key in original)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = save_random_model("llama_odd_tied", tmp_path)
    file = tmp_path / "model.safetensors"
    original = load_file(file)
    norm = original.pop("model.norm.weight")
    save_file({**original, "model.layers.7.mlp.up_proj.weight": norm.clone()}, file)
    with pytest.raises(AssertionError, match=r"missing \['model.norm.weight'\], unknown \['model.layers.7.mlp.up_proj"):
        run_distributed(there_and_back, 1, [path], TP1)

    save_file({**original, "model.norm.weight": norm[:-1].clone()}, file)
    with pytest.raises(AssertionError, match=r"model.norm.weight has shape \[31\] in the file.*asks for \[32\]"):
        run_distributed(there_and_back, 1, [path], TP1)

    # A second copy of a tied embedding, as some published files have, is no error.
    save_file({**original, "model.norm.weight": norm, "lm_head.weight": norm.clone()}, file)
    ((weights,),) = run_distributed(there_and_back, 1, [path], TP1)
    assert "lm_head.weight" not in weights

    file.unlink()
    with pytest.raises(AssertionError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        run_distributed(there_and_back, 1, [path], TP1)


def there_and_back(paths: list[str], parallel: ParallelConfig) -> list[dict[str, torch.Tensor]]:
    runtime = initialize(parallel, seed=1)
    models = [load_megatron(path, parallel, runtime) for path in paths]
    return [{name: tensor.clone() for name, tensor in hf_weights(model, hf, runtime)} for model, hf in models]
