"""Consistency Training and Improved Consistency Training."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcmdistill.config.schema import TargetKind
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import EMPTY_PROMPTS, MethodInfo, State
from lcmdistill.objectives.common import check_curriculum, check_decay, check_lpips, loss_function, noise_ratio
from lcmdistill.objectives.pairs import consistency_pair, same_noise
from lcmdistill.utils.device import copy_to_device


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining:
    """Consistency Training (Song et al. 2023, arXiv:2303.01469, Algorithm 3): no teacher, and a grid that becomes finer.

    z_t and z_s have the same noise. The student starts at the teacher's weights and never evaluates it. Both networks of a
    pair have the same dropout mask.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="ct",
        title="consistency model",
        lora_title="consistency LoRA",
        paper="Song et al. 2023, arXiv:2303.01469",
        algorithm="Algorithm 3",
        relation="trained from",
        spaces=("latent", "pixel"),
        summary="N growing to {s1}",
        defaults=EMPTY_PROMPTS,
        mutable_on_resume=("curriculum_steps",),
    )
    growth: Literal["sqrt", "doubling"] = "sqrt"
    "growth of the grid: from s0 to s1 + 1 points (Song et al. 2023, app. C), or from s0 + 1 by doubling (iCT)"
    s0: int = 2
    "intervals of the first grid"
    s1: int = 150
    "intervals of the last grid"
    curriculum_steps: int | None = None
    "K, optimizer steps over which the grid grows; default: the whole run"
    mu0: float = 0.9
    "mu on the first grid, which determines mu(N); 0 uses the live student as the target"
    times: Literal["uniform", "lognormal"] = "uniform"
    "distribution of t on the grid: uniform, or a discretized lognormal of sigma (iCT)"
    p_mean: float = -1.1
    "mean of ln sigma of the lognormal"
    p_std: float = 2.0
    "standard deviation of ln sigma of the lognormal"
    weighting: Literal["uniform", "inverse"] = "uniform"
    "weight of a pair's loss: 1, or 1 / (sigma_t - sigma_s) (iCT)"
    distance: Literal["huber", "norm-huber", "l1", "l2", "lpips"] = "l2"
    "l2, l1 or LPIPS (Song et al. 2023), pseudo-Huber, or pseudo-Huber of the difference's norm (iCT)"
    lpips_weights: str | None = None
    "LPIPS weights: torchvision's file alexnet-owt-7be5be79.pth; for pixel-space teachers only"
    same_dropout: ClassVar[bool] = True
    omega: ClassVar[Literal["none"]] = "none"

    def scales(self, step: int) -> int:
        """Return N(k), the number of grid points at a step (Song et al. 2023, app. C; Song & Dhariwal 2023, sec. 3.4)."""
        whole = self.curriculum_steps or 1
        if self.growth == "doubling":
            each = max(1, int(whole / (math.log2(self.s1 // self.s0) + 1)))
            return min(self.s0 * 2 ** min(step // each, 64), self.s1) + 1
        k = min(step, whole) / whole
        return math.ceil(math.sqrt(k * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1) + 1

    @property
    def grid_intervals(self) -> int:
        """N - 1 of the last grid."""
        return self.s1

    def ema_decay_at(self, step: int) -> float:
        """Return exp(s0 ln mu0 / N(k)) with N(k) intervals (Song et al. 2023, app. C)."""
        return self.mu0 ** (self.s0 / (self.scales(step) - 1))

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": 0, "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        if not 1 <= self.s0 <= self.s1:
            raise ValueError(f"objective.s0 is {self.s0} and objective.s1 {self.s1}; they must be 1 <= s0 <= s1")
        if self.growth == "sqrt" and self.s0 < 2:
            raise ValueError(
                "objective.s0 is 1, a first grid of one point; it must be at least 2 where objective.growth is sqrt"
            )
        check_curriculum(self.curriculum_steps, self.p_std)
        check_decay("mu0", self.mu0)
        check_lpips(self.distance, self.lpips_weights)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        grid = copy_to_device(schedule.grid(self.scales(rng.step)), rng.device)
        n = self._draw(schedule, grid, rng)
        return grid[n + 1], grid[n]

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> State:
        t, s = self.sample_timesteps(schedule, rng)
        return same_noise(schedule, batch, t, s, rng)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State) -> Tensor:
        prediction, goal = consistency_pair(student, target, schedule, batch, state)
        distance = loss_function(self.distance, self.lpips_weights, prediction.device)(prediction, goal)
        return self._weight(schedule, state.t, state.s) * distance

    def _draw(self, schedule: NoiseSchedule, grid: Tensor, rng: Rng) -> Tensor:
        if self.times == "uniform":
            return rng.integers("times", len(grid) - 1)
        # p(n) ~ erf((ln sigma_n+1 - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_n - P_mean) / ...): iCT, sec. 3.5
        mass = torch.erf((noise_ratio(schedule, grid).log() - self.p_mean) / (math.sqrt(2.0) * self.p_std)).diff()
        share = mass.cumsum(0) / mass.sum()
        return torch.searchsorted(share, rng.uniform("times"), right=True).clamp(max=len(mass) - 1)

    def _weight(self, schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return torch.ones_like(t, dtype=torch.float32)
        return 1.0 / (noise_ratio(schedule, t) - noise_ratio(schedule, s)).float()


@dataclass(frozen=True, kw_only=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """Consistency Training with the settings of iCT (Song & Dhariwal 2023, arXiv:2310.14189, Table 1)."""

    info: ClassVar[MethodInfo] = MethodInfo(
        key="ict",
        title="consistency model",
        lora_title="consistency LoRA",
        paper="Song & Dhariwal 2023, arXiv:2310.14189",
        algorithm="Table 1",
        relation="trained from",
        spaces=("latent", "pixel"),
        summary="N growing to {s1}",
        defaults={**EMPTY_PROMPTS, "student.target": TargetKind.live},
        mutable_on_resume=("curriculum_steps",),
    )
    growth: Literal["sqrt", "doubling"] = "doubling"
    s0: int = 10
    s1: int = 1280
    mu0: float = 0.0
    times: Literal["uniform", "lognormal"] = "lognormal"
    weighting: Literal["uniform", "inverse"] = "inverse"
    distance: Literal["huber", "norm-huber", "l1", "l2", "lpips"] = "norm-huber"
