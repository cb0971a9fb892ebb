"""Stable Diffusion XL and what is cut down from it (SSD-1B, Segmind): two text encoders, and sizes among the inputs.

Shapes: B batch, L tokens, D width of both encoders together, P width of the second one's pooled output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import SampleInfo, Teacher, dtype_of, omega_input, vp_teacher
from lcmdistill.teachers.prompts import sdxl_embeddings
from lcmdistill.teachers.sd import check_channels
from lcmdistill.utils.errors import UsageError


def call_unet_xl(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """The raw output, (B, C, h, w), of a UNet2DConditionModel that is told pooled embeddings (B, P) and sizes (B, 6)."""
    dtype = dtype_of(unet)
    added = {"text_embeds": c["pooled"].to(dtype), "time_ids": c["time_ids"]}
    embeds, omega = c["prompt_embeds"].to(dtype), omega_input(unet, w)
    return unet(z.to(dtype), t, embeds, timestep_cond=omega, added_cond_kwargs=added, return_dict=False)[0]


def stable_diffusion_xl(pipeline: Any, more_channels: int = 0) -> Teacher:
    """A StableDiffusionXLPipeline as a Teacher. more_channels and errors: as of `stable_diffusion`."""
    check_channels(pipeline, more_channels)
    if pipeline.unet.config.addition_embed_type != "text_time" or pipeline.text_encoder is None:
        raise UsageError(
            "the teacher is an SDXL pipeline without a base U-Net or its first text encoder; give SDXL base"
        )

    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        embeds, pooled = sdxl_embeddings(pipeline, prompts)
        return Conditioning({"prompt_embeds": embeds.float(), "pooled": pooled.float()})

    teacher = vp_teacher(pipeline, pipeline.unet, call_unet_xl, encode_prompts, time_ids)
    return replace(teacher, published={"objective.w_min": 3.0})  # the public SDXL script's omega, 3 to 15


def time_ids(shown: SampleInfo) -> Conditioning:
    """original_size, crops_coords_top_left and target_size, in this order: (B, 6) (Podell et al. 2023, sec. 2.2)."""
    return Conditioning({"time_ids": shown.frames})
