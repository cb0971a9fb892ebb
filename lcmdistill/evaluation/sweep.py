"""A sweep over steps and guidance scales. Each point is generated, measured and written as a whole, so a sweep can resume.

RUN/evaluation holds the results: sweep.json describes the sweep and its metrics, points/NAME holds one point's numbers.json and
preview images. The teacher's latents are stored next to the latent cache and serve every run of that teacher.
Shapes: N images, C h w latents, H W pixels.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from lcmdistill.data.chunks import PART, kept_if_interrupted, read_intact, write_tensors
from lcmdistill.evaluation.latents import (
    TEACHER_STEPS,
    LatentSet,
    ProgressCallback,
    batches,
    student_latents,
    teacher_latents,
)
from lcmdistill.evaluation.metrics.base import ImagePair, Metric
from lcmdistill.evaluation.previews import damaged_previews, preview_indices, write_previews
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.checksums import checked_json, digest, read_checked_json

FORMAT = 1
"version of the generated latents; points of another version are generated again"

METRICS_VERSION = 4
"version of the metrics; points of another version are measured again"

_DECODED_LIMIT = 1 << 30
"bytes of decoded images that are kept in memory"

Sampler = Literal["student", "teacher", "trailing"]
"trailing: the teacher with timesteps that start at T - 1 like the student's, instead of its scheduler's own"


@dataclass(frozen=True)
class SweepPoint:
    """One combination of sampler, steps and guidance scale.

    Attributes:
        sampler: What generates the images.
        steps: The number of sampling steps.
        guidance_scale: The teacher's guidance scale in diffusers' convention. A LoRA has it in its weights.
    """

    sampler: Sampler
    steps: int
    guidance_scale: float

    @property
    def name(self) -> str:
        """The name of the point's folder."""
        return f"{self.sampler}-{self.steps:02d}-g{self.guidance_scale:g}"

    def evaluations(self, *, applies_cfg: bool) -> int:
        """Return the network evaluations per image. A teacher that applies classifier-free guidance takes two per step."""
        return self.steps * (2 if self.sampler != "student" and applies_cfg else 1)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is generated.

    Attributes:
        prompts: One prompt per image.
        steps: The student's step counts.
        guidance_scales: The guidance scales; the teacher's few-step images use the first.
        resolution: The side of square images in pixels.
        seed: The seed of the noise.
        samplers: How the teacher generates few-step images.
        sizes: (height, width) per image of a run with aspect-ratio buckets; otherwise empty.
    """

    prompts: tuple[str, ...]
    steps: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    resolution: int
    seed: int
    samplers: tuple[Sampler, ...] = ("teacher", "trailing")
    sizes: tuple[tuple[int, int], ...] = ()

    def points(self) -> list[SweepPoint]:
        """Return all points. References come before the points that are compared with them."""
        first, points = self.guidance_scales[0], []
        for scale in self.guidance_scales:
            points.append(SweepPoint("teacher", TEACHER_STEPS, scale))
            points += [SweepPoint("student", n, scale) for n in self.steps]
            if scale == first:
                points += [SweepPoint(sampler, n, scale) for sampler in self.samplers for n in self.steps]
        return points


@dataclass(frozen=True)
class SamplerPair:
    """The teacher and a student's pipeline, with what decides their images.

    Attributes:
        teacher: The teacher.
        pipeline: The student's pipeline.
        student_scale: The guidance scale of the student's pipeline calls; None is the point's own.
        noise: The start noise of N images.
        teacher_fingerprint: A hash of the teacher's weights.
        student_fingerprint: A hash of the student's weights.
        dtype: The precision of the student, and of autocast around the teacher's network.
        batch_size: How many images to generate at once.
        device: The device, in words.
        eta: gamma of the student's TCDScheduler; None is the method's default.
    """

    teacher: Teacher
    pipeline: Any
    student_scale: float | None
    noise: LatentSet
    teacher_fingerprint: str
    student_fingerprint: str
    dtype: torch.dtype
    batch_size: int
    device: str = ""
    eta: float | None = None

    @property
    def conditions(self) -> str:
        """What the time per image depends on, in words."""
        return f"batches of {min(self.batch_size, len(self.noise))} on {self.device}"

    def generate(
        self, point: SweepPoint, sweep: Sweep, done: dict[int, Tensor], on_progress: ProgressCallback
    ) -> LatentSet:
        """Return a point's latents. done: as for `student_latents`."""
        options: Any = {"steps": point.steps, "batch_size": self.batch_size, "on_progress": on_progress, "done": done}
        if point.sampler == "student":
            scale = point.guidance_scale if self.student_scale is None else self.student_scale
            options |= {"guidance_scale": scale, "seed": sweep.seed, "eta": self.eta}
            return student_latents(self.pipeline, sweep.prompts, self.noise, **options)
        options |= {"guidance_scale": point.guidance_scale, "dtype": self.dtype}
        spacing = "trailing" if point.sampler == "trailing" else None
        return teacher_latents(self.teacher, sweep.prompts, self.noise, spacing=spacing, **options)

    def cache_key(self, point: SweepPoint, sweep: Sweep) -> dict[str, Any]:
        """Return everything that decides a point's latents."""
        is_student = point.sampler == "student"
        scheduler = getattr(self.pipeline, "scheduler", None)
        trained_steps = scheduler.config.get("original_inference_steps", 50) if scheduler is not None else 50
        shape = self.noise.shape if isinstance(self.noise, Tensor) else [list(each.shape) for each in self.noise]
        return {
            "format": FORMAT,
            "point": point.name,
            "weights": self.student_fingerprint if is_student else self.teacher_fingerprint,
            "student_scale": self.student_scale if is_student else None,
            **({"eta": self.eta} if is_student and self.eta is not None else {}),
            **({"trained_steps": trained_steps} if is_student and trained_steps != 50 else {}),
            "prompts": sweep.prompts,
            "seed": sweep.seed,
            "resolution": sweep.resolution,
            "where": f"{shape} {self.dtype} {self.pipeline.device.type}",
        }


