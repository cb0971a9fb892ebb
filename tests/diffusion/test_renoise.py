"""Re-noising: exact mean and variance on every schedule, and no noise where nothing is to be added."""

from typing import Any

import pytest
import torch

from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.renoise import clipped_snr, renoise, renoise_std
from lcmdistill.diffusion.schedules import KarrasSchedule, vp_schedule
from tests.support.objectives import SD15

SCHEDULES: dict[str, Any] = {"VP": vp_schedule(SD15), "flow": FlowSchedule(), "Karras": KarrasSchedule()}


@pytest.mark.parametrize("times", [(0, 20), (249, 250), (249, 480), (499, 989)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_variance_is_exact(name: str, times: tuple[int, int]) -> None:
    """z_tau is linear in x0, eps and n: its coefficients are read off one at a time."""
    schedule = SCHEDULES[name]
    mid, tau = (torch.tensor([t]) for t in times)
    if name == "Karras":
        mid, tau = mid.float() + 1, tau.float() + 1
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    of_x0 = renoise(schedule, schedule.alpha(mid) * one, zero, mid, tau)
    of_eps = renoise(schedule, schedule.sigma(mid) * one, zero, mid, tau)
    of_noise = renoise(schedule, zero, one, mid, tau)
    torch.testing.assert_close(of_x0, schedule.alpha(tau))
    torch.testing.assert_close(of_eps.square() + of_noise.square(), schedule.sigma(tau).square())
    assert torch.equal(of_noise, renoise_std(schedule, mid, tau))


@pytest.mark.parametrize("name", ["VP", "flow"])
def test_the_same_time_adds_no_noise(name: str) -> None:
    t, z = torch.tensor([300, 700]), torch.randn(2, 4, 3, 3)
    assert torch.equal(renoise(SCHEDULES[name], z, torch.full_like(z, torch.nan).nan_to_num(1e9), t, t), z)


def test_the_weight_is_the_snr_up_to_its_limit() -> None:
    schedule, t = SCHEDULES["VP"], torch.tensor([20, 500, 999])
    weight = clipped_snr(schedule, t, 5.0)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    torch.testing.assert_close(weight, snr.clamp(max=5.0))
    assert weight[0] == 5.0
    assert clipped_snr(FlowSchedule(), torch.tensor([0]), 5.0).tolist() == [5.0]
