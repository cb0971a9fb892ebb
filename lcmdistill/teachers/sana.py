"""SANA: a diffusion transformer with linear attention in the latents of a deep compression autoencoder (DC-AE).

Xie et al. 2024, arXiv:2410.10629. It was trained with flow matching; a Gemma 2 encodes prompts, which follow an instruction.

Shapes: B batch, C latent channels, h w latent size, H W pixels, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import TeacherFamily, no_condition, published_guidance, transformer_kwargs
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning


class DeterministicVae:
    """The DC-AE of a pipeline, which encodes to latents, under the interface of VAEs, which encode to a posterior."""

    def __init__(self, vae: Any) -> None:
        """Take the pipeline's AutoencoderDC."""
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        """Return what the DC-AE has: its config, device, dtype, weights and decoder."""
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor) -> Any:
        """Return the latents (B, C, h, w) of pixels (B, 3, H, W) as a posterior without spread."""
        mean = self._vae.encode(pixels).latent
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.new_zeros(mean.shape)))


def call_sana(network: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the transformer's velocity, (B, C, h, w), in its own dtype; it has no omega input.

    A second half of its output channels, where there is one, is a variance that samplers do not use.
    """
    from lcmdistill.teachers.base import dtype_of

    dtype = dtype_of(network)
    output = network(
        z.to(dtype),
        encoder_hidden_states=c["prompt_embeds"].to(dtype),
        encoder_attention_mask=c["attention_mask"],
        timestep=t * network.config.timestep_scale,
        return_dict=False,
    )[0]
    return output[:, : z.shape[1]]


def _example_inputs(network: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random embeddings (B, 77, D)."""
    import torch

    return {"encoder_hidden_states": torch.randn(batch, 77, network.config.caption_channels, generator=generator)}


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return Gemma's embeddings (B, L, D) in fp32 and their attention mask (B, L).

    The pipeline puts its instruction before prompts, and nothing before the empty negative prompt.
    """
    import torch

    from lcmdistill.diffusion.types import Conditioning

    instruction = signature(pipeline.__call__).parameters["complex_human_instruction"].default
    rows: list[Any] = [None] * len(prompts)
    for before in (instruction, None):
        places = [i for i, prompt in enumerate(prompts) if bool(prompt) is (before is not None)]
        if not places:
            continue
        with torch.no_grad():
            embeds, mask, _, _ = pipeline.encode_prompt(
                [prompts[i] for i in places],
                False,
                device=pipeline.text_encoder.device,
                complex_human_instruction=before,
            )
        for i, row in zip(places, zip(embeds.float(), mask, strict=True), strict=True):
            rows[i] = row
    embeds, masks = zip(*rows, strict=True)
    return Conditioning({"prompt_embeds": torch.stack(embeds), "attention_mask": torch.stack(masks)})


def _check(pipeline: Any) -> None:
    """Raise UsageError for a distilled SANA (Sprint), and unless the transformer takes the VAE's latents."""
    config, latents = pipeline.transformer.config, pipeline.vae.config.latent_channels
    if config.get("guidance_embeds"):
        raise UsageError(
            "the teacher's transformer has a guidance input (guidance_embeds): it is distilled already, as SANA-Sprint; use a "
            "SANA that was not distilled"
        )
    if config.in_channels != latents or config.out_channels not in (latents, 2 * latents):
        raise UsageError(
            f"the teacher's transformer takes {config.in_channels} channels and returns {config.out_channels}, and its VAE has "
            f"{latents}; they belong to different models"
        )


def _describe(pipeline_class: str, config: Mapping[str, Any]) -> str:
    """Return SANA with its version: 1.5 is the one that normalizes queries and keys."""
    return "SANA 1.5" if config.get("qk_norm") else "SANA"


SANA = TeacherFamily(
    key="sana",
    title="SANA",
    pipeline_classes=("SanaPipeline",),
    network="transformer",
    network_class="SanaTransformer2DModel",
    network_label="transformer",
    text_encoders=("text_encoder",),
    task="text-to-image",
    tags=("text-to-image", "sana"),
    input_channels=32,
    pipeline_multiple=32,
    sample_size_is_default=False,  # the pipeline knows the sizes 16, 32, 64 and 128 only
    call=call_sana,
    example_inputs=_example_inputs,
    network_kwargs=transformer_kwargs,
    encode_prompts=_encode_prompts,
    condition=no_condition,
    # Sizes are used as they are, and prompts are encoded as for training.
    extra_call_kwargs=lambda count, height, width, image_and_mask: {
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    check=_check,
    vae=lambda pipeline: DeterministicVae(pipeline.vae),
    vae_levels="encoder_block_out_channels",
    data_scheduler="FlowMatchEulerDiscreteScheduler",
    reference_scheduler="FlowMatchEulerDiscreteScheduler",
    published=published_guidance(4.5),
    # Both attentions. The public LoRA script for SANA leaves the last of these out.
    lora_modules=("to_q", "to_k", "to_v", "to_out.0"),
    lora_formats=("diffusers-lora", "peft"),
    # The keys of diffusers' files; peft files are checked under kohya's.
    lora_prefixes={"transformer.": "transformer", "lora_unet_": "transformer"},
    layouts=(),
    layout_of=None,
    onnx_classes={},
    clip_skip=None,
    fp32_layers=("",),  # all layers: Gemma 2 was trained in bf16, and its activations overflow in fp16
    aliases={},
    describe=_describe,
)
