"""Easy Consistency Tuning: consistency training that starts at the weights of a diffusion model."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcmdistill.config.schema import TargetKind
from lcmdistill.diffusion.losses import norm_huber
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import EMPTY_PROMPTS, MethodInfo, State
from lcmdistill.objectives.common import check_curriculum, check_decay, check_lpips, loss_function, noise_ratio
from lcmdistill.objectives.pairs import consistency_pair, same_noise
from lcmdistill.utils.device import copy_to_device

CLOSEST = 1.05
"the least noise ratio that is drawn, over that of the first time: a pair that is closer has a loss of rounding errors"


@dataclass(frozen=True, kw_only=True)
class EasyConsistencyTuning:
    """Easy Consistency Tuning (Geng et al. 2024, arXiv:2406.14548): no teacher, and pairs that come closer by stages.

    The noise ratio t = sigma / alpha is continuous and lognormal. Its pair is r = t (1 - n(t) / q^(stage + 1)), with
    n(t) = 1 + 8 sigmoid(-t): in the first stages r is 0 or near it, which is diffusion training, and the last stage trains
    consistency. z_t and z_s have the same noise, and both networks the same dropout mask.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="ect",
        title="consistency model",
        lora_title="consistency LoRA",
        paper="Geng et al. 2024, arXiv:2406.14548",
        algorithm="Algorithm 1",
        relation="trained from",
        spaces=("latent", "pixel"),
        summary="1 - r / t falling to n(t) / {q:g}^{stages}",
        defaults={**EMPTY_PROMPTS, "student.target": TargetKind.live},
        mutable_on_resume=("curriculum_steps",),
    )
    q: float = 2.0
    "base of the curriculum: 1 - r / t falls by this factor from stage to stage"
    stages: int = 8
    "stages of the curriculum; 1 with q = 256 trains at the last distance from the start"
    curriculum_steps: int | None = None
    "K, optimizer steps over which the stages are spread; default: the whole run"
    ema_decay: float = 0.0
    "mu, decay of the target's EMA; 0 uses the live student as the target"
    p_mean: float = -1.1
    "mean of ln t of the lognormal"
    p_std: float = 2.0
    "standard deviation of ln t of the lognormal"
    weighting: Literal["uniform", "inverse"] = "inverse"
    "weight of a pair's loss: 1, or 1 / (t - r)"
    distance: Literal["huber", "norm-huber", "l1", "l2", "lpips"] = "norm-huber"
    "pseudo-Huber of the difference's norm (Geng et al. 2024), pseudo-Huber, l2, l1 or LPIPS"
    huber_c: float = 0.0
    "c of norm-huber, sqrt(|d|^2 + c^2) - c; 0 is the norm"
    lpips_weights: str | None = None
    "LPIPS weights: torchvision's file alexnet-owt-7be5be79.pth; for pixel-space teachers only"
    same_dropout: ClassVar[bool] = True
    omega: ClassVar[Literal["none"]] = "none"

    def stage_at(self, step: int) -> int:
        """Return the stage of the curriculum at a step, from 0 to stages - 1."""
        whole = self.curriculum_steps or 1
        return min(step * self.stages // whole, self.stages - 1)

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": 0, "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        if not self.q > 1:
            raise ValueError(f"objective.q is {self.q:g}; it must be above 1, such as 2, or 256 with one stage")
        if not 1 <= self.stages <= 64:
            raise ValueError(f"objective.stages is {self.stages}; it must be from 1 to 64")
        check_curriculum(self.curriculum_steps, self.p_std)
        if self.huber_c < 0:
            raise ValueError(f"objective.huber_c is {self.huber_c}; it must be at least 0")
        check_decay("ema_decay", self.ema_decay)
        check_lpips(self.distance, self.lpips_weights)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        first, last = noise_ratio(schedule, copy_to_device(schedule.grid(2), rng.device)).double()
        # The lognormal between the first time and the last, by the inverse of its distribution function.
        ends = torch.stack([first * CLOSEST, last]).log()
        low, high = torch.special.ndtr((ends - self.p_mean) / self.p_std)
        share = low + (high - low) * rng.uniform("times").double()
        ratio = (self.p_mean + self.p_std * torch.special.ndtri(share)).exp()
        n = 1.0 + 8.0 * torch.sigmoid(-ratio)
        earlier = ratio * (1.0 - n / self.q ** (self.stage_at(rng.step) + 1))
        t, s = (schedule.time_of(-each.log()).float() for each in (ratio, torch.maximum(earlier, first)))
        return t, s

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> State:
        t, s = self.sample_timesteps(schedule, rng)
        return same_noise(schedule, batch, t, s, rng)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State) -> Tensor:
        prediction, goal = consistency_pair(student, target, schedule, batch, state)
        named = loss_function(self.distance, self.lpips_weights, prediction.device)
        distance = partial(norm_huber, c=self.huber_c) if self.distance == "norm-huber" else named
        loss = distance(prediction, goal)
        if self.weighting == "uniform":
            return loss
        return loss / (noise_ratio(schedule, state.t) - noise_ratio(schedule, state.s)).float()
