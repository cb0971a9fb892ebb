"""Latents of the teacher and of students, from the same start noise.

A set of latents is one tensor if all images have the same size, and a list of tensors for a run with aspect-ratio buckets.
Shapes: N images, B images per batch, C h w latents.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lcmdistill.diffusion.random import derive_seed
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.pipelines import pipeline_latents
from lcmdistill.teachers.registry import family_of

TEACHER_STEPS = 50
"the teacher's steps for reference images"

ProgressCallback = Callable[[int], None]
"called with the number of images that a batch added"

LatentSet = Tensor | list[Tensor]
"(N, C, h, w), or N tensors (C, h, w) of several sizes"

_Latents = TypeVar("_Latents", bound=LatentSet)


def start_noise(teacher: Teacher, resolution: int, count: int, seed: int) -> Tensor:
    """Return the noise that trajectories of square images start from, (N, C, h, w) fp32. Each image has its own generator."""
    return torch.stack(bucketed_noise(teacher, [(resolution, resolution)] * count, seed))


def bucketed_noise(teacher: Teacher, sizes: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    """Return start noise (C, h, w) for each image size (height, width) in pixels."""
    channels, factor = teacher.vae.config.latent_channels, teacher.vae_factor
    return [
        torch.randn(
            channels,
            height // factor,
            width // factor,
            generator=torch.Generator().manual_seed(derive_seed(seed, "evaluate", i)),
        )
        for i, (height, width) in enumerate(sizes)
    ]


def batches(latents: LatentSet, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices, latents (B, C, h, w)) in batches of one size each."""
    groups: dict[torch.Size, list[int]] = {}
    for i, each in enumerate(latents):
        groups.setdefault(each.shape, []).append(i)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            indices = group[start : start + batch_size]
            if isinstance(latents, Tensor):
                yield indices, latents[indices[0] : indices[-1] + 1]
            else:
                yield indices, torch.stack([latents[i] for i in indices])


def _generate_batches(
    noise: _Latents,
    batch_size: int,
    generate: Callable[[list[int], Tensor], Tensor],
    on_progress: ProgressCallback,
    done: dict[int, Tensor] | None,
) -> _Latents:
    """Call generate(indices, noise) for each batch and return all results, in order, on the CPU."""
    results = {} if done is None else done
    for indices, z in batches(noise, batch_size):
        if not results.keys() >= {*indices}:
            results.update(zip(indices, generate(indices, z).float().cpu(), strict=True))
        on_progress(len(indices))
    in_order = [results[i] for i in range(len(noise))]
    return cast(_Latents, torch.stack(in_order) if isinstance(noise, Tensor) else in_order)


def teacher_latents(
    teacher: Teacher,
    prompts: Sequence[str],
    noise: _Latents,
    *,
    steps: int,
    guidance_scale: float,
    spacing: str | None = None,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    on_progress: ProgressCallback = lambda images: None,
    done: dict[int, Tensor] | None = None,
) -> _Latents:
    """Return the teacher's DDIM latents in fp32 on the CPU.

    Args:
        teacher: The teacher.
        prompts: N prompts.
        noise: The start noise of N images.
        steps: The number of sampling steps.
        guidance_scale: The guidance scale in diffusers' convention (omega + 1).
        spacing: The timestep spacing of the scheduler; None is the teacher's own.
        batch_size: How many images to generate at once.
        dtype: The dtype of autocast around the network.
        on_progress: Called after each batch.
        done: {index: latents} that need not be generated again; what is generated is added.
    """
    options: dict[str, Any] = {} if spacing is None else {"timestep_spacing": spacing}
    options |= {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": teacher.family.reference_scheduler,
        "dtype": dtype,
    }

    def generate(indices: list[int], z: Tensor) -> Tensor:
        return teacher.generate_latents([prompts[i] for i in indices], z, **options)

    return _generate_batches(noise, batch_size, generate, on_progress, done)


@torch.no_grad()
def student_latents(
    pipeline: Any,
    prompts: Sequence[str],
    noise: _Latents,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 16,
    eta: float | None = None,
    on_progress: ProgressCallback = lambda images: None,
    done: dict[int, Tensor] | None = None,
) -> _Latents:
    """Return a student pipeline's latents in fp32 on the CPU.

    Args:
        pipeline: The student's pipeline.
        prompts: N prompts.
        noise: The start noise of N images.
        steps: The number of sampling steps.
        guidance_scale: The guidance scale in diffusers' convention (omega + 1).
        seed: The seed of the fresh noise between steps; each image has its own generator.
        batch_size: How many images to generate at once.
        eta: gamma of a TCDScheduler; None is the method's default.
        on_progress: Called after each batch.
        done: {index: latents} that need not be generated again; what is generated is added.
    """

    def generate(indices: list[int], z: Tensor) -> Tensor:
        batch_prompts = [prompts[i] for i in indices]
        generators = [torch.Generator().manual_seed(derive_seed(seed, "fresh", i)) for i in indices]
        if family_of(pipeline).in_pixels:
            return _pixel_latents(pipeline, batch_prompts, z, steps, generators)
        options: Any = {"steps": steps, "guidance_scale": guidance_scale, "generator": generators, "eta": eta}
        return pipeline_latents(pipeline, batch_prompts, z, **options)

    return _generate_batches(noise, batch_size, generate, on_progress, done)


def _pixel_latents(
    pipeline: Any, prompts: Sequence[str], z: Tensor, steps: int, generators: list[torch.Generator]
) -> Tensor:
    """Sample like a ConsistencyModelPipeline, which accepts no one-channel noise and clamps its pixels."""
    scheduler, unet = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(steps)
    labels = family_of(pipeline).prompt_kwargs(pipeline, prompts, None)["class_labels"]
    labels = None if labels is None else labels.to(unet.device)
    z = z.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(z, t), t, class_labels=labels, return_dict=False)[0]
        z = scheduler.step(output, t, z, generator=generators)[0]
    return z
