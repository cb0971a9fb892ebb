"""The latents that are compared: the teacher's and a student's, from the same start noise.

Shapes: N images, C h w latents.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmdistill.batch import derive_seed
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.drawing import pipeline_latents

TEACHER_STEPS = 50
"the teacher's own quality, which everything else stands beside"

Tell = Callable[[int], None]
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
    tell: Tell = lambda images: None,
) -> Tensor:
    """The teacher's DDIM latents, (N, C, h, w) fp32 on the CPU. spacing: of the time steps; None keeps the teacher's own."""
    options: dict[str, Any] = {} if spacing is None else {"timestep_spacing": spacing}
    parts = []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        drawn = teacher.draw_latents(
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


def student_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 16,
    tell: Tell = lambda images: None,
) -> Tensor:
    """A student pipeline's latents from the same start noise, (N, C, h, w) fp32 on the CPU.

    The fresh noise between steps comes from seed, a generator an image.
    """
    parts = []
    for i in range(0, len(prompts), batch_size):
        z = noise[i : i + batch_size]
        generators = [torch.Generator().manual_seed(derive_seed(seed, "fresh", i + j)) for j in range(len(z))]
        drawn = pipeline_latents(
            pipeline, prompts[i : i + batch_size], z, steps=steps, guidance_scale=guidance_scale, generator=generators
        )
        parts.append(drawn.cpu())
        tell(len(z))
    return torch.cat(parts)