class SweepObserver(Protocol):
    """What a sweep reports its progress to."""

    def starts(self, point: SweepPoint) -> None:
        """The images of a point are generated now."""
        ...

    def generated(self, point: SweepPoint, images: int) -> None:
        """A batch added some images to a point, or they were kept of an interrupted one."""
        ...

    def finished(self, point: SweepPoint, *, measured: bool) -> None:
        """A point has its results. measured: whether they were computed now."""
        ...


class GeneratedLatents(NamedTuple):
    """Latents, the seconds that generating them took, and the conditions of that time."""

    latents: LatentSet
    seconds: float
    conditions: str


def cached_latents(
    path: Path, generate: Callable[[dict[int, Tensor]], LatentSet], conditions: str = ""
) -> GeneratedLatents:
    """Read latents from a file, or generate and write them atomically. A damaged file is logged and generated again.

    Args:
        path: The file.
        generate: Returns the latents. It is given {index: latents} of an interrupted call, and adds to them what it generates.
        conditions: What the time depends on, in words.
    """
    if (cached := read_intact(path)) is not None:
        tensors, metadata = cached
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # eviction removes the least recently used files first
        latents = tensors.get("latents", [tensors[name] for name in sorted(tensors)])
        return GeneratedLatents(latents, float(metadata["seconds"]), metadata.get("how", ""))
    interrupted = path.with_suffix(PART)
    kept, metadata = read_intact(interrupted) or ({}, {})
    done, start = {int(name): each for name, each in kept.items()}, time.perf_counter()
    before = float(metadata.get("seconds", 0.0))

    def taken() -> str:
        return f"{before + time.perf_counter() - start:.4f}"

    with kept_if_interrupted(
        interrupted, lambda: {str(i): each for i, each in done.items()}, lambda: {"seconds": taken()}
    ):
        latents = generate(done)
    seconds = taken()
    several = {} if isinstance(latents, Tensor) else {f"latents.{i:06d}": each for i, each in enumerate(latents)}
    tensors = {"latents": latents.contiguous()} if isinstance(latents, Tensor) else several
    write_tensors(path, tensors, {"seconds": seconds, "how": conditions})
    interrupted.unlink(missing_ok=True)
    return GeneratedLatents(latents, float(seconds), conditions)


@dataclass(frozen=True)
class DecodedImages:
    """Latents and their pixels. The pixels of small sets are decoded once; those of large sets each time they are read."""

    teacher: Teacher
    latents: LatentSet
    batch_size: int
    _decoded: list[Tensor] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield (indices, latents, pixels in [0, 1] rounded to 8 bits) on the CPU."""
        for i, (indices, latents) in enumerate(batches(self.latents, self.batch_size)):
            if i < len(self._decoded):
                yield indices, latents, self._decoded[i].float() / 255
                continue
            pixels = (self.teacher.decode(latents) * 255).round().to(torch.uint8).cpu()
            if i == len(self._decoded) and pixels[0].numel() * len(self.latents) < _DECODED_LIMIT:
                self._decoded.append(pixels)
            yield indices, latents, pixels.float() / 255

    def images(self, indices: Sequence[int]) -> dict[int, Image.Image]:
        """Return some of the images by their indices."""
        wanted, images = set(indices), {}
        for batch, _, pixels in self.batches():
            images |= {i: as_image(each) for i, each in zip(batch, pixels, strict=True) if i in wanted}
        return images


def round_result(value: float, decimals: int) -> float:
    """Round to three digits and at most `decimals` decimals, which do not depend on the order of a sum."""
    return round(float(f"{value:.3g}"), decimals)


@torch.no_grad()
def compute_metrics(
    images: DecodedImages, reference: DecodedImages, prompts: Sequence[str], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Return {metric: number} of a set of images, rounded as it is recorded."""
    return measure(images, reference, prompts, metrics)[0]


