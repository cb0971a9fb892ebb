"""The training objectives, a file for each paper. Each is a frozen dataclass: its fields are the paper's hyper-parameters
and its section of the configuration, its `loss` is the paper's algorithm box, written on the pair (x0, eps).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, Networks

Omega = Literal["input", "teacher", "none"]
"whether a full student is told omega: by an input of its own, as its teacher is, or never"


class Objective(Protocol):
    """What the training loop asks of a method."""

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
