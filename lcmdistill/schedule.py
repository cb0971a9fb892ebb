"""The noise schedule of a variance-preserving (VP) teacher: z_t = alpha_t x0 + sigma_t eps.

Shapes: B batch, T number of the teacher's time steps, N number of points of a skipping-step grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of alpha_t and sigma_t, in fp32, with alpha_t^2 + sigma_t^2 = 1 and alpha_t^2 = abar_t.

    alphas_cumprod: (T,) fp32 in [0, 1], falling; 0 at T - 1 for a zero-terminal-SNR schedule.
    """

    alphas_cumprod: Tensor

    @property
    def num_steps(self) -> int:
        """T, the number of time steps that the teacher was trained with."""
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its table on another device."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t, (B, 1, 1, 1) fp32. t: (B,) int64 in [0, T)."""
        return self.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t, (B, 1, 1, 1) fp32. t: (B,) int64 in [0, T)."""
        return (1.0 - self.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t ~ q(z_t | x0): alpha_t x0 + sigma_t eps. x0, eps: (B, C, h, w) fp32; t: (B,) int64 in [0, T)."""
        return self.alpha(t) * x0 + self.sigma(t) * eps


def ddim_grid(num_steps: int, skip: int) -> Tensor:
    """The skipping-step grid i * k - 1, i = 1 .. T // k, as (N,) int64 (Luo et al. 2023, sec. 4.3).

    Raises ValueError if k is not in [1, T].
    """
    if not 1 <= skip <= num_steps:
        raise ValueError(f"the skipping step k must be from 1 to {num_steps}, got {skip}")
    return torch.arange(1, num_steps // skip + 1) * skip - 1


def vp_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers scheduler config describes; nothing is assumed of its betas.

    config: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (linear, scaled_linear, squaredcos_cap_v2),
    `trained_betas`, `rescale_betas_zero_snr`, as in a `scheduler_config.json`.
    Raises ValueError on a schedule of another kind.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = _cosine_betas(steps)
    else:
        raise ValueError(
            f"the teacher's beta_schedule is {kind!r}; known are linear, scaled_linear, squaredcos_cap_v2, trained_betas"
        )
    abar = torch.cumprod(1.0 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        abar = _zero_terminal_snr(abar)
    return NoiseSchedule(abar)


def _cosine_betas(steps: int, max_beta: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021, Eq. 17: abar(u) = cos^2((u + .008) / 1.008 * pi / 2), betas capped."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / steps) / abar(i / steps), max_beta) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def _zero_terminal_snr(abar: Tensor) -> Tensor:
    """Lin et al. 2023 (arXiv:2305.08891), Alg. 1: shift and scale sqrt(abar) so that it ends at exactly 0."""
    alpha = abar.sqrt()
    first, last = alpha[0].clone(), alpha[-1].clone()
    return ((alpha - last) * (first / (first - last))) ** 2