@torch.no_grad()
def measure(
    images: DecodedImages, reference: DecodedImages, prompts: Sequence[str], metrics: Mapping[str, Metric]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return {metric: number} and {metric: standard error}, the latter for metrics that have one; both are rounded."""
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for (indices, latents, pixels), (_, z, target) in zip(images.batches(), reference.batches(), strict=True):
        pair = ImagePair(latents, pixels, z, target, tuple(prompts[i] for i in indices))
        for name, metric in metrics.items():
            values[name].append(metric.per_image(pair).cpu().double())
    numbers, errors = {}, {}
    for name, metric in metrics.items():
        if len(images.latents) >= metric.min_images:
            of_set = torch.cat(values[name])
            numbers[name] = round_result(metric.reduce(of_set), metric.decimals)
            if metric.standard_error is not None:
                errors[name] = round_result(metric.standard_error(of_set), metric.decimals + 1)
    return numbers, errors


def sweep_run(
    folder: Path,
    cache: Path,
    sweep: Sweep,
    pair: SamplerPair,
    metrics: Mapping[str, Metric],
    metrics_key: Any,
    observer: SweepObserver,
) -> list[Path]:
    """Generate and measure every point that has no results yet.

    Args:
        folder: RUN/evaluation.
        cache: The folder of the teacher's latents.
        sweep: What to generate.
        pair: The teacher and the student.
        metrics: The metrics to compute.
        metrics_key: Everything that decides the metrics' numbers, except their code.
        observer: What the progress is reported to.

    Returns:
        The files of `cache` that the sweep uses.
    """
    references: dict[float, DecodedImages] = {}

    def latents_file(point: SweepPoint) -> Path:
        parent = folder / "latents" if point.sampler == "student" else cache
        return parent / f"{digest(pair.cache_key(point, sweep))}.safetensors"

    def images_of(point: SweepPoint) -> tuple[DecodedImages, GeneratedLatents]:
        def generate(done: dict[int, Tensor]) -> LatentSet:
            observer.starts(point)
            return pair.generate(point, sweep, done, lambda images: observer.generated(point, images))

        generated = cached_latents(latents_file(point), generate, pair.conditions)
        return DecodedImages(pair.teacher, generated.latents, pair.batch_size), generated

    for point in sweep.points():
        key = digest([pair.cache_key(point, sweep), metrics_key, sorted(metrics), METRICS_VERSION])
        results_folder, scale = folder / "points" / point.name, point.guidance_scale
        if recorded_key(results_folder / "numbers.json") == key and not damaged_previews(results_folder):
            observer.finished(point, measured=False)
            continue
        images, generated = images_of(point)
        is_reference = point.sampler == "teacher" and point.steps == TEACHER_STEPS
        if scale not in references:
            full = SweepPoint("teacher", TEACHER_STEPS, scale)
            references[scale] = images if is_reference else images_of(full)[0]
        with atomic_dir(results_folder) as temporary:
            numbers, errors = measure(images, references[scale], sweep.prompts, metrics)
            results = {
                "key": key,
                "sampler": point.sampler,
                "steps": point.steps,
                "guidance_scale": scale,
                "images": len(sweep.prompts),
                "numbers": numbers,
                "standard_errors": errors,
                "seconds_per_image": round(generated.seconds / len(sweep.prompts), 5),
                "conditions": generated.conditions,
                "previews": write_previews(images.images(preview_indices(len(sweep.prompts))), temporary),
            }
            (temporary / "numbers.json").write_text(checked_json(results), encoding="utf-8")
        observer.finished(point, measured=True)
    current = {latents_file(point) for point in sweep.points()}
    for path in (folder / "latents").glob("*.[sp]a*"):  # .safetensors, and .part of an interrupted point
        if path.with_suffix(".safetensors") not in current:  # of other weights or other prompts
            path.unlink()
    return [path for path in current if path.parent == cache]


def recorded_key(path: Path) -> str | None:
    """Return the key of a results file; None if it does not exist or cannot be read, so that it is made again."""
    try:
        return read_checked_json(path)["key"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def as_image(pixels: Tensor) -> Image.Image:
    """Convert one image's pixels, (3, H, W) in [0, 1]."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
