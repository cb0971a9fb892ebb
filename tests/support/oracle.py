"""The closed-form oracle: data whose every element is N(mean, std^2), for which all that is learnt is known exactly.

With v_t = alpha_t^2 std^2 + sigma_t^2 the marginal is z_t ~ N(alpha_t mean, v_t), so that the denoiser is linear in z_t
and the PF-ODE keeps (z_t - alpha_t mean) / sqrt(v_t). Guidance, c + w (c - null), of two such data sets of equal std is
again one, with mean_c + w (mean_c - mean_null): its consistency function is known as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule, VPSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, TeacherNetwork


@dataclass(frozen=True)
class Networks:
    """What an objective's two functions are given."""

    schedule: NoiseSchedule
    teacher: TeacherNetwork
    student: Network
    target: Network

    def loss(self, objective: Any, batch: Batch, rng: Rng) -> Tensor:
        """The teacher's part, without gradients, then the loss of each sample, (B,)."""
        with torch.no_grad():
            state = objective.teacher_step(self.teacher, self.schedule, batch, rng)
        return objective.loss(self.student, self.target, self.schedule, batch, state)

    def with_network(self, role: str, network: Network) -> "Networks":
        """The same with another network in one of the roles."""
        other: Any = replace(self.teacher, network=network) if role == "teacher" else network
        return replace(self, **{role: other})

    def network(self, role: str) -> Network:
        """The network of a role."""
        return self.teacher.network if role == "teacher" else getattr(self, role)


@dataclass(frozen=True)
class Gaussian:
    """mean: a number or (B, 1, 1, 1); std: of the data."""

    mean: Tensor | float
    std: float = 0.5

    def variance(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        return schedule.alpha(t) ** 2 * self.std**2 + schedule.sigma(t) ** 2

    def denoise(self, schedule: NoiseSchedule, z: Tensor, t: Tensor) -> X0Eps:
        """E[x0 | z_t] and E[eps | z_t]."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        residual = (z - alpha * self.mean) / self.variance(schedule, t).clamp(
            min=1e-30
        )  # 0 for one image without noise
        return X0Eps(self.mean + alpha * self.std**2 * residual, sigma * residual)

    def flow(self, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """z_s, where the PF-ODE takes z_t. To s = 0, the start of the table, it is the consistency function."""
        shrink = (self.variance(schedule, s) / self.variance(schedule, t).clamp(min=1e-30)).sqrt()
        return schedule.alpha(s) * self.mean + shrink * (z - schedule.alpha(t) * self.mean)


def smooth_schedule(num_steps: int) -> VPSchedule:
    """alpha = cos(theta), sigma = sin(theta), theta linear in t from .2 to 1.45, in float64.

    The betas of Stable Diffusion bend sigma like sqrt(t) near t = 0 and fp32 tables round it, both of which hide a
    solver's order until its steps are very small.
    """
    theta = torch.linspace(0.2, 1.45, num_steps, dtype=torch.float64)
    return VPSchedule(theta.cos() ** 2)


def prompt_mean(c: Conditioning) -> Tensor:
    """The mean of the data that a prompt describes, (B, 1, 1, 1)."""
    return c["prompt_embeds"].mean((1, 2)).view(-1, 1, 1, 1)


def oracle_models(
    schedule: NoiseSchedule,
    null: Conditioning,
    std: float = 0.5,
    omega: bool = True,
    end: Tensor | None = None,
    baked: float = 0.0,
) -> Networks:
    """The exact teacher, and a student and a target whose c_skip z + c_out x0 is the exact consistency function.

    omega: False makes them the consistency function of the unguided teacher. end: times (B,); with them it is
    alpha_end x0 + sigma_end eps that is exact, the way from t to end. baked: the omega of networks that receive none.
    """

    def teacher(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        return Gaussian(prompt_mean(c), std).denoise(schedule, z, t)

    def student(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        mean = prompt_mean(c)
        if omega:
            mean = mean + (baked if w is None else w.view(-1, 1, 1, 1)) * (mean - prompt_mean(null))
        gaussian = Gaussian(mean, std)
        if end is not None:
            eps = gaussian.denoise(schedule, z, t).eps
            return X0Eps((gaussian.flow(schedule, z, t, end) - schedule.sigma(end) * eps) / schedule.alpha(end), eps)
        f = gaussian.flow(schedule, z, t, schedule.grid(2)[:1].expand_as(t))
        c_skip, c_out = schedule.boundary(t)
        x0 = torch.where(c_out > 0, (f - c_skip * z) / c_out.clamp(min=1e-6), f)  # at the first time f is z
        return X0Eps(x0, torch.full_like(x0, torch.nan))  # f is made of x0 alone

    return Networks(schedule, TeacherNetwork(teacher, null), student, student)


def scaled(network: Network, factor: Tensor) -> Network:
    """The network with a parameter: its output times `factor`, (1,)."""

    def with_factor(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        x0, eps = network(z, t, c, w)
        return X0Eps(x0 * factor, eps * factor)

    return with_factor


def slope(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The order of convergence: d log(error) / d log(step), fitted."""
    return float(np.polyfit([math.log(h) for h in steps], [math.log(e) for e in errors], 1)[0])
