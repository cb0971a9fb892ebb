"""The validation grid: fixed prompts, fixed noise, drawn every so many steps with the EMA student."""

import contextlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten
from lcmdistill.data.eviction import claim_folder
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.evaluation.latents import TEACHER_STEPS, ProgressCallback, student_latents, teacher_latents
from lcmdistill.evaluation.metrics.measures import FREE
from lcmdistill.evaluation.sweep import FORMAT, MEASURED, Pixels, as_image, cached_latents, digest, numbers_of
from lcmdistill.sampling.png import grid
from lcmdistill.sampling.prompts import PREVIEW_STEPS, STEPS, default_prompts
from lcmdistill.sampling.student_pipeline import student_pipeline, trained_steps
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import atomic_file, write_text
from lcmdistill.utils.metrics_log import Metrics, read_metrics

logger = logging.getLogger(__name__)


class Validator:
    """Draws samples/step-N.png, a row a prompt and a column for each of STEPS, and measures it against the teacher.

    The newest pictures of PREVIEW_STEPS steps lie beside it one by one, sample-0.png and on, their prompts inside.
    """

    def __init__(self, config: RunConfig, teacher: Teacher, folder: Path) -> None:
        self._config, self._teacher, self._folder = config, teacher, folder
        self._prompts = tuple(config.run.validation_prompts or default_prompts(config.teacher.model, teacher.network))
        side = config.data.resolution // teacher.vae_factor
        shape = (teacher.vae.config.latent_channels, side, side)
        seeds = [derive_seed(config.run.seed, "validation", prompt) for prompt in self._prompts]
        self._noise = torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        objective, num_steps = config.objective, teacher.schedule.num_steps
        self._trained_steps = max(STEPS) if teacher.in_pixels else trained_steps(num_steps, objective)
        self._steps = [n for n in STEPS if n <= self._trained_steps]
        if config.run.validate_every and config.run.best_metric.endswith(
            tuple(f"_{n}" for n in STEPS if n > self._trained_steps)
        ):
            logger.info(
                f"run.best_metric is {config.run.best_metric}, and objective.skip = {objective.skip} trains only "
                f"{self._trained_steps} time steps: no best checkpoint is kept; choose a metric of at most that many steps"
            )
        self._reference: Pixels | None = None
        self._about: list[Any] = []
        "what decides how the teacher's pictures look"

    @property
    def _batch_size(self) -> int:
        """As many at once as training takes, which the memory is known to hold."""
        return self._config.optim.batch_size

    @property
    def _cache(self) -> Path:
        return cache_root(self._config.data) / "evaluation"

    def generate_references(self, dtype: torch.dtype, tell: ProgressCallback) -> None:
        """Draw what the student is to come to: the teacher's full steps, once; a resumed run finds it in the cache.

        To be called while the teacher's network is its own: a LoRA's adapters come later. dtype: of its arithmetic.
        """
        config, teacher = self._config, self._teacher
        scale = config.run.validation_guidance_scale or 1.0
        if guidance_of(teacher, config.student, config.objective.omega) == "baked" and not teacher.in_pixels:
            omegas = omega_range(config)
            scale = omegas.middle if omegas else 1.0
        drawing = [self._prompts, config.run.seed, config.data.resolution, scale, str(dtype)]
        self._about = [teacher.fingerprint(with_network=True), *drawing]
        if config.objective_name == "lcf":
            return  # what it starts from is a student itself
        place = self._cache / f"validation-{digest(self._about)}.safetensors"

        def draw() -> Tensor:
            count = len(self._prompts)
            logger.info(
                f"the teacher draws the {count} validation pictures in {TEACHER_STEPS} steps, once: they are kept"
            )
            options: Any = {"steps": TEACHER_STEPS, "guidance_scale": scale, "batch_size": self._batch_size}
            return teacher_latents(teacher, self._prompts, self._noise, **options, dtype=dtype, tell=tell)

        self._reference = Pixels(teacher, cached_latents(place, draw).latents, self._batch_size, [])

    def draw(self, step: int, network: Any, metrics: Metrics | None) -> dict[str, float]:
        """Draw the grid of a step, and log its numbers, "val/rmse_4" and the like. network: to draw with, on its device.

        What a student draws that has learnt nothing is kept, for every run that begins so.
        """
        teacher, device = self._teacher, network.device
        config = self._config
        pipeline = student_pipeline(teacher, network, config.data.resolution, objective=config.objective)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        resting = [part for name, part in parts.items() if part.device != device and name != "safety_checker"]
        for part in resting:
            part.to(device)
        steps = self._steps
        kept = None if step else self._beginning(network)
        columns, numbers = [], {}
        for n in steps:
            draw = partial(self._latents, pipeline, n)
            latents = cached_latents(kept / f"{n}.safetensors", draw).latents if kept else draw()
            pixels = Pixels(teacher, latents, self._batch_size, [])
            columns.append([image for _, some in pixels.parts() for image in map(as_image, some)])
            found = self._numbers(pixels, kept / f"{n}.json" if kept else None)
            numbers |= {f"val/{name}_{n}": value for name, value in found.items()}
        for part in resting:
            part.to("cpu")
        rows = [list(row) for row in zip(*columns, strict=True)]
        picture = grid(rows, columns=[f"{n} step{'s' * (n > 1)}" for n in steps], labels=self._prompts)
        with atomic_file(self.picture(step)) as aside:
            picture.save(aside)
        shown = columns[steps.index(min(PREVIEW_STEPS, steps[-1]))]
        for i, (prompt, image) in enumerate(zip(self._prompts, shown, strict=True)):
            info = PngInfo()
            info.add_itxt("prompt", prompt)
            image.save(self._folder / "samples" / f"sample-{i}.png", pnginfo=info)
        if metrics is not None:
            metrics.image(step, "validation", picture)
            if numbers:
                metrics.log(step, numbers)
        return numbers

    def is_missing(self, step: int) -> bool:
        """Whether the validation of a step is still to be done: a run may have been stopped between saving and drawing."""
        done = self._reference is None or any(
            line["step"] == step and "val/rmse_1" in line for line in read_metrics(self._folder)
        )
        return not (done and self.picture(step).is_file())

    def picture(self, step: int) -> Path:
        """Where the grid of a step lies."""
        return self._folder / "samples" / f"step-{step:06d}.png"

    def _latents(self, pipeline: Any, steps: int) -> Tensor:
        return student_latents(
            pipeline,
            self._prompts,
            self._noise,
            steps=steps,
            guidance_scale=self._config.run.validation_guidance_scale or 1.0,
            seed=self._config.run.seed,
            batch_size=self._batch_size,
        )

    def _beginning(self, network: Any) -> Path:
        """Where it is kept what a student draws before it has learnt anything, by all that decides it."""
        config = self._config
        told = {key: v for key, v in flatten(config).items() if key.startswith(("student.", "objective."))}
        how = [config.run.validation_guidance_scale, str(network.dtype), network.device.type, self._trained_steps]
        name = f"beginning-{digest([FORMAT, MEASURED, sorted(FREE), self._about, told, how])}"
        return claim_folder(self._cache / name)

    def _numbers(self, pixels: Pixels, kept: Path | None) -> dict[str, float]:
        """What takes no weights, of one number of steps; nothing if the teacher was not seen."""
        if self._reference is None:
            return {}
        if kept:
            with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged one is made again, as latents are
                return json.loads(kept.read_text(encoding="utf-8"))
        numbers = numbers_of(pixels, self._reference, self._prompts, FREE)
        if kept:
            write_text(kept, json.dumps(numbers), shared=True)
        return numbers
