"""The pair (x0, eps): what every network's raw output is turned into, once, at the border; and guidance on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from lcmdistill.diffusion.schedules import SIGMA_DATA

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"what a diffusers scheduler's config may call a network's output, on any schedule"

EDM = "edm"
"the raw F of a preconditioned network (Karras et al. 2022, Eq. 7), on a schedule with alpha = 1"


class X0Eps(NamedTuple):
    """A network's belief about z_t = alpha_t x0 + sigma_t eps; both (B, C, h, w) fp32."""

    x0: Tensor
    eps: Tensor


# Below this a division by alpha (zero-terminal SNR at t = T - 1) or sigma (t = 0) carries no information.
_TINY = 1e-8


def network_input(z: Tensor, t: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """What a network of a prediction type is given for (z, t): the pair itself, but for EDM's preconditioning.

    EDM: c_in z with c_in = 1 / sqrt(sigma^2 + sd^2), and 250 ln(sigma) (Karras et al. 2022, Table 1, whose c_noise is
    ln(sigma) / 4, times 1000 as in Consistency Models and in diffusers' CMStochasticIterativeScheduler).
    """
    if prediction_type != EDM:
        return z, t
    return z / (sigma**2 + SIGMA_DATA**2).sqrt(), 250.0 * (sigma.view(-1) + 1e-44).log()


def to_x0_eps(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> X0Eps:
    """A raw network output as the pair (x0, eps), in fp32 (Salimans & Ho 2022, sec. 4 and app. D).

    output, z: (B, C, h, w); alpha, sigma: (B, 1, 1, 1) fp32; prediction_type: one of PREDICTION_TYPES, or EDM.
    Where alpha = 0 an epsilon output cannot name x0, which is then 0; v and sample outputs can.
    Raises ValueError on an unknown prediction type.
    """
    o, z = output.float(), z.float()
    if prediction_type == "epsilon":
        x0 = torch.where(alpha > _TINY, (z - sigma * o) / alpha.clamp(min=_TINY), torch.zeros_like(o))
        return X0Eps(x0, o)
    if prediction_type == "sample":
        eps = torch.where(sigma > _TINY, (z - alpha * o) / sigma.clamp(min=_TINY), torch.zeros_like(o))
        return X0Eps(o, eps)
    if prediction_type == "v_prediction":
        return X0Eps(alpha * z - sigma * o, alpha * o + sigma * z)
    if prediction_type == EDM:
        # x0 = c_skip z + c_out F, and eps = (z - x0) / sigma with sigma cancelled.
        square = sigma**2 + SIGMA_DATA**2
        x0 = (SIGMA_DATA**2 * z + SIGMA_DATA * sigma * square.sqrt() * o) / square
        return X0Eps(x0, (sigma * z - SIGMA_DATA * square.sqrt() * o) / square)
    raise ValueError(f"unknown prediction type {prediction_type!r}; choose from {', '.join((*PREDICTION_TYPES, EDM))}")


def guided(cond: X0Eps, null: X0Eps, w: Tensor) -> X0Eps:
    """Classifier-free guidance, cond + w (cond - null), on x0 and eps alike: the only place that combines.

    w: (B,) fp32, omega of Luo et al. 2023, Eq. 14; diffusers' `guidance_scale` is w + 1.
    """
    w = w.view(-1, 1, 1, 1)
    return X0Eps(cond.x0 + w * (cond.x0 - null.x0), cond.eps + w * (cond.eps - null.eps))
