"""Trajectories: exact on Gaussian data to the solver's order, at every stored point and in between."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.flow import FlowSchedule
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.schedules import KarrasSchedule, NoiseSchedule, phase_edges, vp_schedule
from lcmdistill.diffusion.solvers import ddim
from lcmdistill.diffusion.trajectory import Trajectory, solve_trajectory, trajectory_times
from tests.support.objectives import SD15
from tests.support.oracle import Gaussian, slope, smooth_schedule
from tests.support.solvers import ORDER

GAUSSIAN = Gaussian(0.7)

SCHEDULES: dict[str, NoiseSchedule] = {
    "VP": smooth_schedule(1024),
    "SD": vp_schedule(SD15),
    "zero SNR": vp_schedule({**SD15, "rescale_betas_zero_snr": True}),
    "Karras": KarrasSchedule(num_steps=1024),
    "flow": FlowSchedule(1000, shift=3.0),
}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def solved(schedule: NoiseSchedule, points: int, steps: int, solver: Any = ddim) -> tuple[Tensor, Tensor]:
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        return GAUSSIAN.denoise(schedule, z, t)

    return solve_trajectory(denoiser, schedule, noise, points, steps, solver)


def exact(schedule: NoiseSchedule, states: Tensor, t: Tensor) -> Tensor:
    """Return where the exact PF-ODE takes the first state, which is noise, at a time, (1,)."""
    last = trajectory_times(schedule, states.shape[1])[-1:]
    return GAUSSIAN.flow(schedule, states[:, -1], last.expand(4), t.expand(4))


@each_schedule
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_states_are_the_exact_ones_to_the_order_of_the_solver(schedule: NoiseSchedule, solver: str) -> None:
    times, errors = trajectory_times(schedule, 4), []
    for steps in (4, 8, 16):
        states, _ = solved(schedule, 4, steps, SOLVERS[solver])
        found = [states[:, i] - exact(schedule, states, times[i : i + 1]) for i in range(4)]
        errors.append(torch.stack(found).square().mean().sqrt().item())
    assert errors[-1] < 0.02
    assert slope([1 / 4, 1 / 8, 1 / 16], errors) > ORDER[solver] - 0.3


@each_schedule
def test_the_first_state_is_noise_and_the_last_leads_to_the_latents(schedule: NoiseSchedule) -> None:
    states, clean = solved(schedule, 4, 64)
    last = trajectory_times(schedule, 4)[-1:]
    assert last == schedule.grid(schedule.num_steps)[-1]
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scale = (schedule.alpha(last).square() + schedule.sigma(last).square()).sqrt()
    torch.testing.assert_close(states[:, -1], (scale * noise).to(states.dtype))
    first = schedule.grid(2)[:1]
    expected = GAUSSIAN.denoise(schedule, exact(schedule, states, first), first.expand(4)).x0
    torch.testing.assert_close(clean, expected, rtol=0.02, atol=0.02)


@each_schedule
def test_a_stored_point_is_read_as_it_is(schedule: NoiseSchedule) -> None:
    states, clean = solved(schedule, 4, 2)
    for i, t in enumerate(trajectory_times(schedule, 4)):
        found = Trajectory(states).at(schedule, clean, t.expand(4))
        torch.testing.assert_close(found, states[:, i], rtol=1e-5, atol=1e-5 * float(states.abs().max()))


@each_schedule
def test_with_one_step_of_ddim_per_segment_every_point_is_one_more_step(schedule: NoiseSchedule) -> None:
    """To a start in segment i of M the teacher takes M - i steps, and a part of the next one."""
    points = 5
    states, clean = solved(schedule, points, 1)
    times, grid = trajectory_times(schedule, points), schedule.grid(schedule.num_steps)
    lower = [grid[:1], *times[:-1].split(1)]
    for i in range(points):
        for share in (0.25, 0.5, 0.9):
            edges = phase_edges(schedule.num_steps, points)
            t = grid[(edges[i] + share * (edges[i + 1] - edges[i])).long()].expand(4)
            step = ddim(lambda z, t: GAUSSIAN.denoise(schedule, z, t), schedule, states[:, i], times[i].expand(4), t)
            found = Trajectory(states).at(schedule, clean, t)
            # The last chord ends at sigma = 0, which is the first time of a flow only.
            close = 1e-4 if i or not schedule.sigma(lower[0]).any() else 0.1
            torch.testing.assert_close(found, step, rtol=close, atol=close)


def test_each_sample_has_a_time_of_its_own() -> None:
    schedule = SCHEDULES["SD"]
    states, clean = solved(schedule, 8, 2)
    t = torch.tensor([0, 130, 500, 999])
    together = Trajectory(states).at(schedule, clean, t)
    for i in range(4):
        alone = Trajectory(states[i : i + 1]).at(schedule, clean[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("phases", [2, 4, 8])
def test_edges_of_phases_are_stored_points(phases: int) -> None:
    times = trajectory_times(SCHEDULES["SD"], 8).tolist()
    assert set(phase_edges(1000, phases)[1:].tolist()) <= set(times)
