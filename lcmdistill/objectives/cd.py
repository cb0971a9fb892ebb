"""Consistency Distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.solvers import SOLVERS
from lcmdistill.diffusion.types import Batch, Networks
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.objectives.common import check_decay, check_lpips, check_solver, distance_of, teacher_denoiser
from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Consistency Distillation (Song et al. 2023, arXiv:2303.01469, Algorithm 2): neighbours on a grid, no guidance.

    Both networks of a pair have the same dropout mask.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="cd",
        title="consistency model",
        lora_title="consistency LoRA",
        paper="Song et al. 2023, arXiv:2303.01469",
        algorithm="Algorithm 2",
        spaces=("latent", "pixel"),
    )
    scales: int = 51
    "N, the points of the grid: 18 or 40 in the paper; 51 lie 20 of Stable Diffusion's time steps apart"
    solver: str = "heun"
    "the PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l1", "l2", "lpips"] = "l2"
    "l2, l1 or LPIPS (paper), or pseudo-Huber"
    lpips_weights: str | None = None
    "file of LPIPS's network, torchvision's alexnet-owt-7be5be79.pth; for teachers of images, not of latents"
    ema_decay: float = 0.95
    "mu, the rate of the target's EMA; 0 makes the target the live student"
    same_dropout: ClassVar[bool] = True
    omega: ClassVar[Literal["none"]] = "none"

    def mu(self, step: int) -> float:
        return self.ema_decay

    def check(self, num_steps: int) -> None:
        if self.scales < 2:
            raise ValueError(f"objective.scales (N) is {self.scales}; a grid has at least 2 points")
        check_decay("ema_decay", self.ema_decay)
        check_solver(self.solver)
        check_lpips(self.distance, self.lpips_weights)

    def pair(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        grid, n = copy_to_device(schedule.grid(self.scales), rng.device), rng.integers("times", self.scales - 1)
        return grid[n + 1], grid[n]

    def loss(self, models: Networks, batch: Batch, rng: Rng) -> Tensor:
        schedule, x, c = models.schedule, batch.latents, batch.cond
        t, s = self.pair(schedule, rng)
        z_t = schedule.diffuse(x, rng.normal("noise", x.shape[1:]), t)
        with torch.no_grad():
            z_s = SOLVERS[self.solver](teacher_denoiser(models, c, None), schedule, z_t, t, s)
            models.seed_dropout(rng)
            target = consistency_function(schedule, z_s, models.target(z_s, s, c, None).x0, s)
        models.seed_dropout(rng)
        prediction = consistency_function(schedule, z_t, models.student(z_t, t, c, None).x0, t)
        return distance_of(self.distance, models)(prediction, target)
