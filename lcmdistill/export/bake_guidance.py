"""Bake guidance in: a U-Net without its guidance input (omega), for formats that have no key for one."""

from typing import Any

import torch

from lcmdistill.diffusion.consistency import omega_embedding
from lcmdistill.utils.errors import UsageError


@torch.no_grad()
def bake_omega(unet: Any, guidance_scale: float) -> Any:
    """Return a U-Net without `time_cond_proj_dim` whose outputs equal those of `unet` at one guidance scale.

    The result is frozen and shares every weight but one bias with `unet`, which is not changed.

    Args:
        unet: A U-Net with an omega input.
        guidance_scale: In diffusers' convention, omega + 1.

    Raises:
        UsageError: The U-Net has no omega input.
    """
    width = unet.config.time_cond_proj_dim
    if width is None:
        raise UsageError(
            "this U-Net has no guidance input (omega), so guidance cannot be baked in; remove --guidance-scale"
        )
    embedding = unet.time_embedding
    # diffusers adds cond_proj(omega) to the time features before linear_1: after linear_1 it is a constant.
    w = torch.tensor([guidance_scale - 1.0], device=embedding.cond_proj.weight.device)
    shift = embedding.cond_proj.weight.double() @ omega_embedding(w, width)[0].double()
    bias = embedding.linear_1.bias.double() + embedding.linear_1.weight.double() @ shift
    weights = {key: value for key, value in unet.state_dict().items() if key != "time_embedding.cond_proj.weight"}
    weights["time_embedding.linear_1.bias"] = bias.to(embedding.linear_1.bias.dtype)
    with torch.device("meta"):
        baked = type(unet).from_config({**unet.config, "time_cond_proj_dim": None})
    baked.load_state_dict(weights, assign=True, strict=True)
    return baked.eval().requires_grad_(False)
