"""PixArt-alpha: a diffusion transformer (DiT) with a T5 text encoder (Chen et al. 2023, arXiv:2310.00426).

Shapes: B batch, C latent channels, h w latent size, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lcmdistill.teachers.family import SampleInfo, TeacherFamily, published_guidance, transformer_kwargs

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.types import Conditioning

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def call_pixart(network: Any, z: Tensor, t: Tensor, c: Mapping[str, Tensor], w: Tensor | None) -> Tensor:
    """Return the transformer's raw output, (B, C, h, w), in its own dtype; it has no omega input.

    The second half of its output channels is a learned variance, which deterministic samplers do not use.
    """
    from lcmdistill.teachers.base import dtype_of

    sizes = {"resolution": c["resolution"], "aspect_ratio": c["aspect_ratio"]}
    dtype = dtype_of(network)
    output = network(
        z.to(dtype),
        encoder_hidden_states=c["prompt_embeds"].to(dtype),
        encoder_attention_mask=c["attention_mask"],
        timestep=t,
        # Only the 1024 px model has sizes among its inputs.
        added_cond_kwargs=sizes if network.use_additional_conditions else {"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : z.shape[1]]


def _example_inputs(network: Any, generator: Generator, batch: int) -> dict[str, Tensor]:
    """Return random embeddings (B, 77, D) and, for the 1024 px model, the sizes of a square image."""
    import torch

    width = network.config.caption_channels
    inputs = {"encoder_hidden_states": torch.randn(batch, 77, width, generator=generator)}
    if network.use_additional_conditions:
        inputs["resolution"] = torch.tensor([[1024.0, 1024.0]]).repeat(batch, 1)
        inputs["aspect_ratio"] = torch.ones(batch, 1)
    return inputs


def _network_kwargs(family: TeacherFamily, network: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the transformer's keyword arguments. It reads the keys of `added_cond_kwargs` even where it uses none."""
    own = {name: value for name, value in inputs.items() if name not in family.added_inputs}
    kwargs = transformer_kwargs(family, network, own)
    return {**kwargs, "added_cond_kwargs": {name: inputs.get(name) for name in family.added_inputs}}


def _encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Return T5 embeddings (B, L, D) in fp32 and their attention mask (B, L)."""
    import torch

    from lcmdistill.diffusion.types import Conditioning

    device = pipeline.text_encoder.device
    with torch.no_grad():
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=device)
    return Conditioning({"prompt_embeds": embeds.float(), "attention_mask": mask})


def crop_sizes(samples: SampleInfo) -> Conditioning:
    """Return the crop's height and width, (B, 2), and height / width, (B, 1)."""
    from lcmdistill.diffusion.types import Conditioning

    sizes = samples.frames[:, 4:]
    return Conditioning({"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]})


PIXART_ALPHA = TeacherFamily(
    key="pixart",
    title="PixArt-alpha, a diffusion transformer",
    pipeline_classes=("PixArtAlphaPipeline",),
    network="transformer",
    network_class="PixArtTransformer2DModel",
    network_label="transformer",
    text_encoders=("text_encoder",),
    task="text-to-image",
    tags=("text-to-image", "stable-diffusion"),
    sample_size_is_default=False,  # the position embeddings depend on it
    call=call_pixart,
    example_inputs=_example_inputs,
    added_inputs=("resolution", "aspect_ratio"),
    network_kwargs=_network_kwargs,
    encode_prompts=_encode_prompts,
    condition=crop_sizes,
    # Sizes are used as they are, and prompts are encoded as for training.
    extra_call_kwargs=lambda count, height, width, image_and_mask: {
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    check=lambda pipeline: None,
    published=published_guidance(4.5),
    # Those of the public PixArt LoRA script, without the two that are narrower than a usual rank.
    lora_modules=(*_ATTENTION, "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2"),
    lora_formats=("peft",),
    lora_prefixes={"lora_unet_": "transformer"},  # peft files are checked under these keys
    layouts=(),
    layout_of=None,
    onnx_classes={},
    clip_skip=None,
    fp32_layers=(".wo",),  # these overflow in half precision, as T5's own loader knows
    aliases={},
    describe=lambda pipeline_class, config: "PixArt-alpha, a diffusion transformer",
)
