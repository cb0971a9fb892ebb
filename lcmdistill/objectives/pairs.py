"""Pairs of points on a trajectory, (z_t, t) and (z_s, s), on which consistency models are trained.

Shapes: B batch, C latent channels, h w latent size.
"""

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Network
from lcmdistill.objectives.base import State


def same_noise(schedule: NoiseSchedule, batch: Batch, t: Tensor, s: Tensor, rng: Rng, w: Tensor | None = None) -> State:
    """Return the state of pairs that are one sample with the same noise at both times, as without a teacher.

    Args:
        schedule: The noise schedule.
        batch: The micro-batch.
        t: The noisier times, (B,).
        s: The cleaner times, (B,).
        rng: The draws of the micro-batch.
        w: Omega, (B,), or None.
    """
    noise = rng.normal("noise", batch.latents.shape[1:])
    z_t, z_s = (schedule.diffuse(batch.latents, noise, time) for time in (t, s))
    return State(t=t, s=s, z_t=z_t, z_s=z_s, w=w)


def consistency_pair(
    student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: State
) -> tuple[Tensor, Tensor]:
    """Return the student's f(z_t, t) and the target's f(z_s, s), without its gradient; both (B, C, h, w)."""
    t, s, z_t, z_s, w, c = state.t, state.s, state.z_t, state.z_s, state.w, batch.cond
    prediction = consistency_function(schedule, z_t, student(z_t, t, c, w).x0, t)
    with torch.no_grad():
        goal = consistency_function(schedule, z_s, target(z_s, s, c, w).x0, s)
    return prediction, goal
