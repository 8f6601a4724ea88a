"""Runs that must coincide, on one recorded batch: every layout gives the loss and gradient of the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_ssopd.config.run import Config
from nemo_ssopd.megatron.lora import adapters
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

pytestmark = pytest.mark.heavy

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


@pytest.mark.parametrize("normalization", ["sequence", "constant"])
@pytest.mark.parametrize("layout", ["one process, many micro-batches", "data-parallel 2"])
def test_other_normalizations(layout: str, normalization: str, path: str, recorded: Recorded) -> None:
    recorded = replace(recorded, normalization=normalization)
    student = reference_model(path)
    loss = reference_loss(student, reference_model(path), recorded)
    loss.backward()
    config = config_for(path, normalization=normalization, **LAYOUTS[layout])
    ranks = run_distributed(loss_and_gradient, config.parallel.world_size, config, recorded)
    assert sum(rank_loss for rank_loss, _ in ranks) == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name, parameter in student.named_parameters():
        error = (ranks[0][1][name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 2e-5, (name, error)


@pytest.mark.parametrize("layout", ["one process, many micro-batches", "data-parallel 2"])
def test_the_order_of_the_examples_does_not_matter(layout: str, path: str, recorded: Recorded) -> None:
    """Nothing is keyed by position, so a shuffled list has the same loss and gradient."""
    order = torch.randperm(len(recorded.examples), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = replace(recorded, examples=tuple(recorded.examples[i] for i in order))
    config = config_for(path, lora=True, **LAYOUTS[layout])
    (loss, gradients), (loss_too, gradients_too) = (
        run_distributed(loss_and_gradient, config.parallel.world_size, config, batch)[0]
        for batch in (recorded, shuffled)
    )
    assert loss_too == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        torch.testing.assert_close(gradients_too[name], expected, rtol=1e-4, atol=1e-7)


def test_the_auxiliary_loss_matters_to_the_gradient(path: str, recorded: Recorded) -> None:
    """Else the test above would not see it."""
    examples = [replace(e, teacher=e.teacher and replace(e.teacher, weight=0.0)) for e in recorded.examples]
    unweighted = replace(recorded, examples=tuple(examples))
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
    plain = run_distributed(weights_after, 2, config_for(path, world_size=2, grad_clip=0.1), recorded, 3)[0]
    sharded = config_for(path, world_size=2, grad_clip=0.1, distributed=True)
    for name, expected in run_distributed(weights_after, 2, sharded, recorded, 3)[1].items():
        torch.testing.assert_close(plain[name], expected, rtol=0, atol=1e-6)


def _weights_with_a_bad_step(config: Config, recorded: Recorded, poison: float) -> list[dict[str, torch.Tensor]]:
    """Before and after a step with a poisoned advantage, and after a good one."""
    actor = build_actor(config)
    actor.grad_norm_limit = 1e3
    first, *others = recorded.examples
    bad = replace(recorded, examples=(replace(first, advantage=poison), *others))
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


def uniform_groups(recorded: Recorded) -> Recorded:
    """No advantage and nothing distilled, as when all rewards are equal."""
    return replace(recorded, examples=tuple(replace(e, advantage=0.0, teacher=None) for e in recorded.examples))


def _uniform_update(config: Config, recorded: Recorded) -> tuple[float, float, bool]:
    """All rewards equal: no advantage, no pair. One step on tokens that teach nothing."""
    actor = build_actor(config)
    uniform = uniform_groups(recorded)
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
    uniform = uniform_groups(recorded)
    ssopd, grpo = (run_distributed(_two_updates, 2, config, uniform, aux)[0] for aux in (True, False))
    assert ssopd.keys() == grpo.keys()
    for name, tensor in grpo.items():
        assert torch.equal(ssopd[name], tensor), name


def _two_updates(config: Config, recorded: Recorded, aux: bool) -> dict[str, torch.Tensor]:
    return weights_after(config, recorded, 2, aux=aux)


@pytest.mark.parametrize("distributed", [False, True])
def test_float16_steps_are_float32_s_to_rounding(path: str, recorded: Recorded, distributed: bool) -> None:
    """Scaled in the backward and unscaled once: the gradient's norm, and what Adam makes of a gradient near its eps."""
    settings = {"world_size": 2, "lora": True, "grad_clip": 1e-4, "eps": 1e-6, "distributed": distributed}
    exact, half = (
        run_distributed(_first_steps, 2, config_for(path, dtype=dtype, **settings), recorded)[0]
        for dtype in ("float32", "float16")
    )
    assert half[0] == pytest.approx(exact[0], rel=5e-3)  # the norm before it is clipped
    assert (half[1] - exact[1]).norm() < 0.03 * exact[1].norm()


def _first_steps(config: Config, recorded: Recorded) -> tuple[float, torch.Tensor]:
    """The gradient norm of the first step, and B of all adapters after two."""
    actor = build_actor(config)
    norms = [one_update(actor, recorded).metrics["optim/grad_norm"].value() for _ in range(2)]
    return norms[0], torch.cat([adapter.B.detach().float().flatten() for adapter in adapters(actor.model)])


def test_a_loss_scale_that_overflows_is_halved_and_leaves_no_trace(path: str, recorded: Recorded) -> None:
    config = config_for(path, world_size=2, tensor=2, lora=True, dtype="float16")
    skipped, scales, moved = run_distributed(_overflow, 2, config, recorded)[0]
    assert skipped[0] and not any(skipped[-5:]), skipped
    assert scales == [2.0 ** (30 - sum(skipped[:step])) for step in range(len(scales))]
    assert moved == [not was_skipped for was_skipped in skipped]


def _overflow(config: Config, recorded: Recorded) -> tuple[list[bool], list[float], list[bool]]:
    """Of twenty steps from a scale of 2^30: whether each was skipped, its loss scale, whether a weight moved."""
    actor = build_actor(config)
    actor.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(2.0**30)
    skipped, scales, moved = [], [], []
    for _ in range(20):
        before = [adapter.B.clone() for adapter in adapters(actor.model)]
        result = one_update(actor, recorded)
        skipped.append(result.skipped)
        scales.append(result.metrics["optim/loss_scale"].value())
        moved.append(any(not torch.equal(old, new.B) for old, new in zip(before, adapters(actor.model), strict=True)))
    return skipped, scales, moved
