"""The rectified-flow schedule: equal to diffusers' flow-matching schedulers, step by step and over whole loops."""

import math
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.flow import FlowSchedule, dynamic_shift, flow_schedule, sampled_sigmas, shifted
from lcmdistill.diffusion.parameterization import FLOW, X0Eps, to_x0_eps
from lcmdistill.diffusion.schedules import phase_edges
from lcmdistill.diffusion.solvers import ddim, euler
from tests.support.solvers import network_denoiser, noise

EulerScheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler

LcmScheduler: Any = diffusers.FlowMatchLCMScheduler

each_shift = pytest.mark.parametrize("shift", [1.0, 3.0])


@each_shift
def test_the_grid_holds_what_diffusers_visits(shift: float) -> None:
    schedule = FlowSchedule(shift=shift)
    scheduler = EulerScheduler(shift=shift)
    torch.testing.assert_close(schedule.grid(1000)[1:], scheduler.timesteps.flip(0)[1:], rtol=1e-6, atol=1e-4)
    assert schedule.grid(1000)[0] == 0
    for steps in (1, 2, 4, 5, 8):
        scheduler.set_timesteps(sigmas=sampled_sigmas(steps))
        torch.testing.assert_close(schedule.grid(steps + 1)[1:], scheduler.timesteps.flip(0), rtol=1e-6, atol=1e-4)
        edges = schedule.grid(1000)[phase_edges(1000, steps)]
        torch.testing.assert_close(edges, 1000 * scheduler.sigmas.flip(0), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(schedule.sigma(edges).flatten(), scheduler.sigmas.flip(0), rtol=1e-6, atol=1e-7)


def test_skipping_steps_are_evenly_spaced_before_the_shift() -> None:
    grid = FlowSchedule(shift=3.0).grid(51)
    share = torch.arange(51) / 50
    torch.testing.assert_close(grid, 1000 * shifted(share, 3.0))
    assert set(grid.tolist()) <= set(FlowSchedule(shift=3.0).grid(1000).tolist())


@each_shift
def test_noise_is_added_like_diffusers_does(shift: float) -> None:
    schedule, scheduler = FlowSchedule(shift=shift), EulerScheduler(shift=shift)
    t = scheduler.timesteps[[0, 300, 998]]
    x0, eps = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(schedule.diffuse(x0, eps, t), scheduler.scale_noise(x0, t, eps), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@each_shift
def test_ddim_and_euler_equal_the_euler_scheduler(steps: int, shift: float) -> None:
    """From pure noise to clean latents, each step and the whole loop."""
    schedule, scheduler = FlowSchedule(shift=shift), EulerScheduler(shift=shift)
    denoiser, raw = network_denoiser(schedule, FLOW)
    scheduler.set_timesteps(sigmas=sampled_sigmas(steps))
    theirs = ours = z = noise(2, 4, 8, 8)
    for t, s in pairwise(schedule.grid(steps + 1).flip(0)):
        timestep = scheduler.timesteps[scheduler.step_index or 0]
        for solver in (ddim, euler):
            step = solver(denoiser, schedule, theirs, t.expand(2), s.expand(2))
            expected = theirs + (s - t) / 1000 * raw(theirs, t.expand(2))
            torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-5)
        ours = ddim(denoiser, schedule, ours, t.expand(2), s.expand(2))
        theirs = scheduler.step(raw(theirs, timestep.expand(2)), timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.equal(z, ours)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@each_shift
def test_consistency_sampling_equals_the_lcm_scheduler(steps: int, shift: float) -> None:
    """f is the scheduler's x0 at every sampled time, and fresh noise leads to the next one."""
    schedule, scheduler = FlowSchedule(shift=shift), LcmScheduler(shift=shift)
    denoiser, raw = network_denoiser(schedule, FLOW)
    scheduler.set_timesteps(sigmas=sampled_sigmas(steps))
    theirs = ours = noise(2, 4, 8, 8)
    fresh = torch.Generator().manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    for t, s in pairwise(schedule.grid(steps + 1).flip(0)):
        timestep = scheduler.timesteps[scheduler.step_index or 0]
        x0 = consistency_function(schedule, ours, denoiser(ours, t.expand(2)).x0, t.expand(2))
        ours = schedule.diffuse(x0, torch.randn(ours.shape, generator=fresh), s.expand(2))
        theirs = scheduler.step(
            raw(theirs, timestep.expand(2)), timestep, theirs, generator=generator, return_dict=False
        )[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_f_is_the_identity_at_clean_latents_and_x0_where_students_are_sampled() -> None:
    schedule = FlowSchedule(shift=3.0)
    z, x0 = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    assert torch.equal(consistency_function(schedule, z, x0, torch.zeros(3)), z)
    t = schedule.grid(51)[[1, 10, 50]]
    torch.testing.assert_close(consistency_function(schedule, z, x0, t), x0, atol=1e-5, rtol=0)


def test_the_velocity_is_what_diffusers_steps_along() -> None:
    x0, eps, sigma = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1), torch.tensor([0.0, 0.4, 1.0]).view(-1, 1, 1, 1)
    z = (1 - sigma) * x0 + sigma * eps
    found: X0Eps = to_x0_eps(eps - x0, z, 1 - sigma, sigma, FLOW)
    torch.testing.assert_close(found, X0Eps(x0, eps), atol=1e-6, rtol=0)


DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_equals_diffusers(tokens: int, kind: Any) -> None:
    scheduler = EulerScheduler(**DYNAMIC, time_shift_type=kind)
    mu = 0.5 + 0.65 * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=sampled_sigmas(8), mu=mu)
    shift = dynamic_shift({**DYNAMIC, "time_shift_type": kind}, tokens)
    assert shift == pytest.approx(mu if kind == "linear" else math.exp(mu))
    torch.testing.assert_close(FlowSchedule(shift=shift).grid(9)[1:], scheduler.timesteps.flip(0), rtol=1e-5, atol=1e-3)


def test_a_config_decides_the_shift() -> None:
    assert flow_schedule({}) == FlowSchedule()
    assert flow_schedule({"shift": 3.0, "num_train_timesteps": 500}) == FlowSchedule(500, 3.0)
    assert flow_schedule(DYNAMIC).shift == pytest.approx(math.exp(1.15))  # that of 1024 px
    with pytest.raises(ValueError, match="invert_sigmas"):
        flow_schedule({"invert_sigmas": True})
    with pytest.raises(ValueError, match="shift of the teacher's scheduler is 0"):
        flow_schedule({"shift": 0})


def test_golden_sigmas_of_four_steps_of_stable_diffusion_3() -> None:
    sigmas: Tensor = FlowSchedule(shift=3.0).grid(5) / 1000
    assert sigmas.tolist() == pytest.approx([0.0, 0.5, 0.75, 0.9, 1.0])
