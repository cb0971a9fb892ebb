"""The validation grid: fixed prompts and fixed noise, sampled every few steps with the EMA student."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten
from lcmdistill.data.buckets import bucket_sizes
from lcmdistill.data.eviction import claim_folder
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.evaluation.latents import (
    TEACHER_STEPS,
    LatentSet,
    student_latents,
    teacher_latents,
)
from lcmdistill.evaluation.metrics.basic import BASIC_METRICS
from lcmdistill.evaluation.sweep import FORMAT, METRICS_VERSION, DecodedImages, cached_latents, compute_metrics
from lcmdistill.objectives.common import most_steps
from lcmdistill.sampling.png import grid
from lcmdistill.sampling.prompts import PREVIEW_STEPS, STEPS, default_prompts
from lcmdistill.sampling.student_pipeline import student_pipeline
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import atomic_file
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.logging import progress
from lcmdistill.utils.metrics_log import Metrics, read_metrics
from lcmdistill.utils.units import counted

logger = logging.getLogger(__name__)


def validation_prompts(config: RunConfig, teacher: Teacher, captions: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the prompts of a run's validations: the requested ones, or captions of the run's own data and default prompts.

    Args:
        config: The run's settings.
        teacher: The teacher.
        captions: The user's own captions. They do not change the number of prompts.
    """
    defaults = default_prompts(config.teacher.model, teacher.pipeline)
    return tuple(config.run.validation_prompts or (*captions, *defaults)[: len(defaults)])


