"""The border: every network's raw output becomes the pair (x0, eps) here, once; guidance acts on that pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from lcmdistill.diffusion.schedules import SIGMA_DATA

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"the names that a diffusers scheduler config has for a network's output"

EDM = "edm"
"the raw F of a preconditioned network (Karras et al. 2022, Eq. 7), on a schedule with alpha = 1"

FLOW = "flow_prediction"
"the velocity eps - x0 of a flow-matching network, on a schedule with alpha + sigma = 1; diffusers' name for it"


class X0Eps(NamedTuple):
    """A network's estimate of x0 and eps in z_t = alpha_t x0 + sigma_t eps; both (B, C, h, w) fp32."""

    x0: Tensor
    eps: Tensor


# Below this a division by alpha (zero-terminal SNR at t = T - 1) or sigma (t = 0) carries no information.
_TINY = 1e-8


def network_input(z: Tensor, t: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return the inputs of a network for (z, t): the pair itself, except with EDM's preconditioning.

    EDM: c_in z with c_in = 1 / sqrt(sigma^2 + sd^2), and 250 ln(sigma) (Karras et al. 2022, Table 1, whose c_noise is
    ln(sigma) / 4, times 1000 as in Consistency Models and in diffusers' CMStochasticIterativeScheduler).
    """
    if prediction_type != EDM:
        return z, t
    return z / (sigma**2 + SIGMA_DATA**2).sqrt(), 250.0 * (sigma.view(-1) + 1e-44).log()


def to_x0_eps(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> X0Eps:
    """Convert a raw network output into the pair (x0, eps), in fp32 (Salimans & Ho 2022, sec. 4 and app. D).

    Where alpha = 0, an epsilon output does not determine x0, which is then 0; v and sample outputs do.

    Args:
        output: The raw output, (B, C, h, w).
        z: The network's input, (B, C, h, w).
        alpha: alpha_t, (B, 1, 1, 1) fp32.
        sigma: sigma_t, (B, 1, 1, 1) fp32.
        prediction_type: One of PREDICTION_TYPES, EDM, or FLOW.

    Raises:
        ValueError: The prediction type is unknown.
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
    if prediction_type == FLOW:
        return X0Eps(z - sigma * o, z + alpha * o)
    if prediction_type == EDM:
        # x0 = c_skip z + c_out F, and eps = (z - x0) / sigma with sigma cancelled.
        square = sigma**2 + SIGMA_DATA**2
        x0 = (SIGMA_DATA**2 * z + SIGMA_DATA * sigma * square.sqrt() * o) / square
        return X0Eps(x0, (sigma * z - SIGMA_DATA * square.sqrt() * o) / square)
    raise ValueError(
        f"unknown prediction type {prediction_type!r}; choose from {', '.join((*PREDICTION_TYPES, EDM, FLOW))}"
    )


def guided(cond: X0Eps, null: X0Eps, w: Tensor) -> X0Eps:
    """Apply classifier-free guidance, cond + w (cond - null), to x0 and eps. No other code combines the two.

    Args:
        cond: The prediction with the prompt.
        null: The prediction with the empty prompt.
        w: Omega (Luo et al. 2023, Eq. 14), (B,) fp32; diffusers' `guidance_scale` is w + 1.
    """
    w = w.view(-1, 1, 1, 1)
    return X0Eps(cond.x0 + w * (cond.x0 - null.x0), cond.eps + w * (cond.eps - null.eps))
