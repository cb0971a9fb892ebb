"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross-attention, epsilon or v-prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import Teacher, dtype_of, omega_input, vp_teacher
from lcmdistill.utils.errors import UsageError


def call_unet(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """A UNet2DConditionModel's raw output, (B, C, h, w), in its own dtype."""
    dtype = dtype_of(unet)
    embeds = c["prompt_embeds"].to(dtype)
    return unet(z.to(dtype), t, embeds, timestep_cond=omega_input(unet, w), return_dict=False)[0]


def stable_diffusion(pipeline: Any, more_channels: int = 0) -> Teacher:
    """A StableDiffusionPipeline as a Teacher; more_channels: how many its U-Net takes besides the latents.

    Raises as `vp_teacher`, and UsageError on a U-Net that takes another number.
    """
    check_channels(pipeline, more_channels)

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
        return Conditioning({"prompt_embeds": embeds.float()})

    return vp_teacher(pipeline, pipeline.unet, call_unet, encode_prompts)


def check_channels(pipeline: Any, more: int) -> None:
    """Raise UsageError unless a U-Net takes its VAE's latents and so many channels more."""
    takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != latents + more:
        raise UsageError(
            f"the teacher's U-Net takes {takes} channels, and a {type(pipeline).__name__} gives it {latents + more}; it is of "
            "another kind (inpainting U-Nets take 9 and belong into an inpainting pipeline)"
        )
