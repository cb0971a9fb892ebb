"""The schedule: golden values of Stable Diffusion's, and equality with diffusers' for every kind of betas."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, ddim_grid, vp_schedule
from tests.support.schedules import CONFIGS, SD15


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_tables_equal_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = vp_schedule(config).alphas_cumprod, DDIMScheduler(**config).alphas_cumprod
    assert ours.dtype == torch.float32
    # diffusers rescales by way of the betas, which rounds a few times more
    tolerance = 1e-6 if config.get("rescale_betas_zero_snr") else 0
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_golden_values_of_stable_diffusion() -> None:
    abar = vp_schedule(SD15).alphas_cumprod
    for t, golden in {0: 0.99915, 19: 0.982244, 979: 0.0059128, 999: 0.0046601}.items():
        assert abar[t].item() == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_variance_preserving_and_noisier_with_time(config: dict[str, Any]) -> None:
    schedule = vp_schedule(config)
    t = torch.arange(schedule.num_steps)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.shape == sigma.shape == (schedule.num_steps, 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6, rtol=0)
    assert (alpha.diff(dim=0) < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    schedule, last = vp_schedule(CONFIGS["zero terminal SNR"]), torch.tensor([999])
    assert schedule.alpha(last).item() == 0
    assert schedule.sigma(last).item() == 1
    assert schedule.alphas_cumprod[0] == vp_schedule(SD15).alphas_cumprod[0]


def test_diffuse_equals_diffusers() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    t = torch.tensor([0, 19, 500, 999])
    expected = DDIMScheduler(**SD15).add_noise(x0, eps, t)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(vp_schedule(SD15).diffuse(x0, eps, t), expected, atol=1e-6, rtol=0)


def test_grid_is_the_one_that_lcm_samples_on() -> None:
    grid = ddim_grid(1000, 20)
    assert grid.tolist() == list(range(19, 1000, 20))
    scheduler = LCMScheduler()
    for n, golden in {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]}.items():
        scheduler.set_timesteps(n, original_inference_steps=len(grid))
        assert scheduler.timesteps.tolist() == golden
    scheduler.set_timesteps(8, original_inference_steps=len(grid))
    assert scheduler.timesteps.tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    scheduler.set_timesteps(50, original_inference_steps=len(grid))
    assert scheduler.timesteps.tolist() == grid.flip(0).tolist()


def test_grid_at_its_limits() -> None:
    assert ddim_grid(1000, 1).tolist() == list(range(1000))
    assert ddim_grid(1000, 1000).tolist() == [999]
    assert ddim_grid(1000, 30)[[0, -1]].tolist() == [29, 989]
    for skip in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000"):
            ddim_grid(1000, skip)


SCHEDULES: dict[str, NoiseSchedule] = {
    "SD": vp_schedule(SD15),
    "zero terminal SNR": vp_schedule(CONFIGS["zero terminal SNR"]),
    "Karras": KarrasSchedule(num_steps=1000),
    "flow": FlowSchedule(),
    "flow, shift 3": FlowSchedule(shift=3.0),
}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_float_that_is_whole_is_that_step_bit_for_bit(config: dict[str, Any]) -> None:
    schedule = vp_schedule(config)
    t = torch.arange(schedule.num_steps)
    assert torch.equal(schedule.alpha(t.float()), schedule.alpha(t))
    assert torch.equal(schedule.sigma(t.float()), schedule.sigma(t))


def test_between_two_steps_log_alpha_is_linear() -> None:
    schedule = vp_schedule(SD15)
    t = torch.tensor([0.25, 500.5, 998.75])
    low, high = schedule.alpha(t.long()).log(), schedule.alpha(t.long() + 1).log()
    expected = torch.lerp(low, high, (t - t.long()).view(-1, 1, 1, 1)).exp()
    torch.testing.assert_close(schedule.alpha(t), expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(3, 1, 1, 1))


@each_schedule
def test_time_of_undoes_lambda(schedule: NoiseSchedule) -> None:
    # At the last time of a zero-terminal-SNR schedule lambda is not finite, nor at both ends of a flow.
    t = schedule.grid(1000)[isinstance(schedule, FlowSchedule) : -1].float()
    t = torch.cat([t, (t[1:] + t[:-1]) / 2])
    found = schedule.time_of((schedule.alpha(t) / schedule.sigma(t)).log().flatten())
    torch.testing.assert_close(found, t, rtol=1e-6, atol=2e-3)


@each_schedule
def test_time_of_is_finite_where_lambda_is_not(schedule: NoiseSchedule) -> None:
    ends = schedule.time_of(torch.tensor([-46.0, 46.0]))
    assert ends.isfinite().all()
    assert ends[0] > ends[1]


@each_schedule
def test_grids_go_from_the_first_time_to_the_last(schedule: NoiseSchedule) -> None:
    first, last = schedule.grid(schedule.num_steps)[[0, -1]]
    for points in (2, 3, 18, 40, 151):
        grid = schedule.grid(points)
        assert len(grid) == points
        assert (grid.diff() > 0).all()
        assert grid[0] == first
        assert grid[-1] == last
    c_skip, c_out = schedule.boundary(first[None])
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


def test_the_grid_of_every_point_is_every_step() -> None:
    assert vp_schedule(SD15).grid(1000).tolist() == list(range(1000))
    lcm = torch.cat([torch.tensor([0]), ddim_grid(1000, 20)])
    assert (vp_schedule(SD15).grid(51) - lcm).abs().max() <= 1


def test_the_grid_of_consistency_models() -> None:
    """The sigmas of 18 points, worked out from Karras et al. 2022, Eq. 5."""
    grid = KarrasSchedule().grid(18).tolist()
    assert [grid[0], grid[-1]] == pytest.approx([0.002, 80.0], rel=1e-6)
    roots = [x ** (1 / 7) for x in grid]
    assert [b - a for a, b in pairwise(roots)] == pytest.approx(
        [(80 ** (1 / 7) - 0.002 ** (1 / 7)) / 17] * 17, rel=1e-5
    )
    assert grid[-2] == pytest.approx(57.586, rel=1e-4)


def test_karras_s_noise_is_added() -> None:
    schedule, t = KarrasSchedule(), torch.tensor([0.002, 80.0])
    x0, eps = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), -1.0)
    assert schedule.diffuse(x0, eps, t).flatten().tolist() == pytest.approx([2.998, -77.0])
    assert schedule.to("cpu") == schedule


def test_unknown_betas_are_refused() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        vp_schedule({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="2 trained_betas"):
        vp_schedule({"trained_betas": [0.1, 0.2]})
    for start, end in ((0.0, 0.0), (-0.1, 0.02), (0.1, 1.5)):
        with pytest.raises(ValueError, match="must be between 0 and 1 and not all 0"):
            vp_schedule({"beta_start": start, "beta_end": end})
