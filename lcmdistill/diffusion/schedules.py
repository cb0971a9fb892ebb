"""Noise schedules, z_t = alpha_t x0 + sigma_t eps: the variance-preserving (VP) tables of latent teachers, and Karras's.

Shapes: B batch, T number of the teacher's time steps, N number of points of a grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SIGMA_DATA = 0.5
"sd, the assumed standard deviation of the data (Karras et al. 2022; also in Consistency Models and LCM)"

_TINY = 1e-20  # replaces an abar of 0 in logarithms


class NoiseSchedule(Protocol):
    """The contract of a schedule. t: (B,), in the unit of the schedule; noise rises with t.

    Data lie at the first point of the grid, where f is the identity. (Nearly) pure noise lies at the last.
    """

    @property
    def num_steps(self) -> int:
        """T, the number of time steps that the teacher was trained with."""
        ...

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the same schedule on another device."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t, (B, 1, 1, 1) fp32."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_t, (B, 1, 1, 1) fp32."""
        ...

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return z_t = alpha_t x0 + sigma_t eps. x0, eps: (B, C, h, w) fp32."""
        ...

    def grid(self, points: int) -> Tensor:
        """Return N >= 2 times from the first to the last, rising, (N,); with T points they are all time steps."""
        ...

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """Return the time of a value of lambda = log(alpha / sigma), (B,) fp32; rarely an integer. half_log_snr: (B,)."""
        ...

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (c_skip, c_out) of f(z, t) = c_skip z + c_out x0, each (B, 1, 1, 1) fp32; (1, 0) at the first time."""
        ...


