"""Consistency Distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import EMPTY_PROMPTS, MethodInfo, State
from lcmdistill.objectives.common import (
    check_decay,
    check_lpips,
    check_solver,
    loss_function,
    sample_start,
    teacher_forwards,
)
from lcmdistill.objectives.pairs import consistency_pair
from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Consistency Distillation (Song et al. 2023, arXiv:2303.01469, Algorithm 2): neighbors on a grid, no guidance.

    Both networks of a pair have the same dropout mask.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="cd",
        title="consistency model",
        lora_title="consistency LoRA",
        paper="Song et al. 2023, arXiv:2303.01469",
        algorithm="Algorithm 2",
        spaces=("latent", "pixel"),
        summary="{solver} solver, N = {scales}",
        defaults=EMPTY_PROMPTS,
    )
    scales: int = 51
    "N, points of the grid: 18 or 40 in the paper; 51 points lie 20 Stable Diffusion time steps apart"
    solver: str = "heun"
    "PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l1", "l2", "lpips"] = "l2"
    "l2, l1 or LPIPS (paper), or pseudo-Huber"
    lpips_weights: str | None = None
    "LPIPS weights: torchvision's file alexnet-owt-7be5be79.pth; for pixel-space teachers only"
    ema_decay: float = 0.95
    "mu, decay of the target's EMA; 0 uses the live student as the target"
    same_dropout: ClassVar[bool] = True
    omega: ClassVar[Literal["none"]] = "none"

    @property
    def grid_intervals(self) -> int:
        """N - 1."""
        return self.scales - 1

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": teacher_forwards(self.solver, "free"), "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        if self.scales < 2:
            raise ValueError(f"objective.scales (N) is {self.scales}; a grid has at least 2 points")
        check_decay("ema_decay", self.ema_decay)
        check_solver(self.solver)
        check_lpips(self.distance, self.lpips_weights)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        grid, n = copy_to_device(schedule.grid(self.scales), rng.device), rng.integers("times", self.scales - 1)
        return grid[n + 1], grid[n]

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> State:
        t, s = self.sample_timesteps(schedule, rng)
        z_t, _ = sample_start(schedule, batch, t, None, rng)
        z_s = SOLVERS[self.solver](teacher.denoiser(batch.cond, None), schedule, z_t, t, s)
        return State(t=t, s=s, z_t=z_t, z_s=z_s)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State) -> Tensor:
        prediction, goal = consistency_pair(student, target, schedule, batch, state)
        return loss_function(self.distance, self.lpips_weights, prediction.device)(prediction, goal)
