"""What objectives share: random draws of times and omega, the loss function by name, and checks of common fields.

Shapes: B batch, T number of the teacher's time steps, N number of points of a grid.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.losses import DISTANCES, LossFunction
from lcmdistill.diffusion.lpips import perceptual_distance
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import MAX_SAMPLED_STEPS, NoiseSchedule, ddim_grid, sampled_steps
from lcmdistill.diffusion.types import Batch
from lcmdistill.utils.device import copy_to_device


def skipping_grid_options(objective: Any, num_steps: int) -> Mapping[str, Any]:
    """Return `original_inference_steps` of an LCMScheduler or a TCDScheduler; {} where diffusers' default fits.

    These schedulers place that many time steps T / n apart, the last at T - 1, and sample at a choice of them. A student
    that was trained on the grid of every k-th step must be sampled there and nowhere else.

    Args:
        objective: The run's objective; methods without `skip` or `grid_intervals` keep diffusers' default.
        num_steps: T, the number of the teacher's time steps.
    """
    skip, intervals = getattr(objective, "skip", None), getattr(objective, "grid_intervals", None)
    count = min(MAX_SAMPLED_STEPS, num_steps)
    if intervals is not None:
        count = sampled_steps(num_steps, intervals)
    elif skip is not None and num_steps > skip:
        if objective.times == "grid":
            count = num_steps // skip
        elif skip > num_steps // MAX_SAMPLED_STEPS:
            # Trained at every time step from k to T - 1: the densest grid whose steps all lie there.
            count = next(num_steps // gap for gap in range(skip + 1, num_steps + 1) if num_steps % gap == 0)
    return {} if count == MAX_SAMPLED_STEPS else {"original_inference_steps": count}


def most_steps(scheduler_options: Mapping[str, Any]) -> int:
    """Return the largest number of sampling steps of a scheduler with the options of `skipping_grid_options`."""
    return scheduler_options.get("original_inference_steps", MAX_SAMPLED_STEPS)


def sample_times(schedule: NoiseSchedule, skip: int, times: str, rng: Rng) -> tuple[Tensor, Tensor]:
    """Draw pairs (t, s) that are k time steps apart; both (B,), and s is never below the first time.

    Args:
        schedule: The teacher's schedule with T time steps.
        skip: k, the skipping interval.
        times: "grid" draws t from the T // k points of the DDIM grid (public scripts); "all" draws it from every step
            k .. T - 1 (Luo et al. 2023, Alg. 1).
        rng: The draws of the micro-batch.

    Raises:
        ValueError: `times` is neither of them.
    """
    if times == "grid":
        grid = ddim_grid(schedule.num_steps, skip)
        i = copy_to_device(grid, rng.device)[rng.integers("times", len(grid))]
    elif times == "all":
        i = skip + rng.integers("times", schedule.num_steps - skip)
    else:
        raise ValueError(f"times is {times!r}; choose from grid, all")
    steps = copy_to_device(schedule.grid(schedule.num_steps), rng.device)
    return steps[i], steps[(i - skip).clamp(min=0)]


def sample_end_time(schedule: NoiseSchedule, s: Tensor, rng: Rng) -> Tensor:
    """Draw s' from the schedule's time steps up to s, (B,)."""
    steps = copy_to_device(schedule.grid(schedule.num_steps), rng.device)
    count = torch.searchsorted(steps, s.contiguous()) + 1
    return steps[(rng.uniform("end", fresh=True) * count).long().clamp(max=count - 1)]


def noise_level_fraction(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the position of t between the schedule's first time, 0, and its last, 1, (B,) fp32."""
    steps = copy_to_device(schedule.grid(schedule.num_steps).to(t.dtype), t.device)
    return torch.searchsorted(steps, t.contiguous()).float() / schedule.num_steps


