"""Helpers that several tests share."""

from collections.abc import Callable

import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.parameterization import X0Eps, to_x0_eps
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.solvers import Denoiser

ORDER = {name: solver.order for name, solver in SOLVERS.items()}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network_denoiser(schedule: NoiseSchedule, kind: str) -> tuple[Denoiser, Callable[[Tensor, Tensor], Tensor]]:
    """A made-up network of a prediction type, as (x0, eps) and raw."""

    def raw(z: Tensor, t: Tensor) -> Tensor:
        return (1.3 * z.roll(1, -1) + t.view(-1, 1, 1, 1) / 500).sin()

    def denoiser(z: Tensor, t: Tensor) -> X0Eps:
        return to_x0_eps(raw(z, t), z, schedule.alpha(t), schedule.sigma(t), kind)

    return denoiser, raw
