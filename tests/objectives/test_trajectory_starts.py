"""Methods on the teacher's own trajectories: where they start, with which omega, and that the exact map stays exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.solvers import dpm_solver_pp
from lcmdistill.diffusion.trajectory import Trajectory, solve_trajectory
from lcmdistill.diffusion.types import Batch
from lcmdistill.objectives import OBJECTIVES
from tests.support.objectives import NULL, gaussian_batch, made
from tests.support.oracle import oracle_models, slope, smooth_schedule

STEPPING = [
    name
    for name, kind in OBJECTIVES.items()
    if kind.info.train_step == "consistency" and made(name).num_forwards["teacher"]
]
"the methods whose teacher takes steps"

SCHEDULES: dict[str, NoiseSchedule] = {"VP": smooth_schedule(1024), "flow": FlowSchedule(1024, shift=3.0)}


def trajectory_batch(schedule: NoiseSchedule, omega: Tensor | None, size: int, points: int = 16) -> Batch:
    """A batch of the guided oracle's trajectories."""
    plain, noise = gaussian_batch(size), torch.randn(size, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    denoiser = oracle_models(schedule, NULL).teacher.denoiser(plain.cond, omega)
    states, clean = solve_trajectory(denoiser, schedule, noise, points, 8, dpm_solver_pp)
    return Batch(clean.float(), plain.cond, Trajectory(states.float(), omega))


@pytest.mark.parametrize("objective", STEPPING)
def test_the_start_and_omega_are_those_of_the_trajectory(objective: str) -> None:
    schedule, rng = SCHEDULES["VP"], Rng(0, 0, range(32))
    is_guided = "w_min" in OBJECTIVES[objective].__dataclass_fields__
    omega = torch.linspace(3.0, 4.0, 32) if is_guided else None
    batch = trajectory_batch(schedule, omega, 32)
    assert batch.trajectory is not None
    own, models = made(objective, solver="ddim", w_min=3.0, w_max=4.0), oracle_models(schedule, NULL)
    state = own.teacher_step(models.teacher, schedule, batch, rng)
    torch.testing.assert_close(state.z_t, batch.trajectory.at(schedule, batch.latents, state.t))
    z_s = schedule.diffuse(*models.teacher.denoiser(batch.cond, omega)(state.z_t, state.t), state.s)
    torch.testing.assert_close(state.z_s, z_s)
    if state.w is not None:
        assert omega is not None
        assert torch.equal(state.w, omega)
    plain = own.teacher_step(models.teacher, schedule, replace(batch, trajectory=None), rng)
    assert torch.equal(plain.t, state.t)  # the same times, whatever the data
    assert not torch.allclose(plain.z_t, state.z_t, atol=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("phases", ["1", "2", "4-8"])
def test_at_the_exact_map_the_loss_of_pcm_falls_with_the_step(schedule: NoiseSchedule, phases: str) -> None:
    rng, omega, found = Rng(0, 0, range(256)), torch.full((256,), 3.0), []
    batch = trajectory_batch(schedule, omega, 256)
    for skip in (8, 16, 32, 64):
        own = made("pcm", skip=skip, phases=phases, w_min=3.0, w_max=3.0, distance="l2")
        models = oracle_models(schedule, NULL, end=own.sample_phases(schedule, rng)[2], baked=3.0)
        found.append(models.loss(own, batch, rng).mean().sqrt().item())
    assert found[0] < 0.005
    assert slope([8, 16, 32, 64], found) > 1.4


def test_at_the_exact_function_the_loss_of_lcm_falls_at_each_sample_s_own_omega() -> None:
    schedule, rng, found = SCHEDULES["VP"], Rng(0, 0, range(256)), []
    batch = trajectory_batch(schedule, torch.linspace(2.0, 10.0, 256), 256)
    for skip in (8, 16, 32, 64):
        own: Any = made("lcm", skip=skip, distance="l2", w_min=2.0, w_max=10.0)
        found.append(oracle_models(schedule, NULL).loss(own, batch, rng).mean().sqrt().item())
    assert slope([8, 16, 32, 64], found) > 1.4
