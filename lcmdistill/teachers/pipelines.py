"""Asking a diffusers pipeline: one call for all families, whose classes differ in what else they want to be told.

Shapes: B batch, C latent channels, h w latent size, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.objectives import method_sampled_by
from lcmdistill.teachers.prompts import prompt_kwargs


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline: its U-Net or its transformer."""
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def native_size(pipeline: Any) -> tuple[int, int]:
    """(H, W) that a pipeline draws unless it is told otherwise."""
    size = network_of(pipeline).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def is_inpainting(pipeline: Any) -> bool:
    """Whether a pipeline is to be shown an image and a mask."""
    return type(pipeline).__name__.endswith("InpaintPipeline")


def extra_call_kwargs(
    pipeline: Any, count: int, height: int, width: int, shown: tuple[Any, Any] | None = None
) -> dict[str, Any]:
    """What a pipeline's class or scheduler needs to be told besides prompts and sizes, for `count` images of H x W pixels.

    shown: image and mask, white where it is to be painted, for a pipeline that inpaints; without them everything is masked
    and the prompt alone decides.
    """
    method = method_sampled_by(type(pipeline.scheduler).__name__)
    told: dict[str, Any] = dict(method.sampling_options) if method else {}
    if type(pipeline).__name__.startswith("PixArt"):
        # Sizes are taken as they are, and prompts as they are encoded for training.
        return told | {"use_resolution_binning": False, "clean_caption": False}
    if not is_inpainting(pipeline):
        return told
    image, mask = shown or (torch.zeros(3, height, width), torch.ones(1, height, width))
    return told | {"image": [image] * count, "mask_image": [mask] * count, "strength": 1.0}


@torch.no_grad()
def pipeline_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype | None = None,
    generator: Any = None,
    eta: float | None = None,
) -> Tensor:
    """The scaled latents that a pipeline draws, (B, C, h, w) fp32, on its device.

    noise: (B, C, h, w), where each trajectory starts; guidance_scale: diffusers' convention, omega + 1; dtype: of autocast
    around it all, by default the network's own; generator: for what a sampler draws on the way, one or one an image; eta: gamma
    of a TCDScheduler, by default the method's own.
    """
    network = network_of(pipeline)
    dtype = dtype or network.dtype
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])
    with torch.autocast(network.device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = pipeline(
            **prompt_kwargs(pipeline, prompts),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=noise.to(network.device, network.dtype),
            generator=generator,
            output_type="latent",
            return_dict=False,
            **extra_call_kwargs(pipeline, len(prompts), height, width) | ({} if eta is None else {"eta": eta}),
        )
    return out[0].float()
