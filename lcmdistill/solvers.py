"""PF-ODE solvers: one step z_t -> z_s each, vectorised over per-sample t and s.

A solver sees a denoiser (z, t) -> (x0, eps) and nothing of networks, prompts or guidance, and may ask it as often as its
order needs. z: (B, C, h, w) fp32; t, s: (B,) int64 in [0, T), s <= t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcmdistill.prediction import X0Eps
from lcmdistill.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], X0Eps]
Solver = Callable[[Denoiser, NoiseSchedule, Tensor, Tensor, Tensor], Tensor]


def ddim(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM, first order (Song et al. 2021, arXiv:2010.02502, Eq. 12 with eta = 0): alpha_s x0 + sigma_s eps."""
    x0, eps = denoiser(z, t)
    return schedule.alpha(s) * x0 + schedule.sigma(s) * eps


def euler(denoiser: Denoiser, schedule: NoiseSchedule, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Euler, first order, in sigma space (Karras et al. 2022, Alg. 1 without its correction).

    With y = z / alpha and rho = sigma / alpha the PF-ODE is dy/drho = eps, hence y_s = y_t + (rho_s - rho_t) eps. On a
    VP schedule this is DDIM where (x0, eps) agree with z_t. Where alpha_t = 0, rho is infinite and the step is DDIM's.
    """
    x0, eps = denoiser(z, t)
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    ratio = alpha_s / torch.where(alpha_t > 0, alpha_t, torch.ones_like(alpha_t))
    step = ratio * z + (sigma_s - ratio * sigma_t) * eps
    return torch.where(alpha_t > 0, step, alpha_s * x0 + sigma_s * eps)


SOLVERS: dict[str, Solver] = {"ddim": ddim, "euler": euler}
