"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross-attention, epsilon or v-prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.batch import Conditioning
from lcmdistill.errors import UsageError
from lcmdistill.prediction import PREDICTION_TYPES
from lcmdistill.schedule import vp_schedule
from lcmdistill.teachers.base import Teacher, omega_input


def call_unet(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """A UNet2DConditionModel's raw output, (B, C, h, w), in its own dtype."""
    embeds = c["prompt_embeds"].to(unet.dtype)
    return unet(z.to(unet.dtype), t, embeds, timestep_cond=omega_input(unet, w), return_dict=False)[0]


def stable_diffusion(pipeline: Any) -> Teacher:
    """A StableDiffusionPipeline as a Teacher; schedule and prediction type come from its scheduler's config.

    Raises UsageError on a schedule or prediction type that is not known, or a U-Net with other inputs than latents.
    """
    config = pipeline.scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"the teacher predicts {prediction_type!r}; supported are {', '.join(PREDICTION_TYPES)}")
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise UsageError(
            f"the teacher's U-Net takes {pipeline.unet.config.in_channels} channels and its VAE makes "
            f"{pipeline.vae.config.latent_channels}; an inpainting teacher cannot be distilled yet"
        )
    try:
        schedule = vp_schedule(config)
    except ValueError as error:
        raise UsageError(str(error)) from error

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
        return Conditioning({"prompt_embeds": embeds.float()})

    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    return Teacher(
        pipeline=pipeline,
        network=pipeline.unet,
        vae=pipeline.vae,
        schedule=schedule,
        prediction_type=prediction_type,
        call=call_unet,
        encode_prompts=encode_prompts,
    )