class Validator:
    """Write samples/step-N.png, one row per prompt and one column per step count, and measure it against the teacher.

    The newest images of PREVIEW_STEPS steps are also written one by one as sample-0.png and so on, with their prompts inside.
    With aspect-ratio buckets the prompts take the buckets' sizes in turn.
    """

    def __init__(self, config: RunConfig, teacher: Teacher, folder: Path, captions: Sequence[str] = ()) -> None:
        self._config, self._teacher, self._folder = config, teacher, folder
        self._prompts = validation_prompts(config, teacher, captions)
        self._sizes = bucket_sizes(config.data, teacher.multiple)
        self._noise = self._start_noise()
        objective, num_steps = config.objective, teacher.schedule.num_steps
        sampling = teacher.method(objective.info).scheduler_options(objective, num_steps)
        self._trained_steps = max(STEPS) if teacher.in_pixels else min(most_steps(sampling), num_steps)
        self._steps = [n for n in STEPS if n <= self._trained_steps]
        if config.run.validate_every and config.run.best_metric.endswith(
            tuple(f"_{n}" for n in STEPS if n > self._trained_steps)
        ):
            logger.info(
                f"run.best_metric is {config.run.best_metric}, and objective.skip = {objective.skip} trains only "
                f"{self._trained_steps} time steps: no best checkpoint is kept; choose a metric of at most that many steps"
            )
        self._reference: DecodedImages | None = None
        self._reference_key: list[Any] = []
        "what decides the teacher's images"

    def _start_noise(self) -> LatentSet:
        config, factor = self._config, self._teacher.vae_factor
        channels, square = self._teacher.vae.config.latent_channels, (config.data.resolution, config.data.resolution)
        noise = []
        for i, prompt in enumerate(self._prompts):
            height, width = self._sizes[i % len(self._sizes)] if self._sizes else square
            generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "validation", prompt))
            noise.append(torch.randn(channels, height // factor, width // factor, generator=generator))
        return noise if self._sizes else torch.stack(noise)

    @property
    def _batch_size(self) -> int:
        """The training batch size, which is known to fit in memory."""
        return self._config.optim.batch_size

    @property
    def _cache(self) -> Path:
        return cache_root(self._config.data) / "evaluation"

    def generate_references(self, dtype: torch.dtype, after: float = 0.0) -> None:
        """Generate the reference images, the teacher's at its full steps. A resumed run reads them from the cache.

        Call it before a LoRA's adapters are added to the teacher's network.

        Args:
            dtype: The dtype of autocast around the network.
            after: The estimated seconds of what the run does after this.
        """
        config, teacher = self._config, self._teacher
        scale = config.run.validation_guidance_scale or 1.0
        if guidance_of(teacher, config.student, config.objective.omega) == "baked" and not teacher.in_pixels:
            omegas = omega_range(config)
            scale = omegas.middle if omegas else 1.0
        key = [self._prompts, config.run.seed, config.data.resolution, scale, str(dtype), *self._sizes]
        self._reference_key = [teacher.fingerprint(with_network=True), *key]
        if config.objective.info.start == "student":
            return  # its start is a student, which is no reference

        def generate(kept: dict[int, Tensor]) -> LatentSet:
            count = len(self._prompts)
            logger.info(
                f"generating {count} reference images with the teacher ({TEACHER_STEPS} steps; cached for later runs)"
            )
            options: Any = {"steps": TEACHER_STEPS, "guidance_scale": scale, "batch_size": self._batch_size}
            done = itertools.count(1)
            with progress("reference images", count, after=after) as bar:
                options["on_progress"] = lambda images: [bar.update(next(done)) for _ in range(images)]
                return teacher_latents(teacher, self._prompts, self._noise, **options, dtype=dtype, done=kept)

        latents = cached_latents(self._reference_file, generate).latents
        self._reference = DecodedImages(teacher, latents, self._batch_size)

    def cache_entries(self, network: Any) -> list[Path]:
        """Return the entries of the cache that the run uses. network: the student's."""
        return [self._reference_file, self._initial_cache(network)] if self._reference_key else []

    def draw(self, step: int, network: Any, metrics: Metrics | None) -> dict[str, float]:
        """Generate the grid of a training step, and log its numbers as "val/rmse_4" and the like.

        The images of a student before training are cached for every run that starts alike.

        Args:
            step: The training step.
            network: The student's network on its device.
            metrics: The metrics log.
        """
        teacher, device = self._teacher, network.device
        config = self._config
        pipeline = student_pipeline(teacher, network, config.data.resolution, objective=config.objective)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        moved = [part for name, part in parts.items() if part.device != device and name != "safety_checker"]
        for part in moved:
            part.to(device)
        cache = None if step else claim_folder(self._initial_cache(network))
        columns, numbers = [], {}
        for n in self._steps:
            generate = partial(self._latents, pipeline, n)
            latents = (
                cached_latents(cache / f"{n}.safetensors", lambda _, f=generate: f()).latents if cache else generate()
            )
            decoded = DecodedImages(teacher, latents, self._batch_size)
            images = decoded.images(range(len(self._prompts)))
            columns.append([images[i] for i in range(len(self._prompts))])
            if self._reference is not None:
                values = compute_metrics(decoded, self._reference, self._prompts, BASIC_METRICS)
                numbers |= {f"val/{name}_{n}": value for name, value in values.items()}
        for part in moved:
            part.to("cpu")
        rows = [list(row) for row in zip(*columns, strict=True)]
        picture = grid(rows, columns=[f"{n} step{'s' * (n > 1)}" for n in self._steps], labels=self._prompts)
        with atomic_file(self.picture(step)) as temporary:
            picture.save(temporary)
        previews = columns[self._steps.index(min(PREVIEW_STEPS, self._steps[-1]))]
        for i, (prompt, image) in enumerate(zip(self._prompts, previews, strict=True)):
            info = PngInfo()
            info.add_itxt("prompt", prompt)
            image.save(self._folder / "samples" / f"sample-{i}.png", pnginfo=info)
        if metrics is not None:
            metrics.image(step, "val/grid", picture)
            if numbers:
                metrics.log(step, numbers)
        return numbers

    def is_missing(self, step: int) -> bool:
        """Return whether a step's validation is missing, because a run may stop between saving and validating."""
        done = self._reference is None or any(
            line["step"] == step and "val/rmse_1" in line for line in read_metrics(self._folder)
        )
        return not (done and self.picture(step).is_file())

    def picture(self, step: int) -> Path:
        """Return the path of a step's grid."""
        return self._folder / "samples" / f"step-{step:06d}.png"

    def describe(self, step: int, numbers: Mapping[str, float], comparison: str | None) -> str:
        """Return the line that reports a validation: where its grid is, and how far the student is from the teacher."""
        rmse = [f"{counted(n, 'step')} {numbers[f'val/rmse_{n}']:.3f}" for n in STEPS if f"val/rmse_{n}" in numbers]
        parts = [f"step {step}: validation grid saved to {self.picture(step)}"]
        parts += [f"RMSE to the teacher: {', '.join(rmse)}"] * bool(rmse) + [comparison or ""]
        return "; ".join(filter(None, parts))

    def _latents(self, pipeline: Any, steps: int) -> LatentSet:
        return student_latents(
            pipeline,
            self._prompts,
            self._noise,
            steps=steps,
            guidance_scale=self._config.run.validation_guidance_scale or 1.0,
            seed=self._config.run.seed,
            batch_size=self._batch_size,
        )

    @property
    def _reference_file(self) -> Path:
        """The cache file of the reference images."""
        return self._cache / f"validation-{digest(self._reference_key)}.safetensors"

    def _initial_cache(self, network: Any) -> Path:
        """Return the cache folder of the student's images before training, by everything that decides them."""
        config = self._config
        settings = {key: v for key, v in flatten(config).items() if key.startswith(("student.", "objective."))}
        sampling = [config.run.validation_guidance_scale, str(network.dtype), network.device.type, self._trained_steps]
        versions = [FORMAT, METRICS_VERSION, sorted(BASIC_METRICS)]
        return self._cache / f"beginning-{digest([*versions, self._reference_key, settings, sampling])}"
