"""Solvers: their measured order on the Gaussian oracle, and equality with diffusers' own schedulers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.parameterization import PREDICTION_TYPES, X0Eps
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, vp_schedule
from lcmdistill.diffusion.solvers import Denoiser, ddim, euler, heun, solve
from tests.support.oracle import Gaussian, slope, smooth_schedule
from tests.support.solvers import ORDER, network_denoiser, noise

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

SD15_SCHEDULE = vp_schedule(SD15)


def gaussian_denoiser(schedule: NoiseSchedule, std: float = 0.5) -> Denoiser:
    return lambda z, t: Gaussian(1.5, std).denoise(schedule, z, t)


def test_every_solver_has_an_order() -> None:
    assert set(ORDER) == set(SOLVERS)


@pytest.mark.parametrize(
    "schedule", [smooth_schedule(4097), KarrasSchedule(), FlowSchedule()], ids=["VP", "Karras", "flow"]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_global_error_falls_at_the_solvers_order(name: str, schedule: NoiseSchedule) -> None:
    denoiser, z_first = gaussian_denoiser(schedule), noise(2, 1, 4, 4).double()
    karras = isinstance(schedule, KarrasSchedule)
    steps, errors = [64, 128, 256, 512] if karras else [8, 16, 32, 64], []
    z_first = schedule.sigma(schedule.grid(2)[-1:]) * z_first
    for n in steps:
        times = schedule.grid(n + 1).flip(0)
        if isinstance(schedule, FlowSchedule):  # lambda is infinite at both ends of a flow, where steps are DDIM's
            times = torch.linspace(900, 100, n + 1)
        times = times.double() if times.is_floating_point() else times
        z = z_first
        for t, s in pairwise(times):
            z = SOLVERS[name](denoiser, schedule, z, t.expand(2), s.expand(2))
        exact = Gaussian(1.5).flow(schedule, z_first, times[:1].expand(2), times[-1:].expand(2))
        errors.append((z - exact).abs().max().item())
    # in float64 only the next terms of the error's series are left
    assert -slope(steps, errors) == pytest.approx(ORDER[name], abs=0.15), errors
    assert errors[-1] < 0.05


@pytest.mark.parametrize("rescale", [False, True], ids=["SD", "zero terminal SNR"])
@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_exact_for_a_single_image(name: str, rescale: bool) -> None:
    """Where all data is one point, x0 is constant along the PF-ODE and any exponential integrator is exact."""
    schedule = vp_schedule(SD15 | {"rescale_betas_zero_snr": rescale})
    t, s = torch.tensor([999, 999, 500, 19]), torch.tensor([0, 979, 0, 0])
    z = schedule.diffuse(torch.full((4, 1, 4, 4), 1.5), noise(4, 1, 4, 4), t)
    z_s = SOLVERS[name](gaussian_denoiser(schedule, std=0.0), schedule, z, t, s)
    # at s = 0 a network's eps is z's rounding over sigma_0 = .03, and Heun steps with it
    atol = 1e-3 if name == "heun" else 1e-4
    torch.testing.assert_close(z_s, Gaussian(1.5, 0.0).flow(schedule, z, t, s), atol=atol, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_is_per_sample(name: str) -> None:
    denoiser, z = gaussian_denoiser(SD15_SCHEDULE), noise(3, 2, 4, 4)
    t, s = torch.tensor([999, 400, 19]), torch.tensor([979, 0, 19])
    together = SOLVERS[name](denoiser, SD15_SCHEDULE, z, t, s)
    alone = [SOLVERS[name](denoiser, SD15_SCHEDULE, z[i : i + 1], t[i : i + 1], s[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    torch.testing.assert_close(together[2], z[2], atol=1e-6, rtol=0)  # s = t: nowhere to go


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_ddim_equals_diffusers(kind: Any) -> None:
    scheduler = DDIMScheduler(**SD15, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    denoiser, raw = network_denoiser(SD15_SCHEDULE, kind)
    t, z = torch.tensor([19, 519, 979, 999, 10]), noise(5, 4, 8, 8)
    ours = ddim(denoiser, SD15_SCHEDULE, z, t, (t - 20).clamp(min=0))
    for i, timestep in enumerate(t.tolist()):
        output = raw(z[i : i + 1], t[i : i + 1])
        theirs = scheduler.step(output, timestep, z[i : i + 1], eta=0.0, return_dict=False)[0]
        torch.testing.assert_close(ours[i : i + 1], theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_euler_equals_diffusers_in_sigma_space(kind: Any) -> None:
    denoiser, raw = network_denoiser(SD15_SCHEDULE, kind)
    t, s, z = torch.tensor([999, 519, 39]), torch.tensor([979, 259, 19]), noise(3, 4, 8, 8)
    ours = euler(denoiser, SD15_SCHEDULE, z, t, s)
    for i in range(3):
        scheduler = EulerDiscreteScheduler(**SD15, prediction_type=kind)
        scheduler.set_timesteps(timesteps=[int(t[i]), int(s[i])])
        y = z[i : i + 1] / SD15_SCHEDULE.alpha(t[i])
        y_s = scheduler.step(raw(z[i : i + 1], t[i : i + 1]), scheduler.timesteps[0], y, return_dict=False)[0]
        torch.testing.assert_close(ours[i : i + 1], y_s * SD15_SCHEDULE.alpha(s[i]), atol=1e-5, rtol=1e-5)


def test_heun_equals_diffusers() -> None:
    denoiser, raw = network_denoiser(SD15_SCHEDULE, "epsilon")
    t, s, z = torch.tensor([999, 519, 39]), torch.tensor([979, 259, 19]), noise(3, 4, 8, 8)
    ours = heun(denoiser, SD15_SCHEDULE, z, t, s)
    for i in range(3):
        scheduler: Any = HeunDiscreteScheduler(**SD15)
        scheduler.set_timesteps(timesteps=[int(t[i]), int(s[i])])
        y = z[i : i + 1] / SD15_SCHEDULE.alpha(t[i])
        for timestep in scheduler.timesteps[:2]:
            output = raw(scheduler.scale_model_input(y, timestep), timestep[None])
            y = scheduler.step(output, timestep, y, return_dict=False)[0]
        torch.testing.assert_close(ours[i : i + 1], y * SD15_SCHEDULE.alpha(s[i]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "theirs"), [("dpm-solver", "dpmsolver"), ("dpm-solver++", "dpmsolver++")])
def test_dpm_solvers_equal_diffusers(name: str, theirs: Any, kind: Any) -> None:
    """A single step of order 2, with the scheduler's three noise levels put at t, at the midpoint and at s."""
    denoiser, raw = network_denoiser(SD15_SCHEDULE, kind)
    t, s, z = torch.tensor([999, 519, 39]), torch.tensor([499, 259, 19]), noise(3, 4, 8, 8)
    ours = SOLVERS[name](denoiser, SD15_SCHEDULE, z, t, s)
    for i in range(3):
        rho = [float(SD15_SCHEDULE.sigma(x) / SD15_SCHEDULE.alpha(x)) for x in (t[i], s[i])]
        rho.insert(1, math.sqrt(rho[0] * rho[1]))
        middle = SD15_SCHEDULE.time_of(torch.tensor([-math.log(rho[1])]))
        assert s[i] < middle < t[i]
        scheduler: Any = DPMSolverSinglestepScheduler(
            **SD15, prediction_type=kind, algorithm_type=theirs, final_sigmas_type="sigma_min"
        )
        scheduler.set_timesteps(2)
        scheduler.sigmas, scheduler.order_list = torch.tensor(rho), [1, 2]
        z_s = z[i : i + 1]
        for time, timestep in zip((t[i : i + 1], middle), scheduler.timesteps, strict=True):
            z_s = scheduler.step(raw(z_s, time), timestep, z_s, return_dict=False)[0]
        torch.testing.assert_close(ours[i : i + 1], z_s, atol=2e-5, rtol=1e-5)


