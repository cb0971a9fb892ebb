"""Whole trajectories that the teacher generates for its prompts, so that training starts on them.

By default a sample is a finished latent, and training adds fresh noise to it. At sampling a student meets other points: those
of the guided teacher's trajectory, from pure noise on. Here a sample is one such trajectory. The teacher follows it with the
method's own solver and guidance, and its states at a few points are stored.

Shapes: B batch, M points of a trajectory, C h w latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lcmdistill.config.guidance import OmegaRange, omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.diffusion.trajectory import solve_trajectory
from lcmdistill.diffusion.types import Conditioning, TeacherNetwork, x0_eps_network
from lcmdistill.students.student import AutocastNetwork, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.errors import UsageError

Generate = Callable[[Tensor, Tensor | None, Conditioning, Callable[[], None]], tuple[Tensor, Tensor]]
"(noise, omega, conditioning, on_step) -> states (B, M, C, h, w) and latents (B, C, h, w), fp32, on the CPU"


@dataclass(frozen=True)
class TrajectoryPlan:
    """How the teacher generates trajectories; all of it is part of the cache's key.

    Attributes:
        points: M, the number of states that are stored per sample.
        evaluations: The teacher's evaluations per trajectory, rounded up so that every segment has as many.
        solver: The solver that follows the trajectory, a key of SOLVERS.
        omega: The smallest and the largest omega, one is drawn per sample; None for the unguided teacher.
    """

    points: int
    evaluations: int
    solver: str
    omega: OmegaRange | None

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """Return the plan of a run; None if its samples are finished latents."""
        objective, points = config.objective, config.data.trajectory
        if not points or not hasattr(objective, "solver"):
            return None
        return cls(points, config.data.teacher_steps, objective.solver, omega_range(config))

    def steps(self, num_steps: int) -> int:
        """Return the solver's steps from one point to the next one. num_steps: T."""
        wanted = math.ceil(self.evaluations / (self.points * SOLVERS[self.solver].evaluations))
        return max(1, min(wanted, num_steps // 2 // self.points))

    def calls(self, num_steps: int) -> int:
        """Return the teacher's evaluations per trajectory, at most: one more may turn the last state into x0. num_steps: T."""
        return self.points * self.steps(num_steps) * SOLVERS[self.solver].evaluations + 1

    def forwards(self, teacher: Teacher) -> int:
        """Return the network's forward passes per sample; classifier-free guidance doubles them."""
        doubles = teacher.applies_cfg and self.omega is not None
        return self.calls(teacher.schedule.num_steps) * (2 if doubles else 1)

    def sample_omega(self, seed: int, place: int) -> float | None:
        """Draw the omega of a sample. place: its index in the source."""
        if self.omega is None:
            return None
        generator = torch.Generator().manual_seed(derive_seed(seed, "trajectory-omega", place))
        return self.omega.low + (self.omega.high - self.omega.low) * float(torch.rand(1, generator=generator))

    def cache_key(self) -> dict[str, Any]:
        """Return plain values that change when the trajectories do."""
        return vars(self)

    def generator(self, teacher: Teacher, dtype: torch.dtype) -> Generate:
        """Return a function that generates trajectories.

        Args:
            teacher: The teacher, with its network on the device.
            dtype: Of autocast around the network.

        Returns:
            The function; it calls its `on_step` after each of the teacher's evaluations.
        """
        device = teacher.network.device
        schedule, null = teacher.schedule.to(device), teacher.encode_prompts([""]).to(device)
        raw = raw_network(AutocastNetwork(teacher.network, teacher.call, dtype))
        network = TeacherNetwork(x0_eps_network(raw, schedule, teacher.prediction_type), null, teacher.applies_cfg)
        steps = self.steps(schedule.num_steps)

        @torch.no_grad()
        def generate(
            noise: Tensor, omega: Tensor | None, cond: Conditioning, on_step: Callable[[], None]
        ) -> tuple[Tensor, Tensor]:
            teacher_denoiser = network.denoiser(cond.to(device), None if omega is None else omega.to(device))

            def denoiser(z: Tensor, t: Tensor) -> X0Eps:
                prediction = teacher_denoiser(z, t)
                on_step()
                return prediction

            solver = SOLVERS[self.solver]
            states, clean = solve_trajectory(denoiser, schedule, noise.to(device), self.points, steps, solver)
            return states.cpu(), clean.cpu()

        return generate


def check_trajectory(config: RunConfig, teacher: Teacher, *, is_generated: bool) -> None:
    """Raise UsageError for a method, data or a teacher that cannot have `data.trajectory`.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        is_generated: Whether the teacher generates all data.
    """
    points, info = config.data.trajectory, config.objective.info
    if not points:
        return
    if info.prompts_only:
        raise UsageError(
            f"data.trajectory is {points}, but --objective {config.objective_name} learns from prompts alone and samples "
            "trajectories of its own; set it to 0"
        )
    if not config.objective.num_forwards["teacher"]:
        raise UsageError(
            f"data.trajectory is {points}, but --objective {config.objective_name} takes no step of the teacher along its "
            "trajectory; set it to 0"
        )
    if not is_generated:
        raise UsageError(
            f"data.trajectory is {points}, but images have no trajectory of the teacher; use --data teacher only, or set "
            "data.trajectory to 0"
        )
    if teacher.condition_is_random:
        raise UsageError(
            f"data.trajectory is {points}, but an inpainting model is trained on masks of finished images, which its "
            "trajectory does not have; set it to 0"
        )
    most = teacher.schedule.num_steps // 2
    if points > most:
        raise UsageError(f"data.trajectory is {points}; it must be from 0 to T / 2 = {most}, such as 8")
