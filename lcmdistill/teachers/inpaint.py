"""Inpainting: U-Nets that are shown a mask and the image without what it hides, and fill it in.

Shapes: B batch, C latent channels, h w latent size, H W pixels. Such a U-Net takes C + 1 + C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import SampleInfo, Teacher
from lcmdistill.teachers.sd import stable_diffusion
from lcmdistill.teachers.sdxl import stable_diffusion_xl

ALL_MASKED = 0.25
"how often everything is masked (model card of Stable Diffusion Inpainting); else one rectangle is"

SMALLEST = 0.125
"the least side of such a rectangle, as a part of the image's"


def stable_diffusion_inpainting(pipeline: Any) -> Teacher:
    """A StableDiffusionInpaintPipeline as a Teacher. Raises as `stable_diffusion`."""
    return _shown_a_mask(stable_diffusion(pipeline, 1 + pipeline.vae.config.latent_channels))


def stable_diffusion_xl_inpainting(pipeline: Any) -> Teacher:
    """A StableDiffusionXLInpaintPipeline as a Teacher. Raises as `stable_diffusion_xl`."""
    return _shown_a_mask(stable_diffusion_xl(pipeline, 1 + pipeline.vae.config.latent_channels))


def _shown_a_mask(plain: Teacher) -> Teacher:
    def call(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
        return plain.call(unet, torch.cat([z, c["mask"].to(z.dtype), c["masked"].to(z.dtype)], dim=1), t, c, w)

    def condition(shown: SampleInfo) -> Conditioning:
        return plain.condition(shown) | masked(shown)

    return dataclasses.replace(plain, call=call, condition=condition, condition_is_random=True)


def masked(shown: SampleInfo) -> Conditioning:
    """A mask of each sample's own, 1 where it hides, (B, 1, h, w), and the latents of the image without it, (B, C, h, w).

    Both fp16, as they are kept; diffusers' pipelines make them of an image and a mask in the same way.
    """
    pixels = shown.pixels()
    mask = torch.stack([draw_mask(pixels.shape[2], pixels.shape[3], seed) for seed in shown.seeds]).to(pixels.device)
    latents = shown.encode(pixels * (1.0 - mask))
    small = torch.nn.functional.interpolate(mask, size=latents.shape[2:])
    return Conditioning({"mask": small.half(), "masked": latents.half()})


def draw_mask(height: int, width: int, seed: int) -> Tensor:
    """All ones, or a rectangle of ones somewhere, (1, H, W) fp32, the same for the same seed."""
    everything, *draws = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
    if everything < ALL_MASKED:
        return torch.ones(1, height, width)
    rows, columns = (
        max(1, round(n * (SMALLEST + (1 - SMALLEST) * u))) for n, u in ((height, draws[0]), (width, draws[1]))
    )
    top, left = round((height - rows) * draws[2]), round((width - columns) * draws[3])
    mask = torch.zeros(1, height, width)
    mask[:, top : top + rows, left : left + columns] = 1.0
    return mask
