"""Trajectory Distribution Matching."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lcmdistill.diffusion.losses import DISTANCES, l2
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.renoise import clipped_snr, renoise, renoise_std
from lcmdistill.diffusion.schedules import NoiseSchedule, phase_edges
from lcmdistill.diffusion.types import Conditioning, Network, TeacherNetwork
from lcmdistill.objectives.base import TRAILING_DDIM, CriticOptions, MethodInfo, StepCounts, StudentLoss
from lcmdistill.objectives.common import check_decay, check_omega, draw_omega, noise_level_fraction
from lcmdistill.utils.device import copy_to_device

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "student.target": "ema",
        "optim.learning_rate": 2e-6,
        "optim.beta1": 0.0,
        "optim.beta2": 0.95,
        "optim.gradient_accumulation_steps": 8,
    }
)
"the learning rate published for full students of Stable Diffusion 1.5, and the betas of the public demo"

LORA_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "optim.learning_rate": 2e-5,
        "objective.critic_learning_rate": 1e-4,
        "objective.w_min": 2.5,
        "objective.w_max": 2.5,
    }
)
"the student's learning rate is that of the authors' demo on PixArt; for LoRA students of Stable Diffusion none is published"

TINY: Mapping[str, Any] = MappingProxyType(
    {
        "objective.w_min": 3.0,
        "objective.w_max": 3.0,
        "objective.critic_learning_rate": 1e-4,
        "optim.learning_rate": 3e-5,
        "optim.batch_size": 16,
        "optim.gradient_accumulation_steps": 1,
        "optim.max_train_steps": 350,
    }
)


class Rollout(NamedTuple):
    """The student's own trajectory, one entry per segment from the cleanest to the noisiest, without gradients.

    Attributes:
        z: Where each segment starts, (K, B, C, h, w).
        x0: The student's estimates there.
        eps: The same.
    """

    z: Tensor
    x0: Tensor
    eps: Tensor


class Draw(NamedTuple):
    """The random choices of one loss: a segment and noise levels. Times are (B,), `noise` is (B, C, h, w).

    Attributes:
        segment: Index of the segment.
        start: Where it starts, its noisier end.
        mid: Where it leads, its cleaner end.
        tau: The time at which distributions are compared, noisier than `mid`.
        noise: What is added on the way from `mid` to `tau`.
        guidance_tau: The time at which guidance acts, between `mid` and `start`; `tau` unless terms are decoupled.
        guidance_noise: What is added on the way from `mid` to `guidance_tau`.
    """

    segment: Tensor
    start: Tensor
    mid: Tensor
    tau: Tensor
    noise: Tensor
    guidance_tau: Tensor
    guidance_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class TrajectoryDistributionMatching:
    """Trajectory Distribution Matching (Luo et al. 2025, arXiv:2503.06674, Algorithm 1), from prompts alone.

    The student's own deterministic trajectory has K segments, one per sampling step, between the time steps that diffusers'
    DDIMScheduler visits with trailing spacing. At each segment's end the distribution of the student's trajectories is moved
    towards the teacher's: along the difference of the guided teacher's and the critic's estimates of x0, at a random noise
    level within the segment.

    Where `decoupled`, the two terms of that difference have noise levels of their own (Liu et al. 2025, arXiv:2511.22677):
    the teacher's and the critic's distributions are compared at all levels that are noisier than the segment's end, and
    guidance acts at levels within the segment. Each term is divided by its own mean absolute value, at least 0.1, so that
    omega only counts for samples on which guidance has less effect than that.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="tdm",
        title="TDM student",
        lora_title="TDM-LoRA",
        paper="Luo et al. 2025, arXiv:2503.06674",
        algorithm="Algorithm 1",
        **TRAILING_DDIM,
        steps=lambda objective: StepCounts(*[objective.segments] * 3),
        tags=("tdm", "distribution-matching"),
        summary="{segments} segments",
        prompts_only=True,
        may_collapse=True,
        train_step="distribution-matching",
        defaults=DEFAULTS,
        lora_defaults=LORA_DEFAULTS,
        alias_defaults={"tiny": TINY},
    )
    segments: int = 4
    "K, the number of segments of the trajectory, which is the number of sampling steps, such as 1, 2, 4, 8"
    w_min: float = 2.5
    "smallest omega; omega is guidance scale - 1"
    w_max: float = 2.5
    "largest omega"
    critic_steps: int = 1
    "updates of the critic per update of the student"
    critic_learning_rate: float = 2e-5
    "learning rate of the critic"
    critic_target: Literal["x0", "score"] = "x0"
    "what the critic learns: the student's x0, as published, or the score of its trajectories, unbiased and noisier"
    critic_rank: int | None = None
    "LoRA rank of the critic, where the student is a LoRA; by default the student's"
    tau_min: int = 20
    "cleanest time step at which distributions are compared"
    tau_margin: int = 10
    "time steps below the start of a segment at which distributions are not compared"
    snr_clip: float = 5.0
    "largest weight of the critic's loss, which is weighted by the signal-to-noise ratio"
    distance: Literal["huber", "l1", "l2"] = "huber"
    "pseudo-Huber, l2 or l1"
    decoupled: bool = False
    "d-DMD: match distributions at all noise levels, guide at those of the segment, and divide both terms by their mean size"
    ema_decay: float = 0.95
    "mu, decay of the student's EMA, which is sampled where student.target is ema"
    same_dropout: ClassVar[bool] = False

    @property
    def omega(self) -> Literal["baked"]:
        return "baked"

    @property
    def critic(self) -> CriticOptions:
        return CriticOptions(self.critic_learning_rate, self.critic_rank)

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": 3 if self.decoupled else 2, "student": self.segments + 1, "critic": self.critic_steps + 1}

    @property
    def num_backwards(self) -> dict[str, int]:
        return {"student": 1, "critic": self.critic_steps}

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    def check(self, num_steps: int) -> None:
        shortest = num_steps // (self.tau_min + self.tau_margin + 2)
        if not 1 <= self.segments <= shortest:
            raise ValueError(
                f"objective.segments is {self.segments}; it must be from 1 to {shortest}, so that a segment of T = {num_steps} "
                "time steps is longer than objective.tau_min + objective.tau_margin"
            )
        if self.tau_min < 1 or self.tau_margin < 0:
            raise ValueError(
                f"objective.tau_min is {self.tau_min} and objective.tau_margin {self.tau_margin}; they must be at least 1 and 0"
            )
        if self.critic_steps < 1:
            raise ValueError(f"objective.critic_steps is {self.critic_steps}; it must be at least 1")
        if self.critic_learning_rate < 0:
            raise ValueError(f"objective.critic_learning_rate is {self.critic_learning_rate:g}; it must be at least 0")
        if self.critic_rank is not None and self.critic_rank < 1:
            raise ValueError(f"objective.critic_rank is {self.critic_rank}; it must be at least 1")
        if self.snr_clip <= 0:
            raise ValueError(f"objective.snr_clip is {self.snr_clip:g}; it must be above 0")
        check_omega(self.w_min, self.w_max)
        check_decay("ema_decay", self.ema_decay)

    def rollout(self, student: Network, schedule: NoiseSchedule, cond: Conditioning, noise: Tensor) -> Rollout:
        edges = schedule.grid(schedule.num_steps)[phase_edges(schedule.num_steps, self.segments)].to(noise.device)
        z, visited = noise, []
        for segment in reversed(range(self.segments)):
            x0, eps = student(z, edges[segment + 1].expand(len(z)), cond, None)
            visited.append((z, x0, eps))
            z = schedule.diffuse(x0, eps, edges[segment].expand(len(z)))
        return Rollout(*(torch.stack(values) for values in zip(*reversed(visited), strict=True)))

    def critic_loss(
        self, critic: Network, schedule: NoiseSchedule, cond: Conditioning, rollout: Rollout, rng: Rng, draw: int = 0
    ) -> Tensor:
        choice = self.sample(f"critic-{draw}", schedule, rollout, rng)
        x0, eps = (at(each, choice.segment) for each in (rollout.x0, rollout.eps))
        z_mid = schedule.diffuse(x0, eps, choice.mid)
        z_tau = renoise(schedule, z_mid, choice.noise, choice.mid, choice.tau)
        fake, weight = critic(z_tau, choice.tau, cond, None), clipped_snr(schedule, choice.tau, self.snr_clip)
        if self.critic_target == "x0":
            return weight * l2(fake.x0, x0)
        # The score of z_tau given z_mid is -n / s, s the deviation of the added noise: its mean is the score of z_tau.
        share = renoise_std(schedule, choice.mid, choice.tau) / schedule.sigma(choice.tau)
        return weight / clipped_snr(schedule, choice.tau, math.inf) * l2(share * fake.eps, choice.noise)

    def student_loss(
        self,
        student: Network,
        critic: Network,
        teacher: TeacherNetwork,
        schedule: NoiseSchedule,
        cond: Conditioning,
        rollout: Rollout,
        rng: Rng,
    ) -> StudentLoss:
        choice = self.sample("student", schedule, rollout, rng)
        x0, eps = student(at(rollout.z, choice.segment), choice.start, cond, None)
        with torch.no_grad():
            z_mid = schedule.diffuse(x0, eps, choice.mid)
            z_tau = renoise(schedule, z_mid, choice.noise, choice.mid, choice.tau)
            z_guided = renoise(schedule, z_mid, choice.guidance_noise, choice.mid, choice.guidance_tau)
            guided, null = teacher.with_and_without_prompt(z_guided, choice.guidance_tau, cond)
            real = teacher.network(z_tau, choice.tau, cond, None) if self.decoupled else guided
            fake = critic(z_tau, choice.tau, cond, None)
            w = draw_omega(self.w_min, self.w_max, rng).view(-1, 1, 1, 1)
            matching, guidance = real.x0 - fake.x0, w * (guided.x0 - null.x0)  # the terms DM and CA
            gap = size(x0 - real.x0 - guidance).clamp(min=1e-6)  # W
            parts = {"teacher_gap": gap, "dm_share": size(matching) / gap, "ca_share": size(guidance) / gap}
            if self.decoupled:
                matching, guidance, gap = unit(matching), unit(guidance), torch.ones_like(gap)
            goal = x0 + matching + guidance
        loss = DISTANCES[self.distance](x0, goal) / gap
        return StudentLoss(loss, noise_level_fraction(schedule, choice.tau), parts)

    def sample(self, name: str, schedule: NoiseSchedule, rollout: Rollout, rng: Rng) -> Draw:
        """Draw a segment per sample, and tau from max(tau_min, mid) up to tau_margin below the segment's start.

        Where terms are decoupled, tau is drawn from there up to the last segment's start, and guidance_tau as tau above.

        Args:
            name: Prefix of the streams.
            schedule: The teacher's schedule.
            rollout: The trajectory, for its shapes.
            rng: The draws of the micro-batch.
        """
        edges = phase_edges(schedule.num_steps, self.segments).to(rng.device)
        segment = rng.integers(f"{name}-segment", self.segments)
        start, mid = edges[segment + 1], edges[segment]
        steps = copy_to_device(schedule.grid(schedule.num_steps), rng.device)

        def noise_level(prefix: str, noisiest: Tensor) -> tuple[Tensor, Tensor]:
            low, high = mid.clamp(min=self.tau_min), noisiest - self.tau_margin
            tau = low + (rng.uniform(f"{prefix}-time") * (high - low)).long().clamp(max=high - low - 1)
            return steps[tau], rng.normal(f"{prefix}-noise", rollout.z.shape[2:])

        compared = noise_level(name, edges[-1].expand_as(start) if self.decoupled else start)
        guided = noise_level(f"{name}-guidance", start) if self.decoupled else compared
        return Draw(segment, steps[start], steps[mid], *compared, *guided)


def at(values: Tensor, segment: Tensor) -> Tensor:
    """Return each sample's value in its segment, (B, C, h, w). values: (K, B, C, h, w)."""
    return values[segment, torch.arange(len(segment), device=segment.device)]


def size(x: Tensor) -> Tensor:
    """Return the mean absolute value of each sample, (B,)."""
    return x.abs().flatten(1).mean(1)


def unit(x: Tensor) -> Tensor:
    """Divide each sample by its mean absolute value, at least 0.1."""
    return x / size(x).clamp(min=0.1).view(-1, 1, 1, 1)
