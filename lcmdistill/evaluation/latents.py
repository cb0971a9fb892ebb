"""The latents that are compared: the teacher's and a student's, from the same start noise.

Shapes: N images, C h w latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.random import derive_seed
from lcmdistill.sampling.student_pipeline import is_pixel_pipeline
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.teachers.pixel import class_labels

TEACHER_STEPS = 50
"the teacher's own quality, which everything else stands beside"

ProgressCallback = Callable[[int], None]
"told how many images more are done"


def start_noise(teacher: Teacher, resolution: int, count: int, seed: int) -> Tensor:
    """The noise that trajectories start from, one generator an image: (N, C, h, w) fp32."""
    side = resolution // teacher.vae_factor
    shape = (teacher.vae.config.latent_channels, side, side)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "evaluate", i)) for i in range(count)]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def teacher_latents(
    teacher: Teacher,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    spacing: str | None = None,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    tell: ProgressCallback = lambda images: None,
) -> Tensor:
    """The teacher's DDIM latents, (N, C, h, w) fp32 on the CPU. spacing: of the time steps; None keeps the teacher's own."""
    options: dict[str, Any] = {} if spacing is None else {"timestep_spacing": spacing}
    parts = []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        drawn = teacher.generate_latents(
            some,
            noise[i : i + batch_size],
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler="DDIMScheduler",
            dtype=dtype,
            **options,
        )
        parts.append(drawn.cpu())
        tell(len(some))
    return torch.cat(parts)


@torch.no_grad()
def student_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 16,
    eta: float | None = None,
    tell: ProgressCallback = lambda images: None,
) -> Tensor:
    """A student pipeline's latents from the same start noise, (N, C, h, w) fp32 on the CPU.

    The fresh noise between steps comes from seed, a generator an image. eta: gamma of a TCDScheduler, None for its usual.
    """
    parts = []
    for i in range(0, len(prompts), batch_size):
        some, z = prompts[i : i + batch_size], noise[i : i + batch_size]
        generators = [torch.Generator().manual_seed(derive_seed(seed, "fresh", i + j)) for j in range(len(z))]
        if is_pixel_pipeline(pipeline):
            drawn = _pixels(pipeline, some, z, steps, generators)
        else:
            options: Any = {"steps": steps, "guidance_scale": guidance_scale, "generator": generators, "eta": eta}
            drawn = pipeline_latents(pipeline, some, z, **options)
        parts.append(drawn.float().cpu())
        tell(len(z))
    return torch.cat(parts)


def _pixels(pipeline: Any, prompts: Sequence[str], z: Tensor, steps: int, generators: list[torch.Generator]) -> Tensor:
    """What a ConsistencyModelPipeline does, which takes no noise of one channel and gives its pixels clamped."""
    scheduler, unet = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(steps)
    labels = class_labels(unet, prompts)
    labels = None if labels is None else labels.to(unet.device)
    z = z.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(z, t), t, class_labels=labels, return_dict=False)[0]
        z = scheduler.step(output, t, z, generator=generators)[0]
    return z
