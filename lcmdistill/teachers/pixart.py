"""PixArt-alpha: a diffusion transformer (DiT) under a T5 text encoder (Chen et al. 2023, arXiv:2310.00426).

Shapes: B batch, C latent channels, h w latent size, L tokens, D width of a token's embedding.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import SampleInfo, Teacher, dtype_of, vp_teacher

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

PUBLISHED: dict[str, Any] = {
    # Its own guidance, fixed: the student has no input for another, and is drawn as it is.
    "data.guidance_scale": 4.5,
    "objective.w_min": 3.5,
    "objective.w_max": 3.5,
    "run.validation_guidance_scale": 1.0,
    # The public PixArt LoRA script's layers, without the two that are narrower than a usual rank.
    "student.target_modules": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2"),
}


def call_pixart(network: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """A PixArtTransformer2DModel's raw output, (B, C, h, w), in its own dtype; there is no input for omega.

    The second half of its channels, a learned variance, is of no use to a deterministic sampler and left out.
    """
    sizes = {"resolution": c["resolution"], "aspect_ratio": c["aspect_ratio"]}
    dtype = dtype_of(network)
    output = network(
        z.to(dtype),
        encoder_hidden_states=c["prompt_embeds"].to(dtype),
        encoder_attention_mask=c["attention_mask"],
        timestep=t,
        # The 1024 px model is told sizes, the smaller ones are not.
        added_cond_kwargs=sizes if network.use_additional_conditions else {"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : z.shape[1]]


def pixart_alpha(pipeline: Any) -> Teacher:
    """A PixArtAlphaPipeline as a Teacher. Raises as `vp_teacher`."""

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Conditioning:
        device = pipeline.text_encoder.device
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=device)
        return Conditioning({"prompt_embeds": embeds.float(), "attention_mask": mask})

    teacher = vp_teacher(pipeline, pipeline.transformer, call_pixart, encode_prompts, sizes_kept)
    return dataclasses.replace(teacher, published=PUBLISHED)


def sizes_kept(shown: SampleInfo) -> Conditioning:
    """Height and width of what was kept, (B, 2), and height / width, (B, 1)."""
    kept = shown.frames[:, 4:]
    return Conditioning({"resolution": kept, "aspect_ratio": kept[:, :1] / kept[:, 1:]})
