"""Latent Consistency Distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import MethodInfo, State
from lcmdistill.objectives.common import (
    check_decay,
    check_omega,
    check_skip,
    check_solver,
    sample_omega,
    sample_start,
    sample_times,
    teacher_forwards,
)
from lcmdistill.objectives.pairs import consistency_pair


@dataclass(frozen=True, kw_only=True)
class LatentConsistency:
    """Latent Consistency Distillation (Luo et al. 2023, arXiv:2310.04378, Algorithm 1)."""

    info: ClassVar[MethodInfo] = MethodInfo(
        key="lcm",
        title="LCM",
        lora_title="LCM-LoRA",
        paper="Luo et al. 2023, arXiv:2310.04378",
        algorithm="Algorithm 1",
        tags=("lcm", "latent-consistency-model"),
        summary="{solver} solver, k = {skip}",
        decided_by_teacher=("w_min", "w_max"),
    )
    skip: int = 20
    "skipping interval k: teacher time steps between z_t and z_s, from 1 to T - 1; a divisor of T on the grid"
    times: Literal["grid", "all"] = "grid"
    "where t is drawn from: the DDIM grid of T / k points (public scripts) or all steps (paper)"
    guidance: Literal["baked", "free"] = "baked"
    "baked: guidance is distilled into the student; free: CFG and negative prompts still work at sampling time"
    w_min: float = 5.0
    "smallest omega; omega is guidance scale - 1"
    w_max: float = 15.0
    "largest omega"
    solver: str = "ddim"
    "PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l1", "l2"] = "huber"
    "pseudo-Huber (public scripts), l2 (paper) or l1"
    ema_decay: float = 0.95
    "mu, decay of the target's EMA; 0 uses the live student as the target"
    same_dropout: ClassVar[bool] = False

    @property
    def omega(self) -> Literal["input", "none"]:
        return "none" if self.guidance == "free" else "input"

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": teacher_forwards(self.solver, self.guidance), "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        check_skip(self.skip, self.times, num_steps)
        check_omega(self.w_min, self.w_max)
        check_decay("ema_decay", self.ema_decay)
        check_solver(self.solver)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        return sample_times(schedule, self.skip, self.times, rng)

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> State:
        t, s = self.sample_timesteps(schedule, rng)
        w = sample_omega(self.guidance, self.w_min, self.w_max, rng)
        z_t, w = sample_start(schedule, batch, t, w, rng)
        z_s = SOLVERS[self.solver](teacher.denoiser(batch.cond, w), schedule, z_t, t, s)
        return State(t=t, s=s, z_t=z_t, z_s=z_s, w=w)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State) -> Tensor:
        prediction, goal = consistency_pair(student, target, schedule, batch, state)
        return DISTANCES[self.distance](prediction, goal)
