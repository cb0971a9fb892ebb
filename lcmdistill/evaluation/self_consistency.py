"""How consistent a student is: |f(z_t, t) - f(z_s, s)| between neighbouring times of its teacher's own trajectories.

A consistency model gives one and the same clean image from anywhere on a trajectory (Song et al. 2023, Definition 1); where the
curve rises it does not. Shapes: N points of the grid, M images, C h w latents.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.diffusion.consistency import consistency_function
from lcmdistill.diffusion.solvers import ddim
from lcmdistill.diffusion.types import Conditioning, Network, TeacherNetwork, x0_eps_network
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, SweepPoint, as_written, cached_latents, digest, key_of
from lcmdistill.students.student import AutocastNetwork, raw_network
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.utils.atomic import write_text

POINTS = 51

IMAGES = 8
"trajectories that are followed"

DECIMALS = 4


def curve(folder: Path, cache: Path, sweep: Sweep, who: SamplerPair) -> None:
    """Write RUN/evaluation/consistency.json, unless it is there: [noisiness, student's error, teacher's] from clean to noise.

    The teacher's is that of its guided x0, which is what an untrained student starts with but for the guidance.
    """
    scale = sweep.guidance_scales[0]
    full = {
        **who.about(SweepPoint("teacher", POINTS, scale), sweep),
        "prompts": sweep.prompts[:IMAGES],
        "points": POINTS,
    }
    key, path = digest([full, who.student_fingerprint]), folder / "consistency.json"
    if key_of(path) == key:
        return
    prompts, noise = sweep.prompts[:IMAGES], who.noise[:IMAGES]
    place = cache / f"trajectory-{digest(full)}.safetensors"
    followed = cached_latents(place, lambda: trajectory(who.teacher, prompts, noise, scale, who.dtype)).latents
    student = network_for(who.teacher, network_of(who.pipeline), who.dtype)
    points = errors(who.teacher, student, prompts, followed, scale)
    write_text(path, json.dumps({"key": key, "images": len(prompts), "points": points}, indent=1) + "\n")


def network_for(teacher: Teacher, network: Any, dtype: torch.dtype) -> Network:
    """A network of the teacher's class as one that speaks (x0, eps)."""
    schedule = teacher.schedule.to(network.device)
    return x0_eps_network(raw_network(AutocastNetwork(network, teacher.call, dtype)), schedule, teacher.prediction_type)


def conditioning(teacher: Teacher, prompts: Sequence[str], resolution: int) -> Conditioning:
    """What a network is told of prompts: theirs, and what else its family wants to know."""
    device = teacher.network.device
    _, _, told = teacher.example(len(prompts), resolution, device)
    return told | teacher.encode_prompts(prompts).to(device)


@torch.no_grad()
def trajectory(teacher: Teacher, prompts: Sequence[str], noise: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """z_t and the guided teacher's x0 along its PF-ODE by DDIM, from clean to noise, (N, 2, M, C, h, w) fp32 on the CPU."""
    device = teacher.network.device
    schedule = teacher.schedule.to(device)
    c = conditioning(teacher, prompts, noise.shape[-1] * teacher.vae_factor)
    w = torch.full((len(noise),), scale - 1.0, device=device)
    null = teacher.encode_prompts([""]).to(device)
    network = network_for(teacher, teacher.network, dtype)
    psi = TeacherNetwork(network, null).denoiser(c, w)
    times = schedule.grid(POINTS).flip(0).to(device)
    z, found = schedule.sigma(times[:1]) * noise.to(device), []
    for t, s in pairwise([*times, times[-1]]):
        known = psi(z, t.expand(len(z)))
        found.append(torch.stack([z, known.x0]).cpu())
        z = ddim(lambda z, t, known=known: known, schedule, z, t.expand(len(z)), s.expand(len(z)))
    return torch.stack(found[::-1])


@torch.no_grad()
def errors(
    teacher: Teacher, student: Network, prompts: Sequence[str], followed: Tensor, scale: float
) -> list[tuple[float, float, float]]:
    """[(noisiness, student's error, teacher's)] between neighbours, from clean to noise. followed: as of `trajectory`."""
    device = teacher.network.device
    schedule, times = teacher.schedule.to(device), teacher.schedule.grid(POINTS).to(device)
    c = conditioning(teacher, prompts, followed.shape[-1] * teacher.vae_factor)
    w = torch.full((followed.shape[2],), scale - 1.0, device=device)
    told: list[Tensor] = []
    for t, (z, _) in zip(times, followed.to(device), strict=True):
        at = t.expand(len(z))
        told.append(consistency_function(schedule, z, student(z, at, c, w).x0, at).cpu())
    return [
        (
            round(i / (POINTS - 1), 4),
            as_written(_distance(told[i], told[i - 1]), DECIMALS),
            as_written(_distance(followed[i, 1], followed[i - 1, 1]), DECIMALS),
        )
        for i in range(1, POINTS)
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())
