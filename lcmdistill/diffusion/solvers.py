"""PF-ODE solvers: each is one step z_t -> z_s, vectorized over per-sample t and s.

A solver calls a denoiser (z, t) -> (x0, eps) as often as its order needs, and knows no networks, prompts or guidance.
z: (B, C, h, w) fp32; t, s: (B,), s <= t, in the unit of the schedule. The DPM-Solvers evaluate the midpoint in
lambda = log(alpha / sigma), which is rarely an integer time step: the network then gets the fraction, and a VP schedule is
interpolated. Where alpha_t = 0 (zero-terminal SNR), lambda and sigma / alpha are infinite; where sigma_s = 0, no noise is
left to predict. Every solver takes DDIM's step there.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.schedules import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], X0Eps]


class Solver(Protocol):
    """One step of a PF-ODE solver.

    Attributes:
        evaluations: How often it calls the denoiser.
        order: Its order: the global error is O(h^order).
    """

    evaluations: int
    order: int

    def __call__(self, denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor, /) -> Tensor:
        """Return z_s, (B, C, h, w) fp32."""
        ...


def solver_of(evaluations: int, order: int) -> Callable[[Callable[..., Tensor]], Solver]:
    """Declare how often a solver calls its denoiser, which a test counts, and its order, which a test measures."""

    def declare(step: Callable[..., Tensor]) -> Solver:
        declared: Any = step
        declared.evaluations, declared.order = evaluations, order
        return declared

    return declare


@solver_of(evaluations=1, order=1)
def ddim(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM, first order (Song et al. 2021, arXiv:2010.02502, Eq. 12 with eta = 0): alpha_s x0 + sigma_s eps."""
    return schedule.diffuse(*denoiser(z, t), s)


@solver_of(evaluations=1, order=1)
def euler(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Euler, first order, in sigma space (Karras et al. 2022, Alg. 1 without its correction).

    On a VP schedule this is DDIM where (x0, eps) agree with z_t.
    """
    x0, eps = denoiser(z, t)
    return _where_finite(schedule, t, s, _along_eps(schedule, z, eps, t, s), schedule.diffuse(x0, eps, s))


@solver_of(evaluations=2, order=2)
def heun(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun, second order, in sigma space (Karras et al. 2022, Alg. 1): Euler's step with the mean eps of its two ends."""
    x0, eps = denoiser(z, t)
    end = _where_finite(schedule, t, s, _along_eps(schedule, z, eps, t, s), schedule.diffuse(x0, eps, s))
    mean = (eps + denoiser(end, s).eps) / 2
    return _where_finite(schedule, t, s, _along_eps(schedule, z, mean, t, s), end)


@solver_of(evaluations=2, order=2)
def dpm_solver(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DPM-Solver-2, second order, single step (Lu et al. 2022, arXiv:2206.00927, Alg. 1 with r1 = 1/2)."""
    first, m = denoiser(z, t), _midpoint(schedule, t, s)
    u = _along_eps(schedule, z, first.eps, t, m)
    step = _along_eps(schedule, z, denoiser(u, m).eps, t, s)
    return _where_finite(schedule, t, s, step, schedule.diffuse(*first, s))


@solver_of(evaluations=2, order=2)
def dpm_solver_pp(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DPM-Solver++(2S), second order, single step (Lu et al. 2022b, arXiv:2211.01095, Alg. 1 with r = 1/2)."""
    first, m = denoiser(z, t), _midpoint(schedule, t, s)
    u = _along_x0(schedule, z, first.x0, t, m)
    step = _along_x0(schedule, z, denoiser(u, m).x0, t, s)
    return _where_finite(schedule, t, s, step, schedule.diffuse(*first, s))


def _along_eps(schedule: NoiseSchedule, z: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return z_s for a constant eps: with y = z / alpha and rho = sigma / alpha the PF-ODE is dy/drho = eps.

    In lambda this reads alpha_s / alpha_t z - sigma_s (e^h - 1) eps, h = lambda_s - lambda_t (Lu et al. 2022, Eq. 3.7).
    """
    ratio = schedule.alpha(s) / _or_one(schedule.alpha(t))
    return ratio * z + (schedule.sigma(s) - ratio * schedule.sigma(t)) * eps


def _along_x0(schedule: NoiseSchedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return z_s for a constant x0: sigma_s / sigma_t z - alpha_s (e^-h - 1) x0 (Lu et al. 2022b, Eq. 8)."""
    ratio = schedule.sigma(s) / _or_one(schedule.sigma(t))
    return ratio * z + (schedule.alpha(s) - ratio * schedule.alpha(t)) * x0


def _midpoint(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """The time halfway between t and s in lambda, (B,)."""
    # alpha_t sigma_s = 0 is not stepped from or to; any time will do there.
    lambdas = [(_or_one(schedule.alpha(x)) / _or_one(schedule.sigma(x))).log() for x in (t, s)]
    return schedule.time_of((lambdas[0] + lambdas[1]).view(-1) / 2)


def _where_finite(schedule: NoiseSchedule, t: Tensor, s: Tensor, step: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where((schedule.alpha(t) > 0) & (schedule.sigma(s) > 0), step, otherwise)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def solve(denoiser: Denoiser, schedule: NoiseSchedule, noise: Tensor, points: int, solver: Solver = heun) -> Tensor:
    """Solve the PF-ODE from pure noise to clean images along the schedule's grid; returns (B, C, h, w) fp32.

    On Karras's schedule with Heun this is EDM's deterministic sampler of N = points steps (Karras et al. 2022, Alg. 1): the
    last one, to sigma = 0, takes the network's x0. noise: (B, C, h, w), standard normal; points: from 2 to T.
    """
    times = schedule.grid(points).flip(0).to(noise.device)
    z = schedule.sigma(times[:1]) * noise
    for t, s in pairwise(times):
        z = solver(denoiser, schedule, z, t.expand(len(z)), s.expand(len(z)))
    return denoiser(z, times[-1:].expand(len(z))).x0
