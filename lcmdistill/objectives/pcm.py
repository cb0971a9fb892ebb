"""Phased Consistency Models."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lcmdistill.diffusion import SOLVERS
from lcmdistill.diffusion.losses import DISTANCES
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule, phase_edges
from lcmdistill.diffusion.types import Batch, Network, TeacherNetwork
from lcmdistill.objectives.base import TRAILING_DDIM, EndState, MethodInfo, StepCounts
from lcmdistill.objectives.common import (
    check_decay,
    check_omega,
    check_skip,
    check_solver,
    sample_omega,
    sample_start,
    teacher_forwards,
)
from lcmdistill.utils.device import copy_to_device

PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {
        "objective.w_min": 3.0,
        "objective.w_max": 4.0,
        "optim.learning_rate": 5e-6,
    }
)
"the settings published for Stable Diffusion 1.5, with guidance scales from 4 to 5"


@dataclass(frozen=True, kw_only=True)
class PhasedConsistency:
    """Phased Consistency Model (Wang et al. 2024, arXiv:2405.18407, Algorithm 1).

    The trajectory is cut into phases, and the student learns the map from t to the edge e <= s of its phase: D(x0, eps, e) =
    alpha_e x0 + sigma_e eps. At s = e the map is the identity, so that no boundary scalings are needed, and the goal is the
    teacher's own step. One sampling step per phase, from edge to edge, is plain deterministic DDIM.

    The edges are the time steps that diffusers' DDIMScheduler visits with trailing spacing. The public code puts them on
    the grid of T / k points, where its sampler does not stop if the phases do not divide that number. Here each phase's
    grid counts down from its upper edge in steps of k, and the last step of a phase is cut short at the lower edge; both are
    the same where the phases divide T / k.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        key="pcm",
        title="PCM student",
        lora_title="PCM-LoRA",
        paper="Wang et al. 2024, arXiv:2405.18407",
        algorithm="Algorithm 1",
        **TRAILING_DDIM,
        steps=lambda objective: StepCounts(objective.counts[0], *objective.counts),
        tags=("pcm", "phased-consistency-model"),
        summary="{solver} solver, k = {skip}, {phases} phases",
        defaults=PUBLISHED,
    )
    phases: str = "4"
    "number of phases, which is the number of sampling steps, such as 1, 2, 4, 8, 16; a range such as 4-8 draws it per sample"
    skip: int = 20
    "skipping interval k: teacher time steps between z_t and z_s, from 1 to T - 1"
    guidance: Literal["baked", "free"] = "baked"
    "baked: guidance is distilled into the student's weights; free: CFG and negative prompts still work at sampling time"
    w_min: float = 3.0
    "smallest omega; omega is guidance scale - 1"
    w_max: float = 4.0
    "largest omega"
    solver: str = "ddim"
    "PF-ODE solver of the teacher's step"
    distance: Literal["huber", "l1", "l2"] = "huber"
    "pseudo-Huber, l2 or l1"
    ema_decay: float = 0.95
    "mu, decay of the target's EMA where student.target is ema"
    same_dropout: ClassVar[bool] = False

    @property
    def omega(self) -> Literal["baked", "none"]:
        return "none" if self.guidance == "free" else "baked"

    @property
    def counts(self) -> tuple[int, int]:
        """The smallest and the largest number of phases."""
        low, dash, high = self.phases.partition("-")
        return int(low), int(high if dash else low)

    def ema_decay_at(self, step: int) -> float:
        return self.ema_decay

    @property
    def num_forwards(self) -> dict[str, int]:
        return {"teacher": teacher_forwards(self.solver, self.guidance), "target": 1, "student": 1}

    def check(self, num_steps: int) -> None:
        check_skip(self.skip, "all", num_steps)  # a phase's grid counts down from its edge, whatever k divides
        try:
            low, high = self.counts
        except ValueError:
            low, high = 0, 0
        if not 1 <= low <= high <= num_steps // self.skip:
            raise ValueError(
                f"objective.phases is {self.phases!r}; it must be a number from 1 to T / k = {num_steps // self.skip}, such as "
                "4, or a range such as 4-8"
            )
        check_omega(self.w_min, self.w_max)
        check_decay("ema_decay", self.ema_decay)
        check_solver(self.solver)

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        t, s, _ = self.sample_phases(schedule, rng)
        return t, s

    def sample_phases(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """Draw (t, s, e), each (B,): e is the lower edge of the phase in which t and s lie."""
        low, high = self.counts
        grids = [phase_grid(schedule.num_steps, phases, self.skip) for phases in range(low, high + 1)]
        starts = torch.tensor([0, *(len(grid) for grid in grids)]).cumsum(0).to(rng.device)
        which = rng.integers("phases", len(grids))
        size = starts[which + 1] - starts[which]
        row = starts[which] + (rng.uniform("times") * size).long().clamp(max=size - 1)
        steps = copy_to_device(schedule.grid(schedule.num_steps), rng.device)
        t, s, e = steps[copy_to_device(torch.cat(grids), rng.device)[row]].unbind(1)
        return t, s, e

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> EndState:
        t, s, e = self.sample_phases(schedule, rng)
        w = sample_omega(self.guidance, self.w_min, self.w_max, rng)
        z_t, w = sample_start(schedule, batch, t, w, rng)
        z_s = SOLVERS[self.solver](teacher.denoiser(batch.cond, w), schedule, z_t, t, s)
        return EndState(t=t, s=s, z_t=z_t, z_s=z_s, end=e)

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: EndState) -> Tensor:
        t, s, e, z_t, z_s, c = state.t, state.s, state.end, state.z_t, state.z_s, batch.cond
        prediction = schedule.diffuse(*student(z_t, t, c, None), e)
        with torch.no_grad():
            goal = schedule.diffuse(*target(z_s, s, c, None), e)
        return DISTANCES[self.distance](prediction, goal)


def phase_grid(num_steps: int, phases: int, skip: int) -> Tensor:
    """Return every (t, s, e) of the phases as rows, (N, 3) int64: s is k steps below t, or e if that is nearer."""
    rows = []
    for low, top in pairwise(phase_edges(num_steps, phases).tolist()):
        t = torch.arange(top, low, -skip)
        rows.append(torch.stack([t, (t - skip).clamp(min=low), torch.full_like(t, low)], dim=1))
    return torch.cat(rows)