def test_dpm_solvers_ask_at_the_midpoint_in_lambda() -> None:
    asked: list[Tensor] = []

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        asked.append(t)
        return Gaussian(1.5).denoise(SD15_SCHEDULE, z, t)

    t, s = torch.tensor([999, 500]), torch.tensor([499, 480])
    for name in ("dpm-solver", "dpm-solver++"):
        asked.clear()
        SOLVERS[name](denoiser, SD15_SCHEDULE, noise(2, 1, 4, 4), t, s)
        first, middle = asked
        assert torch.equal(first, t)
        assert not torch.equal(middle, middle.round())
        lambdas = [(SD15_SCHEDULE.alpha(x) / SD15_SCHEDULE.sigma(x)).log() for x in (t, middle, s)]
        torch.testing.assert_close(lambdas[1], (lambdas[0] + lambdas[2]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_from_pure_noise_is_ddim_s(name: str) -> None:
    schedule = vp_schedule(SD15 | {"rescale_betas_zero_snr": True})
    denoiser, z = gaussian_denoiser(schedule), noise(2, 1, 4, 4)
    t, s = torch.tensor([999, 999]), torch.tensor([979, 0])
    torch.testing.assert_close(SOLVERS[name](denoiser, schedule, z, t, s), ddim(denoiser, schedule, z, t, s))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_to_no_noise_at_all_gives_the_network_s_x0(name: str) -> None:
    """EDM's last step goes to sigma = 0, below the schedule's grid."""
    schedule, t, z = KarrasSchedule(), torch.tensor([80.0, 0.5, 0.002]), noise(3, 1, 4, 4)
    step = SOLVERS[name](gaussian_denoiser(schedule), schedule, z, t, torch.zeros(3))
    torch.testing.assert_close(step, gaussian_denoiser(schedule)(z, t).x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_on_karras_s_schedule_is_per_sample(name: str) -> None:
    schedule = KarrasSchedule()
    t, s = torch.tensor([80.0, 0.5, 0.7]), torch.tensor([57.0, 0.002, 0.7])
    z = noise(3, 2, 4, 4) * t.view(-1, 1, 1, 1)
    step, denoiser = SOLVERS[name], gaussian_denoiser(schedule)
    together = step(denoiser, schedule, z, t, s)
    alone = [step(denoiser, schedule, z[i : i + 1], t[i : i + 1], s[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(together[2], z[2], atol=1e-6, rtol=0)


def test_euler_is_ddim_on_a_vp_schedule() -> None:
    schedule = smooth_schedule(1000)
    t, s, z = torch.tensor([999, 500, 20]), torch.tensor([900, 0, 19]), noise(3, 4, 8, 8).double()
    steps = [solver(gaussian_denoiser(schedule), schedule, z, t, s) for solver in (ddim, euler)]
    torch.testing.assert_close(steps[0], steps[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "heun"])
@pytest.mark.parametrize(
    "schedule",
    [smooth_schedule(1025), KarrasSchedule(1025), FlowSchedule(1024, shift=3.0)],
    ids=["VP", "Karras", "flow"],
)
def test_a_whole_path_ends_where_the_exact_one_does(name: str, schedule: NoiseSchedule) -> None:
    start, oracle, errors = noise(2, 1, 4, 4).double(), Gaussian(1.5), []
    first, last = (schedule.grid(2)[i].expand(2) for i in (-1, 0))
    end = oracle.flow(schedule, schedule.sigma(first) * start, first, last)
    exact = oracle.denoise(schedule, end, last).x0
    for points in (9, 33):
        errors.append(
            (solve(gaussian_denoiser(schedule), schedule, start, points, SOLVERS[name]) - exact).abs().max().item()
        )
    assert errors[1] < (0.4 if ORDER[name] == 1 else 0.15) * errors[0]
