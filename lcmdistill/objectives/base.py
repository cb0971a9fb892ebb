"""The contract of an objective. Each is a frozen dataclass in a file of its own: the fields are the paper's hyper-parameters
and the [objective] section of the configuration; the methods are the paper's algorithm box on the pair (x0, eps).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, Networks

Omega = Literal["input", "teacher", "none"]
"whether a full student is told omega: by an input of its own, as its teacher is, or never"


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What every program and page needs to know about a method. It lives on the objective's class, in its one file.

    Attributes:
        key: The name in OBJECTIVES and in `objective.name`.
        title: What a full student is called, such as "LCM".
        lora_title: What a LoRA student is called, such as "LCM-LoRA".
        paper: Authors, year and arXiv number.
        algorithm: The algorithm box or section of the paper.
        scheduler: The diffusers scheduler class that samples a latent student.
        scheduler_options: Options of that class that differ from the teacher's scheduler config.
        sampler: The scheduler's name in user interfaces (ComfyUI, A1111).
        sampling_options: Options that the method adds to a pipeline call, with their defaults, such as {"eta": 0.3}.
        default_steps: The number of sampling steps to recommend.
        relation: How the student relates to its start: "distilled from", "fine-tuned from", "trained from".
        spaces: Where the method works: "latent", "pixel" or both.
        student_kinds: What it trains: "full", "lora" or both.
        start: What it starts from: "teacher" (a diffusion model) or "student" (a finished few-step model).
        needs_images: Whether it cannot learn from latents that the teacher generates.
        tags: Tags of the model card.
    """

    key: str
    title: str
    lora_title: str
    paper: str
    algorithm: str
    scheduler: str = "LCMScheduler"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "LCM"
    sampling_options: Mapping[str, float] = field(default_factory=dict)
    default_steps: int = 4
    relation: str = "distilled from"
    spaces: tuple[str, ...] = ("latent",)
    student_kinds: tuple[str, ...] = ("full", "lora")
    start: Literal["teacher", "student"] = "teacher"
    needs_images: bool = False
    tags: tuple[str, ...] = ("consistency-model",)


class Objective(Protocol):
    """What the training loop asks of a method."""

    info: ClassVar[MethodInfo]

    @property
    def omega(self) -> Omega:
        """Whether a full student is told omega."""
        ...

    @property
    def same_dropout(self) -> bool:
        """Whether the target network has the student's dropout, with its very mask, or none."""
        ...

    def mu(self, step: int) -> float:
        """The rate of the target's EMA after a step; 0 makes the target the live student."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError, in one sentence, if the fields are impossible for a teacher of T = num_steps."""
        ...

    def pair(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        """The times (t, s), s < t, each (B,), that `loss` compares its networks at: the same draw whenever it is asked."""
        ...

    def loss(self, models: Networks, batch: Batch, rng: Rng) -> Tensor:
        """The method's loss on each sample of a batch of clean latents, (B,) fp32, with gradients to the student only."""
        ...


def only(models: Networks, *roles: str) -> Networks:
    """Of the networks "teacher", "student" and "target" these alone, for a loss that is thrown away; the others cost nothing,
    and say what they were given."""

    def silent(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        return X0Eps(z, z)

    others = {role: silent for role in ("teacher", "student", "target") if role not in roles}
    return replace(models, **others, perceptual=DISTANCES["l2"])


def forwards(objective: Objective, schedule: NoiseSchedule) -> Mapping[str, int]:
    """How many forwards a sample takes of each network, {"teacher": 2, "target": 1, "student": 1}: asked and counted."""
    asked: Counter[str] = Counter()

    def counting(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            asked[role] += len(z)
            return X0Eps(z, z)

        return network

    nothing = Conditioning({})
    models = Networks(
        schedule.to("cpu"),
        counting("teacher"),
        counting("student"),
        counting("target"),
        nothing,
        perceptual=DISTANCES["l2"],
    )
    objective.loss(models, Batch(torch.zeros(1, 1, 1, 1), nothing), Rng(0, 0, [0]))
    return asked
