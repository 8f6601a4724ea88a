"""Runs that must coincide, on one recorded batch: every layout gives the loss and gradient of the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_ssopd.config import Config
from tests.distributed import run_distributed
from tests.invariants.recorded import (
    Recorded,
    build_actor,
    config_for,
    loss_and_gradient,
    one_update,
    record,
    reference_loss,
    reference_model,
    weights_after,
)
from tests.megatron.hf_models import save_random_model

LAYOUTS = {
    "one process": {"world_size": 1, "tensor": 1},
    "one process, many micro-batches": {"world_size": 1, "tensor": 1, "token_budget": 30},
    "tensor-parallel 2": {"world_size": 2, "tensor": 2},
    "tensor-parallel 2, many micro-batches": {"world_size": 2, "tensor": 2, "token_budget": 30},
    "data-parallel 2": {"world_size": 2, "tensor": 1},
}


@pytest.fixture(scope="module", params=["qwen3_tied", "llama3_rope"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def recorded(path: str) -> Recorded:
    return record(path)


@pytest.fixture(scope="module")
def reference(path: str, recorded: Recorded) -> tuple[float, dict[str, torch.Tensor]]:
    student = reference_model(path)
    loss = reference_loss(student, reference_model(path), recorded)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradient_are_the_reference_s(
    layout: dict, path: str, recorded: Recorded, reference: tuple[float, dict[str, torch.Tensor]]
) -> None:
    ranks = run_distributed(loss_and_gradient, layout["world_size"], config_for(path, **layout), recorded)
    loss = sum(rank_loss for rank_loss, _ in ranks) / layout["tensor"]
    assert loss == pytest.approx(reference[0], rel=1e-4, abs=1e-6)
    for _, gradients in ranks:
        assert gradients.keys() == reference[1].keys()
        for name, expected in reference[1].items():
            error = (gradients[name].double() - expected).norm() / expected.norm()
            assert error < 2e-5, (name, error)


def test_the_auxiliary_loss_matters_to_the_gradient(path: str, recorded: Recorded) -> None:
    """Else the test above would not see it."""
    unweighted = replace(recorded, weights={index: 0.0 for index in recorded.weights})
    (_, with_aux), (_, without) = (
        run_distributed(loss_and_gradient, 1, config_for(path), batch)[0] for batch in (recorded, unweighted)
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (with_aux[name] - without[name]).norm() > 0.01 * with_aux[name].norm()


def test_adapter_gradients_agree_over_layouts(path: str, recorded: Recorded) -> None:
    results = [
        run_distributed(loss_and_gradient, layout["world_size"], config_for(path, lora=True, **layout), recorded)[0][1]
        for layout in LAYOUTS.values()
    ]
    for other in results[1:]:
        for name, expected in results[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-8)


def test_a_sharded_optimizer_takes_the_same_steps(path: str, recorded: Recorded) -> None:
    plain = run_distributed(weights_after, 2, config_for(path, world_size=2, clip_grad=0.1), recorded, 3)[0]
    sharded = config_for(path, world_size=2, clip_grad=0.1, distributed=True)
    for name, expected in run_distributed(weights_after, 2, sharded, recorded, 3)[1].items():
        torch.testing.assert_close(plain[name], expected, rtol=0, atol=1e-6)


def _weights_with_a_bad_step(config: Config, recorded: Recorded, poison: float) -> list[dict[str, torch.Tensor]]:
    """Before and after a step with a poisoned advantage, and after a good one."""
    actor = build_actor(config)
    actor.grad_norm_limit = 1e3
    bad = replace(recorded, advantages=(poison, *recorded.advantages[1:]))
    weights = [{name: tensor.clone() for name, tensor in actor.weights()}]
    skipped = []
    for batch in (bad, recorded):
        skipped.append(one_update(actor, batch).skipped)
        weights.append({name: tensor.clone() for name, tensor in actor.weights()})
    assert skipped == [True, False]
    return weights


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
def test_a_step_that_is_not_finite_or_a_spike_leaves_no_trace(path: str, recorded: Recorded, poison: float) -> None:
    config = config_for(path, world_size=2, tensor=2)
    before, after_bad, after_good = run_distributed(_weights_with_a_bad_step, 2, config, recorded, poison)[0]
    undisturbed = run_distributed(weights_after, 2, config, recorded, 1)[0]
    for name in before:
        assert torch.equal(before[name], after_bad[name]), name
        assert torch.equal(undisturbed[name], after_good[name]), name


def _uniform_update(config: Config, recorded: Recorded) -> tuple[float, float, bool]:
    """All rewards equal: no advantage, no pair. One step on tokens that teach nothing."""
    actor = build_actor(config)
    uniform = replace(recorded, advantages=(0.0,) * len(recorded.sequences), teachers={}, weights={})
    result = one_update(actor, uniform)
    metrics = result.metrics
    return metrics["loss/grpo"].value(), metrics["optim/grad_norm"].value(), result.skipped


def test_a_uniform_batch_is_a_finite_step_with_no_auxiliary_loss(path: str, recorded: Recorded) -> None:
    loss, grad_norm, skipped = run_distributed(_uniform_update, 1, config_for(path), recorded)[0]
    assert loss == 0.0
    assert grad_norm < 1e-3  # of the reference penalty alone, which is zero at the reference
    assert not skipped


def test_ssopd_on_uniform_groups_is_grpo_bit_for_bit(path: str, recorded: Recorded) -> None:
    """Without a pair the distillation has no target, and leaves no trace."""
    config = config_for(path, world_size=2, tensor=2)
    uniform = replace(recorded, advantages=(0.0,) * len(recorded.sequences), teachers={}, weights={})
    ssopd, grpo = (run_distributed(_two_updates, 2, config, uniform, aux)[0] for aux in (True, False))
    assert ssopd.keys() == grpo.keys()
    for name, tensor in grpo.items():
        assert torch.equal(ssopd[name], tensor), name


def _two_updates(config: Config, recorded: Recorded, aux: bool) -> dict[str, torch.Tensor]:
    return weights_after(config, recorded, 2, aux=aux)
