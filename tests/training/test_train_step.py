"""The training step of the consistency family: dropout on both sides, and where the target is evaluated."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.config.schema import OptimConfig
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.diffusion.types import Conditioning, Network
from lcmdistill.training.train_step import ConsistencyStep
from lcmdistill.utils.errors import RunError
from tests.support.objectives import NULL, SD15, each_objective, gaussian_batch, made
from tests.support.oracle import oracle_models


def step_of(objective: Any, student: Network, target: Network, *, has_dropout: bool = False) -> ConsistencyStep:
    """A step without a real student, whose backward pass does nothing."""
    schedule = vp_schedule(SD15)
    sharing: Any = SimpleNamespace(backward=lambda loss: None, accumulating=lambda *_, **__: nullcontext())
    online: Any = SimpleNamespace(has_dropout=has_dropout)
    return ConsistencyStep(
        objective=objective,
        student=online,
        online=None,
        optimizer=None,
        optim=OptimConfig(),
        sharing=sharing,
        schedule=schedule,
        teacher=oracle_models(schedule, NULL).teacher,
        student_network=student,
        target_network=target,
    )


def loss_of(step: ConsistencyStep) -> Tensor:
    batch, rng = gaussian_batch(4), Rng(0, 0, range(4))
    state = step.prepare(batch, rng)
    target = step.evaluate_target(batch, state, rng)
    return step.forward_backward(batch, state, lambda: target, rng, is_last=True)


@each_objective
def test_both_networks_drop_the_same(objective: str) -> None:
    """Song et al. 2023: the noise of dropout must not look like inconsistency."""
    masks: dict[str, Tensor] = {}

    def dropping(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            masks[role] = torch.nn.functional.dropout(torch.ones_like(z), 0.5)
            return X0Eps(z, z)

        return network

    state = torch.get_rng_state()
    loss_of(step_of(made(objective), dropping("student"), dropping("target"), has_dropout=True))
    torch.set_rng_state(state)
    assert torch.equal(masks["student"], masks["target"])


@each_objective
def test_the_loss_is_the_objective_s_own(objective: str) -> None:
    models = oracle_models(vp_schedule(SD15), NULL)
    if objective in ("tcd", "pcm"):  # whose maps also need eps, which the oracle's student does not predict
        teacher = models.teacher.network
        models = models.with_network("student", teacher).with_network("target", teacher)
    own = made(objective)
    expected = models.loss(own, gaussian_batch(4), Rng(0, 0, range(4)))
    found = loss_of(step_of(own, models.student, models.target))
    assert torch.equal(found, expected)


def test_an_objective_that_runs_its_target_elsewhere_is_detected() -> None:
    class Elsewhere(type(made("lcm"))):
        def loss(self, student: Any, target: Any, schedule: Any, batch: Any, state: Any) -> Tensor:
            return target(state.z_t, state.t, batch.cond, state.w).x0.mean((1, 2, 3))

    models = oracle_models(vp_schedule(SD15), NULL)
    with pytest.raises(RunError, match="elsewhere than its state says"):
        loss_of(step_of(Elsewhere(), models.student, models.target))
