"""Solvers: their measured order on the Gaussian oracle, and equality with diffusers' own schedulers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from oracle import Gaussian, slope, smooth_schedule
from torch import Tensor

from lcmdistill.prediction import PREDICTION_TYPES, X0Eps, to_x0_eps
from lcmdistill.schedule import NoiseSchedule, vp_schedule
from lcmdistill.solvers import SOLVERS, Denoiser, ddim, euler

ORDER = {"ddim": 1, "euler": 1}
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD15_SCHEDULE = vp_schedule(SD15)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_denoiser(schedule: NoiseSchedule, std: float = 0.5) -> Denoiser:
    return lambda z, t: Gaussian(1.5, std).denoise(schedule, z, t)


def network_denoiser(schedule: NoiseSchedule, kind: str) -> tuple[Denoiser, Callable[[Tensor, Tensor], Tensor]]:
    """A made-up network of a prediction type, as (x0, eps) and raw."""

    def raw(z: Tensor, t: Tensor) -> Tensor:
        return (1.3 * z.roll(1, -1) + t.view(-1, 1, 1, 1) / 500).sin()

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        return to_x0_eps(raw(z, t), z, schedule.alpha(t), schedule.sigma(t), kind)

    return denoiser, raw


def test_every_solver_has_an_order() -> None:
    assert set(ORDER) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_global_error_falls_at_the_solvers_order(name: str) -> None:
    schedule = smooth_schedule(4097)
    denoiser, first = gaussian_denoiser(schedule), torch.full((2,), 4096)
    z_first = noise(2, 1, 4, 4).double()
    exact = Gaussian(1.5).flow(schedule, z_first, first, torch.zeros_like(first))
    strides, errors = [64, 128, 256, 512], []
    for stride in strides:
        z, t = z_first, first
        while t[0] > 0:
            z, t = SOLVERS[name](denoiser, schedule, z, t, t - stride), t - stride
        errors.append((z - exact).abs().max().item())
    # in float64 only the next term of the error's series is left: about 10 % of the error at the largest step
    assert slope(strides, errors) == pytest.approx(ORDER[name], abs=0.1)
    assert errors[0] < 0.05


@pytest.mark.parametrize("rescale", [False, True], ids=["SD", "zero terminal SNR"])
@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_exact_for_a_single_image(name: str, rescale: bool) -> None:
    """Where all data is one point, x0 is constant along the PF-ODE and any exponential integrator is exact."""
    schedule = vp_schedule(SD15 | {"rescale_betas_zero_snr": rescale})
    t, s = torch.tensor([999, 999, 500, 19]), torch.tensor([0, 979, 0, 0])
    z = schedule.diffuse(torch.full((4, 1, 4, 4), 1.5), noise(4, 1, 4, 4), t)
    z_s = SOLVERS[name](gaussian_denoiser(schedule, std=0.0), schedule, z, t, s)
    torch.testing.assert_close(z_s, Gaussian(1.5, 0.0).flow(schedule, z, t, s), atol=1e-4, rtol=0)


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


def test_euler_is_ddim_on_a_vp_schedule() -> None:
    schedule = smooth_schedule(1000)
    t, s, z = torch.tensor([999, 500, 20]), torch.tensor([900, 0, 19]), noise(3, 4, 8, 8).double()
    steps = [solver(gaussian_denoiser(schedule), schedule, z, t, s) for solver in (ddim, euler)]
    torch.testing.assert_close(steps[0], steps[1], atol=1e-12, rtol=0)
