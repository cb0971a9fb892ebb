"""Where a training step's time goes: each part alone, in student forwards, on the tiny teacher.

    python examples/bench.py

A latent consistency step is about six forwards of arithmetic: student forward and backward 3, the teacher with and without
the prompt 2, the target 1. Parts are timed in turn, round after round, and the medians are given as ratios, since the clock of
a busy machine means little.
"""

import statistics
import time
from collections.abc import Callable

import torch

from lcmdistill.batch import Batch, Models, Rng, x0_eps_network
from lcmdistill.config import resolve
from lcmdistill.ema import ema_update
from lcmdistill.objectives.shared import teacher_denoiser
from lcmdistill.student import Door, full_student, raw_network, target_of
from lcmdistill.teachers import load_teacher

ROUNDS = 7


def main() -> None:
    config = resolve({}, {"teacher.model": "tiny"})
    size = config.optim.batch_size
    teacher = load_teacher("tiny")
    unet = full_student(teacher.network, "zero", 0)
    target = target_of(unet)
    student = Door(unet, teacher.call, torch.float32)
    networks = [
        x0_eps_network(raw_network(n), teacher.schedule, teacher.prediction_type)
        for n in (
            Door(teacher.network, teacher.call, torch.float32),
            student,
            Door(target, teacher.call, torch.float32),
        )
    ]
    models = Models(teacher.schedule, *networks, null=teacher.encode_prompts([""]))
    rng = Rng(0, 0, range(size))
    side = config.data.resolution // teacher.vae_factor
    latents = rng.normal("latents", (teacher.vae.config.latent_channels, side, side))
    batch = Batch(latents, teacher.encode_prompts(["red apple, food"] * size))
    t, w = torch.full((size,), 500), torch.ones(size)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, fused=True)

    def teacher_part() -> None:
        with torch.no_grad():
            teacher_denoiser(models, batch.cond, w)(latents, t)

    def target_part() -> None:
        with torch.no_grad():
            models.target(latents, t, batch.cond, w)

    def student_part() -> None:
        models.student(latents, t, batch.cond, w).x0.sum().backward()

    def whole() -> None:
        config.objective.loss(models, batch, rng).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(target.parameters(), unet.parameters(), 0.95)

    def update_part() -> None:
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema_update(target.parameters(), unet.parameters(), 0.95)

    parts: dict[str, Callable[[], None]] = {
        "one forward": target_part,
        "teacher, both prompts": teacher_part,
        "student, forward and backward": student_part,
        "clip, AdamW, EMA": update_part,
        "whole step": whole,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_number in range(ROUNDS + 1):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"batch {size}, {torch.get_num_threads()} threads, fp32: {size / medians['whole step']:.1f} samples/s\n")
    print("| part | in forwards |\n|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median / medians['one forward']:.2f} |")


if __name__ == "__main__":
    main()
