"""FLUX.1 [dev]: a multimodal diffusion transformer of 11.9 billion parameters (Black Forest Labs 2024).

It was trained with flow matching, and then distilled: the guidance scale is an input of the network, in place of
classifier-free guidance. FLUX.1 [schnell], which has no such input, is a few-step model already and is refused as a teacher.
A T5 encodes prompts, and a CLIP, of which only the pooled embeddings are used.

Shapes: B batch, C latent channels, h w latent size, N image tokens, L tokens, D embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import Alias, TeacherFamily, no_condition
from lcmdistill.teachers.sd3 import STABLE_DIFFUSION_3
from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning

GUIDANCE = 3.5
"the guidance scale that FLUX.1 [dev] was published with"

SIDE = 2
"the side of the square of latents that is one token"


def pack(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as the tokens (B, N, 4 C) of the transformer and the pipeline: squares of 2 x 2, by rows."""
    from torch.nn.functional import pixel_unshuffle

    return pixel_unshuffle(latents, SIDE).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, N, 4 C) as latents (B, C, h, w)."""
    from torch.nn.functional import pixel_shuffle

    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // SIDE, width // SIDE)), SIDE)


def _positions(height: int, width: int, length: int, device: Any) -> dict[str, Tensor]:
    """Return the positions of image tokens, (N, 3): 0, row, column; and those of the prompt's tokens, (L, 3), which are 0."""
    import torch

    rows, columns = (torch.arange(side // SIDE, dtype=torch.float32, device=device) for side in (height, width))
    grid = torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
    return {"img_ids": grid, "txt_ids": torch.zeros(length, 3, device=device)}


def call_flux(
    network: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None, guidance: float = GUIDANCE
) -> Tensor:
    """Return the transformer's velocity, (B, C, h, w), in its own dtype.

    Args:
        network: The transformer.
        z: Latents, (B, C, h, w).
        t: Times, (B,), from 0 to 1000.
        c: The prompt's embeddings.
        w: Not used: guidance is the same in the whole run.
        guidance: The guidance scale, an input of the network.
    """
    from lcmdistill.teachers.base import dtype_of

    dtype, embeds = dtype_of(network), c["prompt_embeds"]
    height, width = z.shape[2:]
    tokens = network(
        pack(z).to(dtype),
        encoder_hidden_states=embeds.to(dtype),
        pooled_projections=c["pooled"].to(dtype),
        timestep=t / 1000,
        guidance=t.new_full((len(z),), guidance),
        return_dict=False,
        **_positions(height, width, embeds.shape[1], z.device),
    )[0]
    return unpack(tokens, height, width)


def _example_inputs(network: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random embeddings (B, 77, D) and pooled embeddings (B, P), and the guidance scale (B,)."""
    import torch

    config = network.config
    return {
        "encoder_hidden_states": torch.randn(batch, 77, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
        "guidance": torch.full((batch,), GUIDANCE),
    }


def _network_kwargs(family: TeacherFamily, network: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the transformer's keyword arguments, with latents as tokens, their positions, and a time from 0 to 1."""
    latents, length = inputs["sample"], inputs["encoder_hidden_states"].shape[1]
    height, width = latents.shape[2:]
    kwargs = {name: value for name, value in inputs.items() if name != "sample"}
    kwargs |= {"hidden_states": pack(latents), "timestep": inputs["timestep"] / 1000}
    return kwargs | _positions(height, width, length, latents.device)


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return T5's embeddings (B, L, D) and CLIP's pooled embeddings (B, P), in fp32."""
    import torch

    from lcmdistill.diffusion.types import Conditioning

    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), device=pipeline.text_encoder.device)
    return Conditioning({"prompt_embeds": embeds.float(), "pooled": pooled.float()})


def _check(pipeline: Any) -> None:
    """Raise UsageError for a network without a guidance input, and unless the transformer takes the VAE's latents."""
    network = pipeline.transformer
    taken, latents = network.config.in_channels, pipeline.vae.config.latent_channels
    if not network.config.guidance_embeds:
        raise UsageError(
            "the teacher's transformer has no guidance input (guidance_embeds): it is a few-step model already, as FLUX.1 "
            "[schnell]; use FLUX.1 [dev]"
        )
    if (taken, network.out_channels) != (latents * SIDE**2,) * 2:
        raise UsageError(
            f"the teacher's transformer takes {taken} channels and returns {network.out_channels}, and its VAE has {latents}, "
            f"which are {latents * SIDE**2} per token; they belong to different models"
        )


FLUX_1 = TeacherFamily(
    key="flux",
    title="FLUX.1",
    pipeline_classes=("FluxPipeline",),
    network="transformer",
    network_class="FluxTransformer2DModel",
    network_label="transformer",
    text_encoders=("text_encoder", "text_encoder_2"),
    task="text-to-image",
    tags=("text-to-image", "flux"),
    input_channels=64,
    sample_size_is_default=False,  # the network has none: positions are rotary
    student_kinds=("lora",),
    token_side=SIDE,
    pack=pack,
    unpack=unpack,
    embeds_guidance=True,
    call=call_flux,
    example_inputs=_example_inputs,
    network_kwargs=_network_kwargs,
    encode_prompts=_encode_prompts,
    condition=no_condition,
    check=_check,
    data_scheduler="FlowMatchEulerDiscreteScheduler",
    reference_scheduler="FlowMatchEulerDiscreteScheduler",
    published={
        "data.resolution": 1024,
        "data.guidance_scale": GUIDANCE,
        "objective.w_min": GUIDANCE - 1,
        "objective.w_max": GUIDANCE - 1,
    },
    # All products of the blocks, except the last one of single blocks: the last layer of the network has the same name.
    lora_modules=(*STABLE_DIFFUSION_3.lora_modules, "proj_mlp"),
    lora_formats=("diffusers-lora", "peft"),
    lora_prefixes=STABLE_DIFFUSION_3.lora_prefixes,
    layouts=(),
    layout_of=None,
    onnx_classes={},
    clip_skip=None,
    fp32_layers=(".wo",),  # these overflow in half precision, as T5's own loader knows
    aliases={"flux-dev": Alias("black-forest-labs/FLUX.1-dev", "flux-1-dev-non-commercial-license")},
    describe=lambda pipeline_class, config: "FLUX.1 [dev]" if config.get("guidance_embeds") else "FLUX.1 [schnell]",
)
