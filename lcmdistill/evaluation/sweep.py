"""A sweep of steps x guidance: each cell is drawn, measured and written whole, so that what is there is not done again.

A run's results lie in RUN/evaluation: sweep.json says what was swept and what its measures mean, cells/NAME holds a cell's
numbers.json and its pictures. What a teacher drew lies beside the latents' cache, for every run of that teacher.
Shapes: N images, C h w latents, H W pixels.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcmdistill.data.chunks import read_metadata, write_tensors
from lcmdistill.evaluation.latents import TEACHER_STEPS, ProgressCallback, student_latents, teacher_latents
from lcmdistill.evaluation.metrics.measures import ImagePair, Measure
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import atomic_dir

FORMAT = 1
"of what is drawn; a cell of another is drawn again"

MEASURED = 2
"of what the measures give of it; a cell of another is measured again"

PICTURES = 6
"images of a cell that are kept to be looked at"

_PICTURE_SIDE = 256

_KEEP_BYTES = 1 << 30

Sampler = Literal["student", "teacher", "trailing"]


@dataclass(frozen=True)
class SweepPoint:
    """One way to draw. guidance_scale: the teacher's, in diffusers' convention; a LoRA has it in its weights.

    trailing: the teacher with its few time steps started at T - 1, as the student's are, instead of where its own
    scheduler starts them.
    """

    sampler: Sampler
    steps: int
    guidance_scale: float

    @property
    def name(self) -> str:
        """The folder of the cell."""
        return f"{self.sampler}-{self.steps:02d}-g{self.guidance_scale:g}"

    @property
    def evaluations(self) -> int:
        """Network evaluations an image: the teacher's guidance takes two a step."""
        return self.steps * (1 if self.sampler == "student" else 2)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is drawn. prompts: one an image; guidance_scales: the first is the one that the teacher's few steps are drawn at."""

    prompts: tuple[str, ...]
    steps: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    resolution: int
    seed: int
    samplers: tuple[Sampler, ...] = ("teacher", "trailing")
    "how the teacher itself draws as few steps"

    def cells(self) -> list[SweepPoint]:
        """All cells, those first that others are measured by."""
        first, found = self.guidance_scales[0], []
        for scale in self.guidance_scales:
            found.append(SweepPoint("teacher", TEACHER_STEPS, scale))
            found += [SweepPoint("student", n, scale) for n in self.steps]
            if scale == first:
                found += [SweepPoint(sampler, n, scale) for sampler in self.samplers for n in self.steps]
        return found

    @property
    def evaluations(self) -> int:
        """Network evaluations of the whole sweep, if nothing of it is there."""
        return len(self.prompts) * sum(cell.evaluations for cell in self.cells())


@dataclass(frozen=True)
class SamplerPair:
    """Who draws: the teacher, and a student's pipeline.

    student_scale: the guidance scale that the student's pipeline is told, None for the cell's own; student, teacher:
    fingerprints of their weights; noise: (N, C, h, w); dtype: of autocast around the teacher's network; device: in words;
    eta: gamma of the student's TCDScheduler, None for its usual.
    """

    teacher: Teacher
    pipeline: Any
    student_scale: float | None
    noise: Tensor
    teacher_fingerprint: str
    student_fingerprint: str
    dtype: torch.dtype
    batch_size: int
    device: str = ""
    eta: float | None = None

    @property
    def how(self) -> str:
        """What an image's time depends on."""
        return f"batches of {min(self.batch_size, len(self.noise))} on {self.device}"

    def draw(self, cell: SweepPoint, sweep: Sweep, tell: ProgressCallback) -> Tensor:
        """A cell's latents, (N, C, h, w)."""
        options: Any = {"steps": cell.steps, "batch_size": self.batch_size, "tell": tell}
        if cell.sampler == "student":
            scale = cell.guidance_scale if self.student_scale is None else self.student_scale
            options |= {"guidance_scale": scale, "seed": sweep.seed, "eta": self.eta}
            return student_latents(self.pipeline, sweep.prompts, self.noise, **options)
        options |= {"guidance_scale": cell.guidance_scale, "dtype": self.dtype}
        spacing = "trailing" if cell.sampler == "trailing" else None
        return teacher_latents(self.teacher, sweep.prompts, self.noise, spacing=spacing, **options)

    def about(self, cell: SweepPoint, sweep: Sweep) -> dict[str, Any]:
        """Everything that decides what a cell's latents are."""
        is_student = cell.sampler == "student"
        scheduler = getattr(self.pipeline, "scheduler", None)
        trained_steps = scheduler.config.get("original_inference_steps", 50) if scheduler is not None else 50
        return {
            "format": FORMAT,
            "cell": cell.name,
            "weights": self.student_fingerprint if is_student else self.teacher_fingerprint,
            "told": self.student_scale if is_student else None,
            **({"eta": self.eta} if is_student and self.eta is not None else {}),
            **({"trained_steps": trained_steps} if is_student and trained_steps != 50 else {}),
            "prompts": sweep.prompts,
            "seed": sweep.seed,
            "resolution": sweep.resolution,
            "where": f"{self.noise.shape} {self.dtype} {self.pipeline.device.type}",
        }


