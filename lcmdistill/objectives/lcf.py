"""Latent Consistency Fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import MethodInfo, State
from lcmdistill.objectives.common import check_decay, check_omega, check_skip, sample_omega, sample_times
from lcmdistill.objectives.pairs import consistency_pair, same_noise


@dataclass(frozen=True, kw_only=True)
class LatentConsistencyFineTuning:
    """Fine-tuning of an LCM on your own images, without a teacher (Luo et al. 2023, sec. 4.4).

    `teacher.model` is an LCM, and the student starts from it. There is no solver step: z_t and z_s have the same noise.
    Omega is drawn for a network that takes it, and changes nothing else.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="lcf",
        title="LCM",
        lora_title="LoRA on an LCM",
        paper="Luo et al. 2023, arXiv:2310.04378",
        algorithm="Section 4.4",
        relation="fine-tuned from",
        start="student",
        needs_images=True,
        tags=("lcm", "latent-consistency-model"),
        summary="k = {skip}",
        decided_by_teacher=("w_min", "w_max"),
    )
    skip: int = 20
    "skipping interval k: time steps between z_t and z_s, from 1 to T - 1; a divisor of T on the grid"
    times: Literal["grid", "all"] = "grid"
    "where t is drawn from: the DDIM grid of T / k points, or all steps"
    guidance: Literal["baked", "free"] = "baked"
    "must match the LCM: baked, or free where CFG and negative prompts still work"
    w_min: float = 5.0
    "smallest omega; omega is guidance scale - 1"
    w_max: float = 15.0
    "largest omega"
    distance: Literal["huber", "l1", "l2"] = "huber"
    "pseudo-Huber, l2 or l1"
    ema_decay: float = 0.95
    "mu, decay of the target's EMA; 0 uses the live student as the target"
    same_dropout: ClassVar[bool] = False

    @property
    def omega(self) -> Literal["teacher", "none"]:
        return "none" if self.guidance == "free" else "teacher"

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": 0, "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        check_skip(self.skip, self.times, num_steps)
        check_omega(self.w_min, self.w_max)
        check_decay("ema_decay", self.ema_decay)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        return sample_times(schedule, self.skip, self.times, rng)

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> State:
        t, s = self.sample_timesteps(schedule, rng)
        w = sample_omega(self.guidance, self.w_min, self.w_max, rng)
        return same_noise(schedule, batch, t, s, rng, w)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State) -> Tensor:
        prediction, goal = consistency_pair(student, target, schedule, batch, state)
        return DISTANCES[self.distance](prediction, goal)
