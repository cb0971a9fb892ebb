"""Call a diffusers pipeline of any family.

Shapes: B batch, C latent channels, h w latent size, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.objectives import method_sampled_by
from lcmdistill.teachers.registry import family_of


def network_of(pipeline: Any) -> Any:
    """Return a pipeline's denoising network: its U-Net or its transformer."""
    return getattr(pipeline, family_of(pipeline).network)


def native_size(pipeline: Any) -> tuple[int, int]:
    """Return the default image size (H, W) of a pipeline."""
    size = network_of(pipeline).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def extra_call_kwargs(
    pipeline: Any, count: int, height: int, width: int, image_and_mask: tuple[Any, Any] | None = None
) -> dict[str, Any]:
    """Return what a pipeline's class or scheduler needs besides prompts and sizes.

    Args:
        pipeline: A pipeline of any family.
        count: The number of images.
        height: In pixels.
        width: In pixels.
        image_and_mask: What an inpainting pipeline paints into, and where (white); by default everything is masked and the
            prompt decides.
    """
    method = method_sampled_by(type(pipeline.scheduler).__name__)
    kwargs: dict[str, Any] = dict(method.sampling_options) if method else {}
    return kwargs | family_of(pipeline).extra_call_kwargs(count, height, width, image_and_mask)


@torch.no_grad()
def pipeline_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype | None = None,
    generator: Any = None,
    eta: float | None = None,
) -> Tensor:
    """Generate scaled latents with a pipeline, (B, C, h, w) fp32, on its device.

    Args:
        pipeline: A pipeline with a VAE.
        prompts: One per sample.
        noise: (B, C, h, w), the start of each trajectory.
        steps: The number of sampling steps.
        guidance_scale: In diffusers' convention, omega + 1.
        dtype: The autocast dtype around the whole pipeline; by default the network's own.
        generator: For the random numbers of a sampler: one, or one per image.
        eta: gamma of a TCDScheduler; by default the method's own.
    """
    network = network_of(pipeline)
    dtype = dtype or network.dtype
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])
    with torch.autocast(network.device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = pipeline(
            **family_of(pipeline).prompt_kwargs(pipeline, prompts, None),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=noise.to(network.device, network.dtype),
            generator=generator,
            output_type="latent",
            return_dict=False,
            **extra_call_kwargs(pipeline, len(prompts), height, width) | ({} if eta is None else {"eta": eta}),
        )
    return out[0].float()
