"""Stable Diffusion XL and its smaller variants (SSD-1B, Segmind Vega): two text encoders, and image sizes as inputs.

Shapes: B batch, L tokens, D width of both encoders together, P width of the second encoder's pooled output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import Alias, SampleInfo, SingleFileLayout, text_prompt_kwargs
from lcmdistill.teachers.sd import STABLE_DIFFUSION, check_input_channels, unet_example_inputs
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning

SDXL = SingleFileLayout(
    key="sdxl",
    title="Stable Diffusion XL",
    text_title="two text encoders",
    marker="conditioner.embedders.1.model.",
    text_encoders={
        "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "openclip"),
    },
    width=2048,
    architectures={"epsilon": "stable-diffusion-xl-v1-base", "v_prediction": "stable-diffusion-xl-v1-base"},
    base_versions={"epsilon": "sdxl_base_v1-0", "v_prediction": "sdxl_base_v1-0"},
    takes_sizes=True,
    has_prediction_keys=True,
    has_linear_projections=True,
    latent_scale=0.13025,
)


def call_unet_xl(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the raw output, (B, C, h, w), of a U-Net with pooled embeddings (B, P) and sizes (B, 6) as inputs."""
    from lcmdistill.teachers.base import dtype_of, omega_input

    dtype = dtype_of(unet)
    added = {"text_embeds": c["pooled"].to(dtype), "time_ids": c["time_ids"]}
    embeds, omega = c["prompt_embeds"].to(dtype), omega_input(unet, w)
    return unet(z.to(dtype), t, embeds, timestep_cond=omega, added_cond_kwargs=added, return_dict=False)[0]


def _example_inputs(unet: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random embeddings, pooled embeddings (B, P) and the sizes of an uncropped 1024 px image (B, 6)."""
    import torch

    config, inputs = unet.config, unet_example_inputs(unet, generator, batch)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs["text_embeds"] = torch.randn(batch, width, generator=generator)
    inputs["time_ids"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
    return inputs


def sdxl_embeddings(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, L, D) and pooled embeddings (B, P).

    The empty prompt follows the pipeline's own rule; layers that the pipeline's config skips are skipped.
    """
    import torch

    device, skip = pipeline.text_encoder.device, pipeline.config.get("_clip_skip") or None
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, device, 1, False, clip_skip=skip)
        if pipeline.config.force_zeros_for_empty_prompt:
            is_given = torch.tensor([bool(prompt) for prompt in prompts], device=device)
            embeds, pooled = embeds * is_given[:, None, None], pooled * is_given[:, None]
    return embeds, pooled


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return embeddings and pooled embeddings in fp32."""
    from lcmdistill.diffusion.types import Conditioning

    embeds, pooled = sdxl_embeddings(pipeline, prompts)
    return Conditioning({"prompt_embeds": embeds.float(), "pooled": pooled.float()})


def _prompt_kwargs(pipeline: Any, prompts: Sequence[str], negative: str | None = None) -> dict[str, Any]:
    """Return prompts as strings, or as embeddings where CLIP layers are skipped.

    The pipeline itself skips no layers for the negative prompt; the student was trained with both skipped.
    """
    if not pipeline.config.get("_clip_skip"):
        return text_prompt_kwargs(pipeline, prompts, negative)
    embeds, pooled = sdxl_embeddings(pipeline, prompts)
    null, null_pooled = sdxl_embeddings(pipeline, [negative or ""] * len(prompts))
    kwargs = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    return kwargs | {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}


def time_ids(samples: SampleInfo) -> Conditioning:
    """Return original_size, crops_coords_top_left and target_size, in this order: (B, 6) (Podell et al. 2023, sec. 2.2)."""
    from lcmdistill.diffusion.types import Conditioning

    return Conditioning({"time_ids": samples.frames})


def check_sdxl(pipeline: Any, takes_mask: bool = False) -> None:
    """Raise UsageError unless the pipeline has SDXL's base U-Net and both text encoders (the refiner has neither)."""
    check_input_channels(pipeline, takes_mask)
    if pipeline.unet.config.addition_embed_type != "text_time" or pipeline.text_encoder is None:
        raise UsageError(
            "the teacher is an SDXL pipeline without a base U-Net or its first text encoder; use SDXL base"
        )


STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION,
    key="sdxl",
    title="Stable Diffusion XL",
    pipeline_classes=("StableDiffusionXLPipeline",),
    text_encoders=("text_encoder", "text_encoder_2"),
    call=call_unet_xl,
    example_inputs=_example_inputs,
    added_inputs=("text_embeds", "time_ids"),
    encode_prompts=_encode_prompts,
    condition=time_ids,
    prompt_kwargs=_prompt_kwargs,
    check=check_sdxl,
    student_pipeline_class=lambda has_omega_input, has_options: None,
    published={"objective.w_min": 3.0},  # the public SDXL script trains on omega from 3 to 15
    lora_prefixes={
        **STABLE_DIFFUSION.lora_prefixes,
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "text_encoder_2.": "text_encoder_2",
    },
    layouts=(SDXL,),
    layout_of=lambda config: SDXL,
    single_file_options={"feature_extractor": None, "image_encoder": None},
    onnx_classes={"StableDiffusionXLPipeline": "ORTStableDiffusionXLPipeline"},
    onnx_options=lambda pipeline: {"force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt},
    text_layers_read=True,
    # The second encoder's last layer produces the pooled embedding, so its weights cannot skip it.
    clip_skip="recorded",
    clip_skip_offset=2,  # SDXL reads the last layer but one
    aliases={
        "sdxl": Alias("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
        "ssd1b": Alias("segmind/SSD-1B", "apache-2.0"),
    },
    describe=lambda pipeline_class, config: SDXL.title,
)
