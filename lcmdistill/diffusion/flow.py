"""The rectified-flow schedule of flow-matching teachers: z_t = (1 - sigma) x0 + sigma eps, and its shifts.

Shapes: B batch, T number of the teacher's time steps, N number of points of a grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.schedules import lcm_scalings


@dataclass(frozen=True)
class FlowSchedule:
    """alpha = 1 - sigma and sigma = t / T: rectified flow (Liu et al. 2022, arXiv:2209.03003), with a shifted grid.

    t: (B,) fp32 in [0, T], the time that networks are given, which is T sigma. The shift moves the points of the grid towards
    noise and changes nothing else (Esser et al. 2024, arXiv:2403.03206, Eq. 23). Index i of the grid of T points, from 1 to
    T - 1, is the shifted (i + 1) / T: what a sampler of n steps visits, the shifted 1, (n - 1) / n .. 1 / n, are such points
    if n divides T. Index 0 is sigma = 0, clean latents, where samplers end.
    """

    num_steps: int = 1000
    shift: float = 1.0

    def to(self, device: torch.device | str) -> "FlowSchedule":
        return self

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (t if t.is_floating_point() else t.float()).view(-1, 1, 1, 1) / self.num_steps

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def grid(self, points: int) -> Tensor:
        """Return T times the shifted i / (N - 1), (N,) fp32; with T points, T times the shifted 0, 2 / T, 3 / T .. 1."""
        share = torch.arange(points, dtype=torch.float64) / (points - 1)
        if points == self.num_steps:
            share = torch.cat([share[:1], torch.arange(2, points + 1, dtype=torch.float64) / points])
        return (self.num_steps * shifted(share, self.shift)).float()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        # lambda = log((1 - sigma) / sigma) makes sigma the logistic function of -lambda.
        return self.num_steps * torch.sigmoid(-half_log_snr)

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalings of LCM in the network's time: the identity at sigma = 0, and x0 at every sampled time."""
        return lcm_scalings(t)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Return s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sampled_sigmas(steps: int) -> list[float]:
    """Return the sigmas 1, (n - 1) / n .. 1 / n, before the shift, that students of n steps are sampled at."""
    return [1.0 - i / steps for i in range(steps)]


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift s of a scheduler whose shift depends on the number of image tokens.

    mu is linear in the tokens, and the shift is e^mu: e^mu / (e^mu + 1 / sigma - 1) = s sigma / (1 + (s - 1) sigma). With
    `time_shift_type` linear the shift is mu itself.

    Args:
        config: `base_shift`, `max_shift`, `base_image_seq_len`, `max_image_seq_len`, as in a `scheduler_config.json`.
        tokens: The number of image tokens.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (top - base) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def flow_schedule(config: Mapping[str, Any], tokens: int | None = None) -> FlowSchedule:
    """Return the schedule that the config of a flow-matching diffusers scheduler describes.

    Args:
        config: `num_train_timesteps`, `shift`, `use_dynamic_shifting` and what `dynamic_shift` reads.
        tokens: The number of image tokens that decides a dynamic shift; by default `max_image_seq_len`, which is the models'
            native resolution.

    Raises:
        ValueError: The config describes another kind of schedule.
    """
    if config.get("invert_sigmas"):
        raise ValueError("the teacher's scheduler has invert_sigmas, which is not supported: its time runs backwards")
    dynamic = config.get("use_dynamic_shifting")
    count = config.get("max_image_seq_len", 4096) if tokens is None else tokens
    shift = dynamic_shift(config, count) if dynamic else config.get("shift", 1.0)
    if not shift > 0:
        raise ValueError(f"the shift of the teacher's scheduler is {shift}; it must be above 0")
    return FlowSchedule(int(config.get("num_train_timesteps", 1000)), float(shift))
