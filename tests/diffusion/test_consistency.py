"""The consistency function and the omega embedding: golden values, and equality with what diffusers samples with."""

from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from lcmdistill.diffusion.consistency import OMEGA_DIM, consistency_function, omega_embedding
from lcmdistill.diffusion.parameterization import EDM, network_input, to_x0_eps
from lcmdistill.diffusion.schedules import KarrasSchedule, vp_schedule

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

SD15 = vp_schedule(BETAS)


def test_golden_boundary_scalings() -> None:
    c_skip, c_out = (c.flatten().tolist() for c in SD15.boundary(torch.tensor([0, 1, 19, 999])))
    assert (c_skip[0], c_out[0]) == (1.0, 0.0)
    assert c_skip[1:] == pytest.approx([0.00249377, 6.92516e-6, 2.505e-9], rel=1e-3)
    assert c_out[1:] == pytest.approx([0.99875234, 0.99999654, 1.0], rel=1e-6)


def test_boundary_scalings_equal_diffusers_at_every_time() -> None:
    scheduler, t = LCMScheduler(), torch.arange(1000)
    c_skip, c_out = SD15.boundary(t)
    assert c_skip.shape == c_out.shape == (1000, 1, 1, 1)
    theirs = torch.tensor([scheduler.get_scalings_for_boundary_condition_discrete(i) for i in range(1000)])
    torch.testing.assert_close(torch.stack([c_skip.flatten(), c_out.flatten()], 1), theirs, atol=0, rtol=1e-6)


def test_f_at_time_0_is_the_identity() -> None:
    g = torch.Generator().manual_seed(0)
    z, x0 = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    assert torch.equal(consistency_function(SD15, z, x0, torch.tensor([0, 0])), z)
    karras = KarrasSchedule()
    assert torch.equal(consistency_function(karras, z, x0, karras.grid(2)[:1].expand(2)), z)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [19, 259, 999])
def test_f_equals_what_the_lcm_scheduler_denoises_to(kind: str, t: int) -> None:
    scheduler = LCMScheduler(**BETAS, prediction_type=kind)
    scheduler.set_timesteps(50)
    g = torch.Generator().manual_seed(t)
    output, z = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    times = torch.tensor([t])
    x0, _ = to_x0_eps(output, z, SD15.alpha(times), SD15.sigma(times), kind)
    theirs = scheduler.step(output, t, z, generator=g, return_dict=False)[1]
    torch.testing.assert_close(consistency_function(SD15, z, x0, times), theirs, atol=1e-6, rtol=1e-6)


def test_f_equals_what_the_consistency_models_scheduler_makes_of_the_raw_network() -> None:
    """Input, time and output: a network F of (c_in z, 250 ln sigma) is asked alike, and its f is theirs."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False, s_noise=0.0)
    scheduler.set_timesteps(40)
    z = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    karras = KarrasSchedule(num_steps=40)
    t = karras.grid(40).flip(0)
    torch.testing.assert_close(t, scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    alpha, sigma = karras.alpha(t), karras.sigma(t)
    given, time = network_input(z, t, sigma, EDM)
    torch.testing.assert_close(time, scheduler.timesteps.float(), rtol=1e-6, atol=1e-4)
    output = (1.3 * given.roll(1, -1) + time.view(-1, 1, 1, 1) / 500).sin()
    ours = consistency_function(karras, z, to_x0_eps(output, z, alpha, sigma, EDM).x0, t)
    for i, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(z[i : i + 1], timestep)
        torch.testing.assert_close(scaled, given[i : i + 1], rtol=1e-6, atol=1e-7)
        theirs = scheduler.step(output[i : i + 1], timestep, z[i : i + 1], return_dict=False)[0]
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-5, atol=1e-6)


def test_omega_embedding_equals_the_pipelines() -> None:
    w = torch.tensor([0.0, 1.0, 7.5, 15.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, OMEGA_DIM)  # pyright: ignore[reportArgumentType]
    # a phase of up to 15000 has an ulp of 1e-3 in fp32: the frequencies must be rounded alike, not only be near
    torch.testing.assert_close(omega_embedding(w), theirs, atol=1e-6, rtol=0)
    assert omega_embedding(w).shape == (4, OMEGA_DIM)
