"""Call a diffusers pipeline of any family.

Shapes: B batch, C latent channels, h w latent size, H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.flow import sampled_sigmas
from lcmdistill.objectives import method_sampled_by
from lcmdistill.teachers.family import with_tokenizers
from lcmdistill.teachers.registry import family_of
from lcmdistill.teachers.schedulers import is_flow


def network_of(pipeline: Any) -> Any:
    """Return a pipeline's denoising network: its U-Net or its transformer."""
    return getattr(pipeline, family_of(pipeline).network)


def absent_parts(pipeline: Any) -> tuple[str, ...]:
    """Return the optional text encoders that a pipeline lacks, such as a T5, each with its tokenizer.

    diffusers opens a folder or a file without them only if each is passed as None.
    """
    encoders = family_of(pipeline).optional_encoders
    return with_tokenizers(part for part in encoders if pipeline.components.get(part) is None)


def native_size(pipeline: Any) -> tuple[int, int]:
    """Return the default image size (H, W) of a pipeline."""
    size = network_of(pipeline).config.get("sample_size") or pipeline.default_sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def size_multiple(pipeline: Any) -> int:
    """Return what the sides of an image must be multiples of, in pixels."""
    return family_of(pipeline).size_multiple(network_of(pipeline).config, pipeline.vae_scale_factor)


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


def call_pipeline(pipeline: Any, kwargs: Mapping[str, Any], *, steps: int, generator: Any) -> Any:
    """Call a pipeline for a number of sampling steps.

    Of a flow-matching model the sigmas are passed, 1, (n - 1) / n .. 1 / n before the shift: those that its students are
    trained at, and that ComfyUI's scheduler `simple` visits. diffusers' own n-th sigma is nearly 0, which wastes a step.

    Args:
        pipeline: A pipeline of any family.
        kwargs: All other arguments of the call.
        steps: The number of sampling steps.
        generator: For the random numbers of the start and of the sampler: one, or one per image.
    """
    flow = {"sigmas": sampled_sigmas(steps)} if is_flow(pipeline.scheduler.config) else {}
    with _seeded_steps(pipeline, generator):
        return pipeline(**kwargs, **flow, num_inference_steps=steps, generator=generator)


@contextmanager
def _seeded_steps(pipeline: Any, generator: Any) -> Iterator[None]:
    """Pass the generator to a flow-matching scheduler that draws noise: pipelines of transformers do not."""
    scheduler = pipeline.scheduler
    if not is_flow(scheduler.config) or "generator" not in signature(scheduler.step).parameters:
        yield
        return
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: step(*args, **{"generator": generator, **kwargs})
    try:
        yield
    finally:
        del scheduler.step


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
    network, family = network_of(pipeline), family_of(pipeline)
    dtype = dtype or network.dtype
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])
    with torch.autocast(network.device.type, dtype=dtype, enabled=dtype != torch.float32):
        kwargs = family.prompt_kwargs(pipeline, prompts, None) | {
            "height": height,
            "width": width,
            "guidance_scale": guidance_scale,
            "latents": family.pack(noise).to(network.device, network.dtype),
            "output_type": "latent",
            "return_dict": False,
        }
        kwargs |= extra_call_kwargs(pipeline, len(prompts), height, width) | ({} if eta is None else {"eta": eta})
        out = call_pipeline(pipeline, kwargs, steps=steps, generator=generator)
    return family.unpack(out[0], *noise.shape[2:]).float()