@dataclass(frozen=True)
class VPSchedule:
    """Tables of alpha_t and sigma_t, in fp32, with alpha_t^2 + sigma_t^2 = 1 and alpha_t^2 = abar_t.

    t: (B,) int64 in [0, T), or floats in [0, T - 1]: between two steps log alpha is linear in t, as in DPM-Solver's
    discrete schedules (Lu et al. 2022, app. D.4). alphas_cumprod: (T,) fp32 in [0, 1], falling; 0 at T - 1 for a
    zero-terminal-SNR schedule.
    """

    alphas_cumprod: Tensor

    @property
    def num_steps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device | str) -> "VPSchedule":
        return VPSchedule(self.alphas_cumprod.to(device))

    def alpha(self, t: Tensor) -> Tensor:
        return self._abar(t).sqrt().view(-1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        return (1.0 - self._abar(t)).sqrt().view(-1, 1, 1, 1)

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def grid(self, points: int) -> Tensor:
        """Return evenly spaced time steps, (N,) int64; for N = T / k + 1 they are 0, k - 1, 2 k - 1, .. T - 1.

        The times that a student samples at, see `sampled_steps`, are among them, and they are exact. The first interval that
        these leave is a time step shorter than the others. With more points than steps, the times are fractional, fp32.
        """
        intervals = points - 1
        # How many intervals lie below the first time that is sampled at.
        share = intervals // sampled_steps(self.num_steps, intervals)
        i = torch.arange(points, dtype=torch.float64)
        first, exact = i / share * (share * self.num_steps / intervals - 1), i * self.num_steps / intervals - 1
        times = torch.where(i < share, first, exact)
        return times.round().long() if points <= self.num_steps else times.float()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        # lambda = log(alpha / sigma) makes abar the logistic function of 2 lambda.
        wanted = -torch.nn.functional.logsigmoid(2.0 * half_log_snr)
        table = -self._log_abar().to(wanted.dtype)
        above = torch.searchsorted(table, wanted).clamp(1, self.num_steps - 1)
        below = above - 1
        part = (wanted - table[below]) / (table[above] - table[below])
        return below + part.clamp(0.0, 1.0)

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalings of LCM.

        With u = 10 t: c_skip = sd^2 / (u^2 + sd^2), c_out = u / sqrt(u^2 + sd^2) (Luo et al. 2023, app. D).

        Unlike Consistency Models (Song et al. 2023, app. C), c_out has no factor sd.
        """
        return lcm_scalings(t)

    def _abar(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        below = t.long().clamp(0, self.num_steps - 1)
        above = (below + 1).clamp(max=self.num_steps - 1)
        log = self._log_abar()
        between = torch.lerp(log[below], log[above], (t - below).to(log.dtype)).exp()
        return torch.where(t == below, self.alphas_cumprod[below], between)

    def _log_abar(self) -> Tensor:
        return self.alphas_cumprod.clamp(min=_TINY).log()


@dataclass(frozen=True)
class KarrasSchedule:
    """alpha = 1 and sigma_t = t: the variance-exploding schedule of EDM and of Consistency Models (Karras et al. 2022).

    t: (B,) fp32 in [sigma_min, sigma_max]. num_steps: the number of points of the finest grid.
    """

    num_steps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def to(self, device: torch.device | str) -> "KarrasSchedule":
        return self

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t).view(-1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        return t.view(-1, 1, 1, 1)

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0 + self.sigma(t) * eps

    def grid(self, points: int) -> Tensor:
        """Return Karras's grid, (N,) fp32, rising (Karras et al. 2022, Eq. 5).

        (smin^(1/rho) + i / (N - 1) (smax^(1/rho) - smin^(1/rho)))^rho, i = 0 .. N - 1.
        """
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (torch.linspace(low, high, points, dtype=torch.float64) ** self.rho).float()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        return (-half_log_snr).exp()

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalings of Consistency Models (Song et al. 2023, app. C), written for x0 instead of the raw output F.

        The paper has f = sd^2 / ((t - smin)^2 + sd^2) z + sd (t - smin) / sqrt(t^2 + sd^2) F, and EDM's preconditioning is
        x0 = sd^2 / (t^2 + sd^2) z + sd t / sqrt(t^2 + sd^2) F: eliminating F, c_out = (t - smin) / t, and c_skip is the
        difference of the z terms.
        """
        t = t.view(-1, 1, 1, 1)
        square, c_out = SIGMA_DATA**2, (t - self.sigma_min) / t
        return square / ((t - self.sigma_min) ** 2 + square) - c_out * square / (t**2 + square), c_out


def lcm_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip = sd^2 / (u^2 + sd^2) and c_out = u / sqrt(u^2 + sd^2) with u = 10 t, each (B, 1, 1, 1) fp32."""
    u = 10.0 * t.float().view(-1, 1, 1, 1)
    square = u**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, u / square.sqrt()


MAX_SAMPLED_STEPS = 50
"diffusers' default of `original_inference_steps`: T / k for T = 1000 and k = 20"


def sampled_steps(num_steps: int, intervals: int) -> int:
    """Return how many time steps of T, evenly spaced up to T - 1, a student is sampled at that was trained on a grid.

    They are among the grid's points, and at most MAX_SAMPLED_STEPS.

    Args:
        num_steps: T.
        intervals: The intervals of the grid, N - 1.
    """
    common = math.gcd(num_steps, intervals)
    return max(count for count in range(1, MAX_SAMPLED_STEPS + 1) if common % count == 0)


def ddim_grid(num_steps: int, skip: int) -> Tensor:
    """Return the skipping-step grid i * k - 1, i = 1 .. T // k, as (N,) int64 (Luo et al. 2023, sec. 4.3).

    Raises ValueError if k is not in [1, T].
    """
    if not 1 <= skip <= num_steps:
        raise ValueError(f"the skipping step k must be from 1 to {num_steps}, got {skip}")
    return torch.arange(1, num_steps // skip + 1) * skip - 1


def phase_edges(num_steps: int, phases: int) -> Tensor:
    """Return the edges of the phases, (phases + 1,) int64, rising from 0 to T - 1.

    All but the first are the time steps of diffusers' trailing spacing: round(m T / phases) - 1. Samplers with that spacing
    stop there; PCM's phases and TDM's segments lie between them.
    """
    tops = (num_steps - torch.arange(phases, dtype=torch.float64) * num_steps / phases).round().long() - 1
    return torch.cat([tops.flip(0).new_zeros(1), tops.flip(0)])


def vp_schedule(config: Mapping[str, Any]) -> VPSchedule:
    """Return the schedule that a diffusers scheduler config describes. No betas are assumed.

    config: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (linear, scaled_linear, squaredcos_cap_v2),
    `trained_betas`, `rescale_betas_zero_snr`, as in a `scheduler_config.json`.

    Raises:
        ValueError: The config describes another kind of schedule.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float32)
        if len(betas) != steps:
            raise ValueError(
                f"the teacher has {len(betas)} trained_betas but num_train_timesteps = {steps}; its scheduler config is wrong"
            )
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = _cosine_betas(steps)
    else:
        raise ValueError(
            f"the teacher's beta_schedule is {kind!r}; supported are linear, scaled_linear, squaredcos_cap_v2, trained_betas"
        )
    abar = torch.cumprod(1.0 - betas, dim=0)
    if not (bool(((betas >= 0) & (betas <= 1)).all()) and bool(abar[-1] < 1)):
        raise ValueError(
            f"the teacher's betas go from {betas.min():g} to {betas.max():g}, and must be between 0 and 1 and not all 0; its "
            "scheduler config is wrong"
        )
    if config.get("rescale_betas_zero_snr"):
        abar = _zero_terminal_snr(abar)
    return VPSchedule(abar)


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
