"""The training objectives. Each is a frozen dataclass: its fields are the paper's hyper-parameters and its section of the
configuration, its `loss` is the paper's algorithm box, written on the pair (x0, eps).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lcmdistill.batch import Batch, Conditioning, Models, Network, Rng
from lcmdistill.consistency import consistency_function
from lcmdistill.distances import DISTANCES
from lcmdistill.prediction import X0Eps, guided
from lcmdistill.schedule import NoiseSchedule, ddim_grid
from lcmdistill.solvers import SOLVERS, Denoiser


class Objective(Protocol):
    """What the training loop asks of a method."""

    @property
    def ema_decay(self) -> float:
        """mu, the rate of the target's EMA; 0 makes the target the live student."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError, in one sentence, if the fields are impossible for a teacher of T = num_steps."""
        ...

    def loss(self, models: Models, batch: Batch, rng: Rng) -> Tensor:
        """The method's loss on each sample of a batch of clean latents, (B,) fp32, with gradients to the student only."""
        ...

    def noisiness(self, schedule: NoiseSchedule, rng: Rng) -> Tensor:
        """Where between clean, 0, and all noise, 1, `loss` takes each sample, (B,) fp32 in [0, 1): the same draw again."""
        ...


def guided_denoiser(teacher: Network, cond: Conditioning, null: Conditioning, w: Tensor) -> Denoiser:
    """The teacher under classifier-free guidance as a denoiser; both prompts go through in one forward.

    Guidance acts on (x0, eps) at every evaluation. For DDIM and Euler this equals guiding the solver's increment as Luo et
    al. 2023, Eq. 14 writes it. A solver of two evaluations asks a second time where the guided first has led: it follows
    the guided model's own PF-ODE, to its order, and not the sum of two steps of unguided ones. w: (B,) fp32.
    """

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        x0, eps = teacher(torch.cat([z, z]), torch.cat([t, t]), cond.cat(cond.with_prompt(null)), None)
        (x0_cond, x0_null), (eps_cond, eps_null) = x0.chunk(2), eps.chunk(2)
        return guided(X0Eps(x0_cond, eps_cond), X0Eps(x0_null, eps_null), w)

    return denoiser


def draw_times(num_steps: int, skip: int, times: str, rng: Rng) -> tuple[Tensor, Tensor]:
    """The pairs (t, s), k apart: the only place that draws them. Both (B,) int64, s = max(t - k, 0).

    times: "grid" draws t from the T // k points of the DDIM grid (the public scripts); "all" from every step k .. T - 1
    (Luo et al. 2023, Alg. 1).
    """
    if times == "grid":
        grid = ddim_grid(num_steps, skip)
        t = grid.to(rng.device)[rng.integers("times", len(grid))]
    elif times == "all":
        t = skip + rng.integers("times", num_steps - skip)
    else:
        raise ValueError(f"times is {times!r}; choose from grid, all")
    return t, (t - skip).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class LatentConsistency:
    """Latent Consistency Distillation (Luo et al. 2023, arXiv:2310.04378, Algorithm 1)."""

    skip: int = 20
    "k, the skipping step: how many of the teacher's time steps lie between z_t and z_s; 1 to T"
    times: Literal["grid", "all"] = "grid"
    "where t is drawn: the DDIM grid of T / k points (public scripts) or every step (paper)"
    w_min: float = 5.0
    "the smallest omega; omega is diffusers' guidance_scale - 1"
    w_max: float = 15.0
    "the largest omega"
    solver: str = "ddim"
    "the PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l2"] = "huber"
    "pseudo-Huber (public scripts) or l2 (paper)"
    ema_decay: float = 0.95
    "mu, the rate of the target's EMA; 0 makes the target the live student"

    def check(self, num_steps: int) -> None:
        if not 1 <= self.skip < num_steps:
            raise ValueError(f"objective.skip (k) is {self.skip}; it must be from 1 to {num_steps - 1}")
        if self.times == "grid" and num_steps % self.skip:
            divisors = [k for k in range(1, num_steps) if num_steps % k == 0]
            near = [max(k for k in divisors if k < self.skip), *[k for k in divisors if k > self.skip][:1]]
            raise ValueError(
                f"objective.skip (k) is {self.skip}, which does not divide T = {num_steps}, so that t = {num_steps - 1}, "
                f'where drawing starts, is never trained; try {" or ".join(map(str, near))}, or objective.times = "all"'
            )
        if self.w_min < 0:
            raise ValueError(f"objective.w_min is {self.w_min}; omega, which is guidance_scale - 1, must be at least 0")
        if not self.w_min <= self.w_max:
            raise ValueError(f"objective.w_min is {self.w_min}, above objective.w_max, {self.w_max}; swap or lower it")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"objective.ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.solver not in SOLVERS:
            raise ValueError(f"objective.solver is {self.solver!r}; choose from {', '.join(SOLVERS)}")

    def loss(self, models: Models, batch: Batch, rng: Rng) -> Tensor:
        schedule, x, c = models.schedule, batch.latents, batch.cond
        t, s = draw_times(schedule.num_steps, self.skip, self.times, rng)
        w = self.w_min + (self.w_max - self.w_min) * rng.uniform("omega")
        z_t = schedule.diffuse(x, rng.normal("noise", x.shape[1:]), t)
        with torch.no_grad():
            psi = guided_denoiser(models.teacher, c, models.null, w)
            z_s = SOLVERS[self.solver](psi, schedule, z_t, t, s)
            target = consistency_function(schedule, z_s, models.target(z_s, s, c, w).x0, s)
        prediction = consistency_function(schedule, z_t, models.student(z_t, t, c, w).x0, t)
        return DISTANCES[self.distance](prediction, target)

    def noisiness(self, schedule: NoiseSchedule, rng: Rng) -> Tensor:
        return draw_times(schedule.num_steps, self.skip, self.times, rng)[0].float() / schedule.num_steps


OBJECTIVES: dict[str, type[LatentConsistency]] = {"lcm": LatentConsistency}
