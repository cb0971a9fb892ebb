"""The teacher's own trajectories: solved once from noise, stored at a few points, and read at any time in between.

Shapes: B batch, M points of a trajectory, C h w latents, T number of the teacher's time steps.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lcmdistill.diffusion.schedules import NoiseSchedule, phase_edges
from lcmdistill.diffusion.solvers import Denoiser, Solver
from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True)
class Trajectory:
    """The teacher's trajectories of a batch. Their clean ends are the batch's latents.

    Attributes:
        states: The states at `trajectory_times`, from clean to noise, (B, M, C, h, w) fp32.
        omega: The omega of the teacher that was followed, (B,) fp32; None for the unguided teacher.
    """

    states: Tensor
    omega: Tensor | None = None

    def to(self, device: torch.device | str) -> "Trajectory":
        """Return a copy on another device."""
        omega = None if self.omega is None else copy_to_device(self.omega, device)
        return Trajectory(copy_to_device(self.states, device), omega)

    def at(self, schedule: NoiseSchedule, clean: Tensor, t: Tensor) -> Tensor:
        """Return z_t, (B, C, h, w): exactly a stored state at its time, and on the chord of two neighbors between them.

        On a chord (x0, eps) are constant: alpha_t x0 + sigma_t eps, with the pair that gives both neighbors. That is what a
        step of DDIM from the noisier one to the cleaner one passes through.

        Args:
            schedule: The teacher's schedule, on the device of `t`.
            clean: The clean end of each trajectory, at sigma = 0, (B, C, h, w).
            t: The times, (B,).
        """
        times = copy_to_device(trajectory_times(schedule, self.states.shape[1]), t.device)
        above = torch.searchsorted(times.float(), t.float().contiguous()).clamp(max=len(times) - 1)
        below = (above - 1).clamp(min=0)
        is_last = (above == 0).view(-1, 1, 1, 1)
        upper, lower = self._states(above), torch.where(is_last, clean, self._states(below))
        alpha_u, sigma_u = schedule.alpha(times[above]), schedule.sigma(times[above])
        alpha_l = torch.where(is_last, 1.0, schedule.alpha(times[below]))
        sigma_l = torch.where(is_last, 0.0, schedule.sigma(times[below]))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        area = alpha_l * sigma_u - alpha_u * sigma_l
        weight_l, weight_u = alpha * sigma_u - sigma * alpha_u, sigma * alpha_l - alpha * sigma_l
        return (weight_l * lower + weight_u * upper) / area

    def _states(self, index: Tensor) -> Tensor:
        """Return one state of each sample. index: (B,) int64."""
        size = self.states.shape
        return self.states.gather(1, index.view(-1, 1, 1, 1, 1).expand(-1, 1, *size[2:])).squeeze(1)


def trajectory_times(schedule: NoiseSchedule, points: int) -> Tensor:
    """Return the times of the stored points of a trajectory, rising to the last time step, (M,).

    They are the time steps of trailing spacing, so that they include the edges of phases whose number divides M.
    """
    return schedule.grid(schedule.num_steps)[phase_edges(schedule.num_steps, points)[1:]]


def solve_trajectory(
    denoiser: Denoiser, schedule: NoiseSchedule, noise: Tensor, points: int, steps: int, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Solve the PF-ODE from pure noise, and return its states and its clean end: (B, M, C, h, w), (B, C, h, w), fp32.

    Args:
        denoiser: The teacher.
        schedule: The teacher's schedule.
        noise: Standard normal, (B, C, h, w).
        points: M, the number of states.
        steps: The solver's steps from one state to the next one.
        solver: The solver.
    """
    edges = schedule.grid(schedule.num_steps)[phase_edges(schedule.num_steps, points * steps)].flip(0)
    edges = edges.to(noise.device)
    last = edges[:1]
    # Samplers start at noise of the variance that data of unit variance have there.
    z = (schedule.alpha(last).square() + schedule.sigma(last).square()).sqrt() * noise
    states = []
    for number, (t, s) in enumerate(pairwise(edges)):
        if number % steps == 0:
            states.append(z)
        z = solver(denoiser, schedule, z, t.expand(len(z)), s.expand(len(z)))
    if float(schedule.sigma(edges[-1:])) > 0:
        z = denoiser(z, edges[-1:].expand(len(z))).x0
    return torch.stack(states[::-1], dim=1), z