def noise_ratio(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return sigma / alpha, (B,); finite at zero-terminal SNR, too."""
    return (schedule.sigma(t) / schedule.alpha(t).clamp(min=1e-4)).view(-1)


def sample_omega(guidance: str, w_min: float, w_max: float, rng: Rng) -> Tensor | None:
    """Draw omega per sample, (B,) fp32; None where guidance is "free"."""
    return None if guidance == "free" else draw_omega(w_min, w_max, rng)


def sample_start(
    schedule: NoiseSchedule, batch: Batch, t: Tensor, w: Tensor | None, rng: Rng
) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's start z_t, (B, C, h, w), and the omega of its step.

    Where the batch has the teacher's trajectories, both are theirs. Otherwise the latents are noised.

    Args:
        schedule: The teacher's schedule.
        batch: The samples.
        t: The times, (B,).
        w: The omega that was drawn, (B,); None without guidance.
        rng: The draws of the micro-batch.
    """
    if batch.trajectory is not None:
        return batch.trajectory.at(schedule, batch.latents, t), batch.trajectory.omega
    return schedule.diffuse(batch.latents, rng.normal("noise", batch.latents.shape[1:]), t), w


def draw_omega(w_min: float, w_max: float, rng: Rng) -> Tensor:
    """Draw omega per sample, (B,) fp32."""
    return w_min + (w_max - w_min) * rng.uniform("omega", fresh=True)


def loss_function(distance: str, lpips_weights: str | None, device: torch.device) -> LossFunction:
    """Return the distance that a key names; "lpips" is a network that is loaded once from `lpips_weights`."""
    return DISTANCES[distance] if lpips_weights is None else perceptual_distance(lpips_weights, device)


def teacher_forwards(solver: str, guidance: str) -> int:
    """Count the teacher forwards per sample of one solver step; guidance doubles them."""
    return SOLVERS[solver].evaluations * (1 if guidance == "free" else 2)


def check_skip(skip: int, times: str, num_steps: int) -> None:
    """Check that k is from 1 to T - 1, and that it divides T on the grid, so that the last time step is trained."""
    if not 1 <= skip < num_steps:
        raise ValueError(f"objective.skip (k) is {skip}; it must be from 1 to {num_steps - 1}")
    if times == "grid" and num_steps % skip:
        divisors = [k for k in range(1, num_steps) if num_steps % k == 0]
        near = [max(k for k in divisors if k < skip), *[k for k in divisors if k > skip][:1]]
        raise ValueError(
            f"objective.skip (k) is {skip}, which does not divide T = {num_steps}, so t = {num_steps - 1}, "
            f'where sampling starts, is never trained; try {" or ".join(map(str, near))}, or objective.times = "all"'
        )


def check_omega(w_min: float, w_max: float) -> None:
    """Check that 0 <= w_min <= w_max."""
    if w_min < 0:
        raise ValueError(f"objective.w_min is {w_min}; omega, which is guidance_scale - 1, must be at least 0")
    if not w_min <= w_max:
        raise ValueError(f"objective.w_min is {w_min}, above objective.w_max, {w_max}; swap or lower it")


def check_decay(name: str, mu: float) -> None:
    """Check that 0 <= mu < 1."""
    if not 0.0 <= mu < 1.0:
        raise ValueError(f"objective.{name} is {mu}; it must be at least 0 and below 1")


def check_solver(solver: str) -> None:
    """Check that the solver is a key of SOLVERS."""
    if solver not in SOLVERS:
        raise ValueError(f"objective.solver is {solver!r}; choose from {', '.join(SOLVERS)}")


def check_curriculum(curriculum_steps: int | None, p_std: float) -> None:
    """Check the length of a curriculum, and the spread of a lognormal of noise levels."""
    if curriculum_steps is not None and curriculum_steps < 1:
        raise ValueError(f"objective.curriculum_steps (K) is {curriculum_steps}; it must be at least 1")
    if p_std <= 0:
        raise ValueError(f"objective.p_std is {p_std}; it must be above 0")


def check_lpips(distance: str, weights: str | None) -> None:
    """Check that LPIPS comes with weights, and weights with LPIPS."""
    if distance == "lpips" and weights is None:
        raise ValueError(
            "objective.distance is lpips, which needs objective.lpips_weights: torchvision's file of AlexNet"
        )
    if distance != "lpips" and weights is not None:
        raise ValueError(
            f"objective.lpips_weights is set but objective.distance is {distance}; set it to lpips, or remove the weights"
        )
