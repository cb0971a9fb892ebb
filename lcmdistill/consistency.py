"""The consistency function f(z, t) = c_skip(t) z + c_out(t) x0 of a Latent Consistency Model, and its omega embedding."""

import math

import torch
from torch import Tensor

OMEGA_DIM = 256


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), each (B, 1, 1, 1) fp32, with f(z, 0) = z exactly.

    With u = timestep_scaling * t: c_skip = sd^2 / (u^2 + sd^2), c_out = u / sqrt(u^2 + sd^2) (Luo et al. 2023, app. D).
    Unlike Consistency Models (Song et al. 2023, app. C), c_out has no factor sd. t: (B,) int64 in [0, T).
    """
    u = timestep_scaling * t.float().view(-1, 1, 1, 1)
    square = u**2 + sigma_data**2
    return sigma_data**2 / square, u / square.sqrt()


def consistency_function(z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """f(z_t, t) = c_skip(t) z_t + c_out(t) x0, in fp32 (Luo et al. 2023, Eq. 9). z, x0: (B, C, h, w)."""
    c_skip, c_out = boundary_scalings(t)
    return c_skip * z.float() + c_out * x0


def omega_embedding(w: Tensor, dim: int = OMEGA_DIM) -> Tensor:
    """The sinusoidal embedding of omega, (B, dim) fp32, that `time_cond_proj` of the U-Net takes.

    w: (B,) fp32, which is `guidance_scale - 1`; 1000 w times the frequencies exp(-ln(1e4) i / (dim / 2 - 1)), sines then
    cosines (as in the public LCM code, so that diffusers' pipelines compute the same one).
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, device=w.device, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
    )
    phase = 1000.0 * w.float()[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)
