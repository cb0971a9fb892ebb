"""The consistency function f(z, t) = c_skip(t) z + c_out(t) x0, and the omega embedding of a Latent Consistency Model."""

import math

import torch
from torch import Tensor

from lcmdistill.diffusion.schedules import NoiseSchedule

OMEGA_DIM = 256


def consistency_function(schedule: NoiseSchedule, z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Return f(z_t, t) = c_skip(t) z_t + c_out(t) x0, in fp32, with the boundary scalings of the schedule.

    Luo et al. 2023, Eq. 9, on a VP schedule; Song et al. 2023, Eq. 5, on Karras's. z, x0: (B, C, h, w).
    """
    c_skip, c_out = schedule.boundary(t)
    return c_skip * z.float() + c_out * x0


def omega_embedding(w: Tensor, dim: int = OMEGA_DIM) -> Tensor:
    """Return the sinusoidal embedding of omega, (B, dim) fp32, the input of the U-Net's `time_cond_proj`.

    w: (B,) fp32, `guidance_scale - 1`. The phase is 1000 w times the frequencies exp(-ln(1e4) i / (dim / 2 - 1)), sines then
    cosines (as in the public LCM code, so that diffusers' pipelines compute the same one).
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=w.device, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
    )
    phase = 1000.0 * w.float()[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)