def digest(about: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()


class GeneratedLatents(NamedTuple):
    """Latents, the seconds that drawing them took, and how that was: "batches of 16 on cpu, 2 threads"."""

    latents: Tensor
    seconds: float
    how: str


def cached_latents(path: Path, draw: Callable[[], Tensor], how: str = "") -> GeneratedLatents:
    """Latents from a file, or drawn and written there, whole or not at all. A file that cannot be read is drawn again."""
    try:
        with safe_open(path, framework="pt") as file:
            told = read_metadata(file)
            found = GeneratedLatents(file.get_tensor("latents"), float(told["seconds"]), told.get("how", ""))
        os.utime(path)  # what was used last is removed last
        return found
    except (FileNotFoundError, SafetensorError, LookupError, ValueError):
        pass
    began = time.perf_counter()
    latents = draw().contiguous()
    seconds = time.perf_counter() - began
    write_tensors(path, {"latents": latents}, {"seconds": f"{seconds:.4f}", "how": how})
    return GeneratedLatents(latents, seconds, how)


@dataclass(frozen=True)
class Pixels:
    """Latents and what they show; decoded once where they are few, again and again where they would fill the memory."""

    teacher: Teacher
    latents: Tensor
    batch_size: int
    kept: list[Tensor]

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(latents, pixels in [0, 1] as an image file has them), batch by batch, on the CPU."""
        for i, latents in enumerate(self.latents.split(self.batch_size)):
            if i < len(self.kept):
                yield latents, self.kept[i].float() / 255
                continue
            pixels = (self.teacher.decode(latents) * 255).round().to(torch.uint8).cpu()
            if i == len(self.kept) and pixels[0].numel() * len(self.latents) < _KEEP_BYTES:
                self.kept.append(pixels)
            yield latents, pixels.float() / 255


def as_written(value: float, decimals: int) -> float:
    """A number to three digits, and to `decimals` at most: what does not depend on the order in which a sum was taken."""
    return round(float(f"{value:.3g}"), decimals)


@torch.no_grad()
def numbers_of(
    pixels: Pixels, reference: Pixels, prompts: Sequence[str], measures: Mapping[str, Measure]
) -> dict[str, float]:
    """{measure: number} of a set of images, each as it is written."""
    kept: dict[str, list[Tensor]] = {name: [] for name in measures}
    done = 0
    for (latents, shown), (its_latents, its_pixels) in zip(pixels.parts(), reference.parts(), strict=True):
        some = ImagePair(latents, shown, its_latents, its_pixels, tuple(prompts[done : done + len(latents)]))
        done += len(latents)
        for name, measure in measures.items():
            kept[name].append(measure.kept(some).double().cpu())
    return {
        name: as_written(measure.value(torch.cat(kept[name])), measure.decimals)
        for name, measure in measures.items()
        if done >= measure.least
    }


def sweep_run(
    folder: Path,
    cache: Path,
    sweep: Sweep,
    who: SamplerPair,
    measures: Mapping[str, Measure],
    about_measures: Any,
    tell: Callable[[SweepPoint, int], None],
) -> None:
    """Do every cell that is not there yet. folder: RUN/evaluation; cache: where what the teacher drew is kept.

    about_measures: everything besides the code that decides what the measures give; tell: told of images done.
    """
    references: dict[float, Pixels] = {}

    def noise_level_fraction(cell: SweepPoint) -> Path:
        return (
            folder / "latents" if cell.sampler == "student" else cache
        ) / f"{digest(who.about(cell, sweep))}.safetensors"

    def pixels_of(cell: SweepPoint) -> tuple[Pixels, GeneratedLatents]:
        found = cached_latents(
            noise_level_fraction(cell), lambda: who.draw(cell, sweep, lambda images: tell(cell, images)), who.how
        )
        return Pixels(who.teacher, found.latents, who.batch_size, []), found

    for cell in sweep.cells():
        key = digest([who.about(cell, sweep), about_measures, sorted(measures), MEASURED])
        home, scale = folder / "cells" / cell.name, cell.guidance_scale
        if key_of(home / "numbers.json") == key:
            continue
        pixels, taken = pixels_of(cell)
        is_full = cell.sampler == "teacher" and cell.steps == TEACHER_STEPS
        if scale not in references:
            references[scale] = pixels if is_full else pixels_of(SweepPoint("teacher", TEACHER_STEPS, scale))[0]
        with atomic_dir(home) as aside:
            found = {
                "key": key,
                "sampler": cell.sampler,
                "steps": cell.steps,
                "guidance_scale": scale,
                "images": len(sweep.prompts),
                "numbers": numbers_of(pixels, references[scale], sweep.prompts, measures),
                "seconds_an_image": round(taken.seconds / len(sweep.prompts), 5),
                "how": taken.how,
            }
            (aside / "numbers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            write_pictures(pixels, aside)
    of_use = {noise_level_fraction(cell) for cell in sweep.cells()}
    for path in (folder / "latents").glob("*.safetensors"):
        if path not in of_use:  # of other weights or other prompts
            path.unlink()


def key_of(path: Path) -> str | None:
    """What decided the numbers of a file; None if it is not there, or cannot be read and is to be made again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def picture_places(count: int) -> list[int]:
    """Which images of a set are kept to be looked at, spread over it."""
    return [i * count // PICTURES for i in range(PICTURES)] if count > PICTURES else list(range(count))


def as_image(pixels: Tensor) -> Image.Image:
    """One image's pixels, (3, H, W) in [0, 1], as a picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def write_pictures(pixels: Pixels, folder: Path) -> None:
    """Some of the images as 00.webp, 01.webp, ..., small enough for a page."""
    wanted = picture_places(len(pixels.latents))
    done = 0
    for latents, shown in pixels.parts():
        for place in [p for p in wanted if done <= p < done + len(latents)]:
            picture = as_image(shown[place - done])
            picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
            picture.save(folder / f"{wanted.index(place):02d}.webp", quality=90, method=6)
        done += len(latents)
