"""Stable Diffusion 3 and 3.5: a multimodal diffusion transformer (MMDiT) (Esser et al. 2024, arXiv:2403.03206).

It was trained with flow matching. Two CLIP text encoders and a T5, which may be absent: its embeddings are then zeros, as in
the pipeline. The skip-layer guidance of Stable Diffusion 3.5 is not used.

Shapes: B batch, C latent channels, h w latent size, L tokens, D embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import (
    Alias,
    SingleFileLayout,
    TeacherFamily,
    no_condition,
    published_guidance,
    transformer_kwargs,
)
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning

SD3 = SingleFileLayout(
    key="sd3",
    title="Stable Diffusion 3",
    text_title="CLIP's text encoders",
    marker="text_encoders.clip_l.",
    text_encoders={
        "text_encoder": ("text_encoders.clip_l.transformer.", "clip-projection"),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", "clip-projection"),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", "t5"),
    },
    width=4096,
    architectures={"flow_prediction": "stable-diffusion-3"},
    base_versions={"flow_prediction": "sd3"},
    default_prediction="flow_prediction",
    latent_scale=1.5305,
    latent_shift=0.0609,
    network_marker="joint_blocks.0.x_block.attn.qkv.weight",
    optional_encoders=("text_encoder_3",),
)

CLIP_TOKENS = 77
"tokens of CLIP's embeddings, which precede T5's"

T5_TOKENS = 256
"tokens of T5's embeddings: the pipeline's default"


def call_mmdit(network: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the transformer's velocity, (B, C, h, w), in its own dtype; it has no omega input."""
    import torch

    from lcmdistill.teachers.base import dtype_of

    dtype, embeds = dtype_of(network), c["prompt_embeds"]
    if embeds.shape[1] == CLIP_TOKENS:  # no T5: its zeros are not kept
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, _absent_t5_tokens()))
    return network(
        z.to(dtype),
        encoder_hidden_states=embeds.to(dtype),
        pooled_projections=c["pooled"].to(dtype),
        timestep=t,
        return_dict=False,
    )[0]


@cache
def _absent_t5_tokens() -> int:
    """Return how many zeros the installed diffusers appends for an absent T5: 77 in early versions, later T5_TOKENS."""
    from types import SimpleNamespace as Fake

    import torch
    from diffusers import StableDiffusion3Pipeline

    encoder, transformer = Fake(dtype=torch.float32), Fake(config=Fake(joint_attention_dim=1))
    pipeline: Any = Fake(
        text_encoder=encoder, text_encoder_3=None, tokenizer_max_length=CLIP_TOKENS, transformer=transformer
    )
    options = {"max_sequence_length": T5_TOKENS, "device": torch.device("cpu"), "dtype": torch.float32}
    return StableDiffusion3Pipeline._get_t5_prompt_embeds(pipeline, "", 1, **options).shape[1]


def _example_inputs(network: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random embeddings (B, 77, D) and pooled embeddings (B, P)."""
    import torch

    config = network.config
    return {
        "encoder_hidden_states": torch.randn(batch, CLIP_TOKENS, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
    }


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return embeddings (B, L, D), CLIP's and then T5's, and CLIP's pooled embeddings (B, P), in fp32."""
    import torch

    from lcmdistill.diffusion.types import Conditioning

    texts = list(prompts)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(texts, None, None, pipeline.text_encoder.device, 1, False)
    if pipeline.text_encoder_3 is None:
        embeds = embeds[:, :CLIP_TOKENS]
    return Conditioning({"prompt_embeds": embeds.float(), "pooled": pooled.float()})


def _check(pipeline: Any) -> None:
    """Raise UsageError unless the transformer takes the VAE's latents and both CLIP text encoders are there."""
    config, latents = pipeline.transformer.config, pipeline.vae.config.latent_channels
    if (config.in_channels, pipeline.transformer.out_channels) != (latents, latents):
        raise UsageError(
            f"the teacher's transformer takes {config.in_channels} channels and returns {pipeline.transformer.out_channels}, "
            f"and its VAE has {latents}; they belong to different models"
        )
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise UsageError(
            "the teacher is a Stable Diffusion 3 without one of its CLIP text encoders; only the T5 may be absent"
        )


def _describe(pipeline_class: str, config: Mapping[str, Any]) -> str:
    if config.get("dual_attention_layers"):
        return "Stable Diffusion 3.5 medium"
    return "Stable Diffusion 3.5 large" if config.get("qk_norm") else "Stable Diffusion 3"


STABLE_DIFFUSION_3 = TeacherFamily(
    key="sd3",
    title="Stable Diffusion 3",
    pipeline_classes=("StableDiffusion3Pipeline",),
    network="transformer",
    network_class="SD3Transformer2DModel",
    network_label="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    task="text-to-image",
    tags=("text-to-image", "stable-diffusion"),
    input_channels=16,
    sample_size_is_default=False,  # the position embeddings depend on it
    largest_side=lambda config, vae_factor: config["pos_embed_max_size"] * config["patch_size"] * vae_factor,
    call=call_mmdit,
    example_inputs=_example_inputs,
    network_kwargs=transformer_kwargs,
    encode_prompts=_encode_prompts,
    condition=no_condition,
    check=_check,
    data_scheduler="FlowMatchEulerDiscreteScheduler",
    reference_scheduler="FlowMatchEulerDiscreteScheduler",
    published=published_guidance(4.5),
    # All products of the blocks; "to_q" and the like are also those of the second attention of 3.5 medium.
    lora_modules=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "net.0.proj",
        "net.2",
    ),
    lora_formats=("diffusers-lora", "peft"),
    # The keys of diffusers' files, which ComfyUI reads, too; peft files are checked under kohya's.
    lora_prefixes={
        "transformer.": "transformer",
        "lora_unet_": "transformer",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "text_encoder.": "text_encoder",
        "text_encoder_2.": "text_encoder_2",
    },
    layouts=(SD3,),
    layout_of=lambda config: SD3,
    single_file_options={
        "text_encoder_3": None,
        "tokenizer_3": None,
        "image_encoder": None,
        "feature_extractor": None,
    },
    onnx_classes={},
    text_layers_read=True,
    clip_skip=None,
    fp32_layers=(".wo",),  # these overflow in half precision, as T5's own loader knows
    aliases={
        "sd35-medium": Alias("stabilityai/stable-diffusion-3.5-medium", "stabilityai-ai-community"),
        "sd35-large": Alias("stabilityai/stable-diffusion-3.5-large", "stabilityai-ai-community"),
        "sd3-medium": Alias("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai-ai-community"),
    },
    describe=_describe,
)
