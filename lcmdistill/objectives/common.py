"""What the objectives share: the teacher's step, the draws of times and omega, and the checks of fields that many have.

Shapes: B batch, T number of the teacher's time steps, N number of points of a grid.
"""

import torch
from torch import Tensor

from lcmdistill.diffusion.losses import DISTANCES, LossFunction
from lcmdistill.diffusion.parameterization import X0Eps, guided
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule, ddim_grid
from lcmdistill.diffusion.solvers import SOLVERS, Denoiser
from lcmdistill.diffusion.types import Conditioning, Networks
from lcmdistill.utils.device import copy_to_device


def teacher_denoiser(models: Networks, cond: Conditioning, w: Tensor | None) -> Denoiser:
    """The teacher as a denoiser, under classifier-free guidance unless w is None; both prompts go through in one forward.

    Guidance acts on (x0, eps) at every evaluation. For DDIM and Euler this equals guiding the solver's increment as Luo et
    al. 2023, Eq. 14 writes it. A solver of two evaluations asks a second time where the guided first has led: it follows
    the guided model's own PF-ODE, to its order, and not the sum of two steps of unguided ones. w: (B,) fp32.
    """

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        if w is None:
            return models.teacher(z, t, cond, None)
        both = cond.cat(cond.with_prompt(models.null))
        x0, eps = models.teacher(torch.cat([z, z]), torch.cat([t, t]), both, None)
        (x0_cond, x0_null), (eps_cond, eps_null) = x0.chunk(2), eps.chunk(2)
        return guided(X0Eps(x0_cond, eps_cond), X0Eps(x0_null, eps_null), w)

    return denoiser


def sample_times(schedule: NoiseSchedule, skip: int, times: str, rng: Rng) -> tuple[Tensor, Tensor]:
    """The pairs (t, s), k of the schedule's T time steps apart; both (B,), s = the first time where t is not k above it.

    times: "grid" draws t from the T // k points of the DDIM grid (the public scripts); "all" from every step k .. T - 1
    (Luo et al. 2023, Alg. 1).
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
    """s' <= s, any of the schedule's time steps up to s, (B,) as s."""
    steps = copy_to_device(schedule.grid(schedule.num_steps), rng.device)
    count = torch.searchsorted(steps, s.contiguous()) + 1
    return steps[(rng.uniform("end") * count).long().clamp(max=count - 1)]


def noise_level_fraction(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Where t is between the schedule's first time, 0, and its last, 1: its place among the T steps over T, (B,) fp32."""
    steps = copy_to_device(schedule.grid(schedule.num_steps).to(t.dtype), t.device)
    return torch.searchsorted(steps, t.contiguous()).float() / schedule.num_steps


def sample_omega(guidance: str, w_min: float, w_max: float, rng: Rng) -> Tensor | None:
    """omega, one per sample, (B,) fp32; None where guidance is left "free"."""
    return None if guidance == "free" else w_min + (w_max - w_min) * rng.uniform("omega")


def distance_of(name: str, models: Networks) -> LossFunction:
    """The distance of a name; "lpips" is the models' own, which has weights."""
    if name != "lpips":
        return DISTANCES[name]
    if models.perceptual is None:
        raise ValueError("objective.distance is lpips, and its weights were not given")
    return models.perceptual


def check_skip(skip: int, times: str, num_steps: int) -> None:
    """k is from 1 to T - 1, and on the grid divides T, so that the last time step is among its points."""
    if not 1 <= skip < num_steps:
        raise ValueError(f"objective.skip (k) is {skip}; it must be from 1 to {num_steps - 1}")
    if times == "grid" and num_steps % skip:
        divisors = [k for k in range(1, num_steps) if num_steps % k == 0]
        near = [max(k for k in divisors if k < skip), *[k for k in divisors if k > skip][:1]]
        raise ValueError(
            f"objective.skip (k) is {skip}, which does not divide T = {num_steps}, so that t = {num_steps - 1}, "
            f'where drawing starts, is never trained; try {" or ".join(map(str, near))}, or objective.times = "all"'
        )


def check_omega(w_min: float, w_max: float) -> None:
    """0 <= w_min <= w_max."""
    if w_min < 0:
        raise ValueError(f"objective.w_min is {w_min}; omega, which is guidance_scale - 1, must be at least 0")
    if not w_min <= w_max:
        raise ValueError(f"objective.w_min is {w_min}, above objective.w_max, {w_max}; swap or lower it")


def check_decay(name: str, mu: float) -> None:
    """0 <= mu < 1."""
    if not 0.0 <= mu < 1.0:
        raise ValueError(f"objective.{name} is {mu}; it must be at least 0 and below 1")


def check_solver(solver: str) -> None:
    """A key of SOLVERS."""
    if solver not in SOLVERS:
        raise ValueError(f"objective.solver is {solver!r}; choose from {', '.join(SOLVERS)}")


def check_lpips(distance: str, weights: str | None) -> None:
    """LPIPS comes with weights, and weights with LPIPS."""
    if distance == "lpips" and weights is None:
        raise ValueError(
            "objective.distance is lpips, which needs objective.lpips_weights: torchvision's file of AlexNet"
        )
    if distance != "lpips" and weights is not None:
        raise ValueError(
            f"objective.lpips_weights is given, and objective.distance is {distance}; say lpips, or leave it"
        )
