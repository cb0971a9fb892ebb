"""Trajectory Consistency Distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import TRAILING_DDIM, EndState, MethodInfo
from lcmdistill.objectives.common import (
    check_decay,
    check_omega,
    check_skip,
    check_solver,
    sample_end_time,
    sample_omega,
    sample_start,
    sample_times,
    teacher_forwards,
)


@dataclass(frozen=True, kw_only=True)
class TrajectoryConsistency:
    """Trajectory Consistency Distillation (Zheng et al. 2024, arXiv:2402.19159).

    The student learns the map from t to any s' <= s, not only to the first time. The map is the first-order exponential
    integrator with the student's own prediction, alpha_s' x0 + sigma_s' eps (TCF(1) in the paper). It is the identity at
    s' = t, so that no boundary scalings are needed.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="tcd",
        title="TCD student",
        lora_title="TCD-LoRA",
        paper="Zheng et al. 2024, arXiv:2402.19159",
        algorithm="Algorithm 1",
        scheduler="TCDScheduler",
        sampler="TCD",
        sampling_options={"eta": 0.3},
        # No TCDScheduler for flow matching is published: eta = 0, which is Euler's method.
        flow=TRAILING_DDIM["flow"]
        | {"deterministic": True, "sampler": "Euler", "comfyui_sampler": "euler", "sampling_options": {}},
        tags=("tcd", "trajectory-consistency-distillation"),
        summary="{solver} solver, k = {skip}",
        decided_by_teacher=("w_min", "w_max"),
    )
    skip: int = 20
    "skipping interval k: teacher time steps between z_t and z_s, from 1 to T - 1; a divisor of T on the grid"
    times: Literal["grid", "all"] = "grid"
    "where t is drawn from: the DDIM grid of T / k points, or all steps"
    guidance: Literal["baked", "free"] = "baked"
    "baked: guidance is distilled into the student; free: CFG and negative prompts still work at sampling time"
    w_min: float = 2.0
    "smallest omega; omega is guidance scale - 1"
    w_max: float = 14.0
    "largest omega"
    solver: str = "ddim"
    "PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l1", "l2"] = "huber"
    "pseudo-Huber, l2 or l1"
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

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> EndState:
        t, s = self.sample_timesteps(schedule, rng)
        end = sample_end_time(schedule, s, rng)  # s'
        w = sample_omega(self.guidance, self.w_min, self.w_max, rng)
        z_t, w = sample_start(schedule, batch, t, w, rng)
        z_s = SOLVERS[self.solver](teacher.denoiser(batch.cond, w), schedule, z_t, t, s)
        return EndState(t=t, s=s, z_t=z_t, z_s=z_s, w=w, end=end)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: EndState) -> Tensor:
        t, s, z_t, z_s, w, c = state.t, state.s, state.z_t, state.z_s, state.w, batch.cond
        prediction = schedule.diffuse(*student(z_t, t, c, w), state.end)
        with torch.no_grad():
            goal = schedule.diffuse(*target(z_s, s, c, w), state.end)
        return DISTANCES[self.distance](prediction, goal)
