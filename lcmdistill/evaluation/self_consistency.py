"""How consistent a student is: |f(z_t, t) - f(z_s, s)| between neighboring times on its teacher's own trajectories.

A consistency model returns the same clean image from anywhere on a trajectory (Song et al. 2023, Definition 1); where the
curve rises it does not. Shapes: N grid points, M images, C h w latents.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.solvers import ddim
from lcmdistill.diffusion.types import Conditioning, Network, TeacherNetwork, x0_eps_network
from lcmdistill.evaluation.latents import batches
from lcmdistill.evaluation.sweep import (
    SamplerPair,
    Sweep,
    SweepPoint,
    cached_latents,
    digest,
    recorded_key,
    round_result,
)
from lcmdistill.students.student import AutocastNetwork, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checksums import checked_json

POINTS = 51

IMAGES = 8
"number of trajectories"

DECIMALS = 4


def curve_evaluations(images: int) -> int:
    """Return how many network evaluations the curve of a sweep takes: two of the teacher and one of the student."""
    return 3 * POINTS * min(images, IMAGES)


def write_curve(folder: Path, cache: Path, sweep: Sweep, pair: SamplerPair) -> Path:
    """Write RUN/evaluation/consistency.json unless it is up to date.

    Its points are [noise level, student's error, teacher's error], from clean to noise. The teacher's error is that of its
    guided x0, from which an untrained student differs only by the guidance. With aspect-ratio buckets, only images of the
    first image's size are followed.

    Args:
        folder: RUN/evaluation.
        cache: The folder of the teacher's trajectories.
        sweep: The sweep that the run is evaluated with.
        pair: The teacher and the student.

    Returns:
        The file of `cache` that holds the trajectories.
    """
    scale = sweep.guidance_scales[0]
    indices, noise = next(batches(pair.noise, IMAGES))
    prompts = tuple(sweep.prompts[i] for i in indices)
    trajectory_key = {
        **pair.cache_key(SweepPoint("teacher", POINTS, scale), sweep),
        "prompts": prompts,
        "points": POINTS,
    }
    key, path = digest([trajectory_key, pair.student_fingerprint]), folder / "consistency.json"
    file = cache / f"trajectory-{digest(trajectory_key)}.safetensors"
    if recorded_key(path) == key:
        return file
    followed = cached_latents(file, lambda _: trajectory(pair.teacher, prompts, noise, scale, pair.dtype)).latents
    assert isinstance(followed, Tensor)
    student = x0_network(pair.teacher, network_of(pair.pipeline), pair.dtype)
    points = errors(pair.teacher, student, prompts, followed, scale)
    write_text(path, checked_json({"key": key, "images": len(prompts), "points": points}))
    return file


def x0_network(teacher: Teacher, network: Any, dtype: torch.dtype) -> Network:
    """Return a network of the teacher's class as one that predicts (x0, eps)."""
    schedule = teacher.schedule.to(network.device)
    return x0_eps_network(raw_network(AutocastNetwork(network, teacher.call, dtype)), schedule, teacher.prediction_type)


def conditioning(teacher: Teacher, prompts: Sequence[str], z: Tensor) -> Conditioning:
    """Return the network's conditioning for prompts and images with the latent size of z, (..., h, w)."""
    device = teacher.network.device
    height, width = (side * teacher.vae_factor for side in z.shape[-2:])
    _, _, example = teacher.example(len(prompts), (height, width), device)
    return example | teacher.encode_prompts(prompts).to(device)


@torch.no_grad()
def trajectory(teacher: Teacher, prompts: Sequence[str], noise: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return z_t and the guided teacher's x0 along its PF-ODE, by DDIM.

    Args:
        teacher: The teacher.
        prompts: M prompts.
        noise: The start noise, (M, C, h, w).
        scale: The guidance scale in diffusers' convention.
        dtype: The dtype of autocast around the network.

    Returns:
        (N, 2, M, C, h, w) fp32 on the CPU, from clean to noise.
    """
    device = teacher.network.device
    schedule = teacher.schedule.to(device)
    c = conditioning(teacher, prompts, noise)
    w = torch.full((len(noise),), scale - 1.0, device=device)
    null = teacher.encode_prompts([""]).to(device)
    psi = TeacherNetwork(x0_network(teacher, teacher.network, dtype), null, teacher.applies_cfg).denoiser(c, w)
    times = schedule.grid(POINTS).flip(0).to(device)
    z, states = schedule.sigma(times[:1]) * noise.to(device), []
    for t, s in pairwise([*times, times[-1]]):
        prediction = psi(z, t.expand(len(z)))
        states.append(torch.stack([z, prediction.x0]).cpu())
        z = ddim(lambda z, t, p=prediction: p, schedule, z, t.expand(len(z)), s.expand(len(z)))
    return torch.stack(states[::-1])


@torch.no_grad()
def errors(
    teacher: Teacher, student: Network, prompts: Sequence[str], followed: Tensor, scale: float
) -> list[tuple[float, float, float]]:
    """Return [(noise level, student's error, teacher's error)] between neighboring times, from clean to noise.

    Args:
        teacher: The teacher.
        student: The student as a network that predicts (x0, eps).
        prompts: M prompts.
        followed: The result of `trajectory`.
        scale: The guidance scale in diffusers' convention.
    """
    device = teacher.network.device
    schedule, times = teacher.schedule.to(device), teacher.schedule.grid(POINTS).to(device)
    c = conditioning(teacher, prompts, followed)
    w = torch.full((followed.shape[2],), scale - 1.0, device=device)
    clean: list[Tensor] = []
    for t, (z, _) in zip(times, followed.to(device), strict=True):
        t_batch = t.expand(len(z))
        clean.append(consistency_function(schedule, z, student(z, t_batch, c, w).x0, t_batch).cpu())
    return [
        (
            round(i / (POINTS - 1), 4),
            round_result(_distance(clean[i], clean[i - 1]), DECIMALS),
            round_result(_distance(followed[i, 1], followed[i - 1, 1]), DECIMALS),
        )
        for i in range(1, POINTS)
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())
