"""Noise that is added to latents which are noisy already, and the weight of a denoising loss by its noise level.

Shapes: B batch, C h w latents. Only alpha_t and sigma_t are used, so that every schedule will do.
"""

from torch import Tensor

from lcmdistill.diffusion.schedules import NoiseSchedule


def renoise(schedule: NoiseSchedule, z: Tensor, noise: Tensor, mid: Tensor, tau: Tensor) -> Tensor:
    """Return z_tau = k z_mid + sqrt(sigma_tau^2 - k^2 sigma_mid^2) n with k = alpha_tau / alpha_mid.

    With z_mid = alpha_mid x0 + sigma_mid eps, z_tau is distributed as alpha_tau x0 + sigma_tau eps: its variance is exact.

    Args:
        schedule: The teacher's schedule; alpha_mid is above 0.
        z: z_mid, (B, C, h, w).
        noise: n, standard normal, (B, C, h, w).
        mid: The time of `z`, (B,).
        tau: The time to go to, (B,), not cleaner than `mid`.
    """
    return schedule.alpha(tau) / schedule.alpha(mid) * z + renoise_std(schedule, mid, tau) * noise


def renoise_std(schedule: NoiseSchedule, mid: Tensor, tau: Tensor) -> Tensor:
    """Return the deviation of the noise that `renoise` adds, (B, 1, 1, 1) fp32."""
    scaled = schedule.alpha(tau) / schedule.alpha(mid) * schedule.sigma(mid)
    return (schedule.sigma(tau).square() - scaled.square()).clamp(min=0.0).sqrt()


def clipped_snr(schedule: NoiseSchedule, t: Tensor, most: float) -> Tensor:
    """Return min(alpha_t^2 / sigma_t^2, most), (B,) fp32: the weight of an x0 loss whose eps loss would be uniform."""
    return (schedule.alpha(t) / schedule.sigma(t)).square().clamp(max=most).flatten()
