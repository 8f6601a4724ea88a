"""The auxiliary loss of docs/auxiliary_losses.md at several layouts, against autograd in float64."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import grpo_loss
from nemo_ssopd.config.plugin import load_function
from nemo_ssopd.config.run import Config
from tests.distributed import run_distributed
from tests.invariants.recorded import Recorded, build_actor, config_for, logits, record, reference_model
from tests.megatron.hf_models import save_random_model

pytestmark = pytest.mark.heavy

PAGE = Path(__file__).parents[1] / "docs" / "auxiliary_losses.md"
LAYOUTS = {
    "one process, many micro-batches": {"world_size": 1, "tensor": 1, "token_budget": 30},
    "tensor-parallel 2": {"world_size": 2, "tensor": 2},
    "data-parallel 2": {"world_size": 2, "tensor": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("users")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "positive_examples.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model("qwen3_tied", tmp_path_factory.mktemp("model"))


def updated(config: Config, recorded: Recorded, folder: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Share of the loss, the logged NLL, and the gradient, with a surrogate that is zero."""
    sys.path.insert(0, folder)
    actor = build_actor(config)
    build = load_function("algorithm.aux_losses", "positive_examples:build")
    aux = build(config, actor.hf, actor.runtime)
    rank, size = actor.runtime.layout.data.rank, actor.runtime.layout.data.size
    mine = [
        replace(e, token_weights=(0.0,) * len(e.token_weights)) for e in recorded.examples if e.group % size == rank
    ]
    result = actor.update(mine, partial(grpo_loss, clip=RatioClip(0.2, 0.2), reference_kl=0.0), [aux])
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in actor.weights()}
    return result.metrics["loss/total"].value(), result.metrics["positive/nll"].value(), gradients


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_loss_from_outside_has_the_gradient_of_its_formula(layout: dict[str, Any], path: str, folder: Path) -> None:
    recorded, model = record(path), reference_model(path)
    sums, tokens = [], 0
    for example in recorded.examples:
        if example.advantage > 0:
            ids = torch.tensor(example.sequence.completion)[:, None]
            sums.append(-logits(model, example.sequence).log_softmax(-1).gather(-1, ids).sum())
            tokens += len(ids)
    loss = 0.1 * torch.stack(sums).sum() / tokens
    loss.backward()
    ranks = run_distributed(updated, layout["world_size"], config_for(path, **layout), recorded, str(folder))
    assert sum(share for share, _, _ in ranks) / layout["tensor"] == pytest.approx(loss.item(), rel=1e-5)
    for _, _, gradients in ranks:
        for name, parameter in model.named_parameters():
            error = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-5, (name, error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("positive_examples", "write it as package.module:name"),
        ("positive examples:build", "write it as package.module:name"),
        ("no_such_module:build", "cannot be imported"),
        ("math:no_such_name", "cannot be imported"),
        ("math:pi", "is no function"),
    ],
)
def test_a_name_that_cannot_be_used_is_an_error(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"algorithm.aux_losses={name!r}")) as error:
        load_function("algorithm.aux_losses", name)
    assert words in str(error.value)


def test_modules_are_found_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    build = load_function("algorithm.aux_losses", "positive_examples:build")
    config: Any = SimpleNamespace(rollout=SimpleNamespace(temperature=1.0), trainer=SimpleNamespace(chunk_tokens=8))
    layout = SimpleNamespace(tensor=SimpleNamespace(group=None))
    loss = build(config, SimpleNamespace(vocab_size=10), SimpleNamespace(layout=layout))
    assert (loss.area, loss.weight) == ("positive", 0.1)
